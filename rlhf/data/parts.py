"""The parts that a path names: files, or a data set of the `datasets` library (a directory that
save_to_disk wrote, or a hub's). Each is opened anew for each pass and read row by row.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.files import SUFFIXES, SourceRow, check_file, count_rows, scan
from rlhf.types import UserError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk leaves in a directory
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Part:
    """A file or a data set."""

    origin: str  # its name in messages
    open: Callable[[], Iterator[SourceRow]]
    count: Callable[[], int]  # of its rows
    files: tuple[Path, ...] = ()  # on this machine, for the manifest


def parts_of(
    path: str, key: str, subset: str | None = None, split: str | None = None
) -> tuple[Part, ...]:
    """The parts of `path`: a file, the files of a glob in the order of their names, a directory of
    save_to_disk, or a hub's data set.

    OWNER/NAME is a hub's data set where no such path or directory exists. Raises UserError, `key`
    being the option that names the path.
    """
    local = Path(path).expanduser()
    if _GLOB.search(path) and not local.exists():
        return tuple(_file(file, key) for file in _matching(local, path, key))
    if local.is_dir() and any((local / name).is_file() for name in _SAVED):
        return (_saved(local, key, split),)
    missing = not local.exists() and not local.parent.exists()
    if missing and local.suffix.lower() not in SUFFIXES and _HUB_NAME.fullmatch(path):
        return (_hub(path, key, subset, split),)
    if subset is not None or split is not None:
        option = "subset" if subset is not None else "split"
        raise UserError(
            f"{key}={path} is no data set with configurations or splits: expected no {option}, "
            f"found {subset or split!r}."
        )
    return (_file(local, key, path),)


def _file(path: Path, key: str, given: str | None = None) -> Part:
    check_file(given or str(path), key)
    return Part(str(path), lambda: scan(path, key=key), lambda: count_rows(path, key), (path,))


def _matching(pattern: Path, path: str, key: str) -> list[Path]:
    """The files that match a glob, in the order of their names. Raises UserError for none that can
    be read.
    """
    first = next(i for i, part in enumerate(pattern.parts) if _GLOB.search(part))
    root, glob = Path(*pattern.parts[:first]), str(Path(*pattern.parts[first:]))
    matches = sorted(p for p in root.glob(glob) if p.is_file()) if root.is_dir() else []
    readable = [p for p in matches if p.suffix.lower() in SUFFIXES]
    if not readable:
        others = f" It matches {len(matches)} others, such as {matches[0].name}." if matches else ""
        raise UserError(
            f"{key}={path}: no file that ends with {', '.join(SUFFIXES)} matches below "
            f"{root}.{others}"
        )
    return readable


def _rows(origin: str, values: Iterable[dict[str, Any]]) -> Iterator[SourceRow]:
    for number, value in enumerate(values, start=1):
        yield SourceRow(number, dict(value), origin=origin)


def _choose_split(path: str, key: str, names: list[str], split: str | None) -> str:
    """The wanted split, else train, else the only one. Raises UserError."""
    if split is None and "train" in names:
        return "train"
    if split is None and len(names) == 1:
        return names[0]
    if split in names:
        return split
    missing = "more than one and none is train" if split is None else f"no {split!r}"
    raise UserError(
        f"{key}={path}: its splits are {', '.join(names)}: {missing}. Set data.split (of a "
        "mixture: the source's split)."
    )


def _saved(folder: Path, key: str, split: str | None) -> Part:
    """A directory that save_to_disk wrote. Raises UserError."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{key}={folder}: not a readable datasets directory ({type(error).__name__}: {error})."
        ) from error
    origin, part_folder = str(folder), folder
    if isinstance(loaded, datasets.DatasetDict):
        name = _choose_split(str(folder), key, list(loaded), split)
        loaded, origin, part_folder = loaded[name], f"{folder}:{name}", folder / name
    elif split is not None:
        raise UserError(
            f"{key}={folder}: a single data set without splits: expected no split, found {split!r}."
        )
    files = tuple(sorted(p for p in part_folder.iterdir() if p.suffix == ".arrow"))
    return Part(origin, lambda: _rows(origin, loaded), lambda: len(loaded), files)


def _hub(name: str, key: str, subset: str | None, split: str | None) -> Part:
    """A hub's data set, streamed; whether it exists shows when its rows are read."""

    def load() -> Any:
        import datasets

        try:
            names = datasets.get_dataset_split_names(name, subset)
            chosen = _choose_split(name, key, names, split)
            return datasets.load_dataset(name, subset, split=chosen, streaming=True)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{key}={name}: there is no such file or directory here, and as a hub's data set "
                "it can't be reached "
                f"({type(error).__name__}: {why}). Give a file, a glob or a directory that "
                "datasets' save_to_disk wrote, "
                "or check the name and the connection (HF_HUB_OFFLINE)."
            ) from error

    def count() -> int:
        loaded = load()
        known = (loaded.info.splits or {}).get(str(loaded.split))
        if known is not None and known.num_examples:
            return known.num_examples
        return sum(1 for _ in loaded)

    origin = ":".join(part for part in (name, subset, split) if part)
    return Part(origin, lambda: _rows(origin, load()), count)
