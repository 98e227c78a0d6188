"""One file, or one data set of the `datasets` library (a directory that save_to_disk wrote, or a
hub's): opened anew for each pass, row by row.
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
    """What a message calls it, how its rows are read, and how many there are."""

    origin: str
    open: Callable[[], Iterator[SourceRow]]
    count: Callable[[], int]
    files: tuple[Path, ...] = ()  # on this machine, for the manifest


def parts_of(
    path: str, key: str, subset: str | None = None, split: str | None = None
) -> tuple[Part, ...]:
    """The parts that `path` names: a file, the files of a glob in the order of their names, a
    directory of save_to_disk, a hub's data set.

    A hub's data set is OWNER/NAME where no such path or directory is there. Raises UserError, `key`
    being the option that names it.
    """
    place = Path(path).expanduser()
    if _GLOB.search(path) and not place.exists():
        return tuple(_file(found, key) for found in _matching(place, path, key))
    if place.is_dir() and any((place / name).is_file() for name in _SAVED):
        return (_saved(place, key, split),)
    suffix_known = place.suffix.lower() in SUFFIXES
    if (
        not place.exists()
        and not suffix_known
        and not place.parent.exists()
        and _HUB_NAME.fullmatch(path)
    ):
        return (_hub(path, key, subset, split),)
    if subset is not None or split is not None:
        option = "subset" if subset is not None else "split"
        raise UserError(
            f"{key}={path} is no data set with configurations or splits: expected no {option}, "
            f"found {subset or split!r}."
        )
    return (_file(place, key, path),)


def _file(place: Path, key: str, given: str | None = None) -> Part:
    name = given or str(place)
    check_file(name, key)
    return Part(str(place), lambda: scan(place, key=key), lambda: count_rows(place, key), (place,))


def _matching(place: Path, path: str, key: str) -> list[Path]:
    at = next(i for i, part in enumerate(place.parts) if _GLOB.search(part))
    root, pattern = Path(*place.parts[:at]), str(Path(*place.parts[at:]))
    found = sorted(p for p in root.glob(pattern) if p.is_file()) if root.is_dir() else []
    readable = [p for p in found if p.suffix.lower() in SUFFIXES]
    if not readable:
        others = f" It matches {len(found)} others, such as {found[0].name}." if found else ""
        raise UserError(
            f"{key}={path}: no file that ends with {', '.join(SUFFIXES)} matches below "
            f"{root}.{others}"
        )
    return readable


def _rows(origin: str, values: Iterable[dict[str, Any]]) -> Iterator[SourceRow]:
    for number, value in enumerate(values, start=1):
        yield SourceRow(number, dict(value), origin=origin)


def _one_split(path: str, key: str, names: list[str], split: str | None) -> str:
    wanted = split or ("train" if "train" in names else names[0] if len(names) == 1 else None)
    if wanted not in names:
        missing = "more than one and none is train" if wanted is None else f"no {wanted!r}"
        raise UserError(
            f"{key}={path}: its splits are {', '.join(names)}: {missing}. Set data.split (of a "
            "mixture: the source's split)."
        )
    return wanted


def _saved(place: Path, key: str, split: str | None) -> Part:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(place))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{key}={place}: not a readable datasets directory ({type(error).__name__}: {error})."
        ) from error
    origin, folder = str(place), place
    if isinstance(loaded, datasets.DatasetDict):
        name = _one_split(str(place), key, list(loaded), split)
        loaded, origin, folder = loaded[name], f"{place}:{name}", place / name
    elif split is not None:
        raise UserError(
            f"{key}={place}: a single data set without splits: expected no split, found {split!r}."
        )
    files = tuple(sorted(p for p in folder.iterdir() if p.suffix == ".arrow"))
    return Part(origin, lambda: _rows(origin, loaded), lambda: len(loaded), files)


def _hub(name: str, key: str, subset: str | None, split: str | None) -> Part:
    def load() -> Any:
        import datasets

        try:
            chosen = _one_split(name, key, datasets.get_dataset_split_names(name, subset), split)
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

    origin = ":".join([name, *([subset] if subset else []), *([split] if split else [])])

    def count() -> int:
        loaded = load()
        known = (loaded.info.splits or {}).get(str(loaded.split))
        return (
            known.num_examples
            if known is not None and known.num_examples
            else sum(1 for _ in loaded)
        )

    return Part(origin, lambda: _rows(origin, load()), count)
