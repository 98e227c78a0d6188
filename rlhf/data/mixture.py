"""Sources of rows, and several of them as one stream, so that no file has to fit into memory.

A source's parts are files, or a data set of the `datasets` library (a directory that save_to_disk
wrote, or a hub's). Each is opened anew for each pass and read row by row.

A cap, or a weight, takes fewer rows than a source has: which ones is drawn by run.seed over the
whole source (files are often sorted), and their order stays. Weights are proportions: the mixture
is the largest that has them and repeats no row, and any first part of it has them too. Without
weights the sources follow one another.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from conf.data import DataFormat
from rlhf.data.files import SourceRow, check_file, count_rows, scan
from rlhf.data.opening import KINDS, endings, kind_of
from rlhf.data.rows import RowError
from rlhf.types import UserError

Row = dict[str, Any]
# A row's columns under other names. What is not carried on is added to the list, a sentence each.
Transform = Callable[[Row, list[str]], Row]
T = TypeVar("T")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk leaves in a directory
_GLOB = re.compile(r"[*?\[]")


# ---- parts: files and data sets ----


@dataclass(frozen=True, slots=True)
class Part:
    """A file or a data set."""

    origin: str  # its name in messages
    open: Callable[[], Iterator[SourceRow]]
    count: Callable[[], int]  # of its rows
    files: tuple[Path, ...] = ()  # on this machine, for the manifest
    note: str | None = None  # what of the path is not read, for the log

    @property
    def folder(self) -> Path | None:
        """Where the pictures are that its rows name; None: rows of a hub."""
        return self.files[0].parent if self.files else None


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
        files, note = _matching(local, path, key)
        return tuple(replace(_file(file, key), note=note) for file in files)
    if local.is_dir() and any((local / name).is_file() for name in _SAVED):
        return (_saved(local, key, split),)
    missing = not local.exists() and not local.parent.exists()
    if missing and kind_of(local) is None and _HUB_NAME.fullmatch(path):
        return (hub_part(path, key, subset, split),)
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


def _matching(pattern: Path, path: str, key: str) -> tuple[list[Path], str | None]:
    """The files that match a glob, in the order of their names, and a note on matches that aren't
    read. Raises UserError for none that can be.

    A file of text (README.txt) is rows only where the glob names that ending.
    """
    first = next(i for i, part in enumerate(pattern.parts) if _GLOB.search(part))
    root, glob = Path(*pattern.parts[:first]), str(Path(*pattern.parts[first:]))
    matches = sorted(p for p in root.glob(glob) if p.is_file()) if root.is_dir() else []
    kinds = [kind for kind in KINDS if kind != ".txt" or kind_of(glob) == ".txt"]
    readable = [p for p in matches if kind_of(p) in kinds]
    others = [p.name for p in matches if p not in readable]
    if not readable:
        hint = f" It matches {len(others)} others, such as {others[0]}." if others else ""
        raise UserError(
            f"{key}={path}: no file that ends with {endings()} matches below {root}.{hint}"
        )
    if not others:
        return readable, None
    names = ", ".join(others[:3]) + (" ..." if len(others) > 3 else "")
    return readable, f"{key}={path}: {len(others)} matches are no files of rows: {names}."


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

    def rows() -> Iterator[SourceRow]:
        if _has_media(loaded.features):
            return _rows(origin, loaded.to_iterable_dataset().decode(False))
        return _rows(origin, loaded)

    return Part(origin, rows, lambda: len(loaded), files)


def _has_media(feature: Any) -> bool:
    """Whether a data set decodes pictures or the like by itself: rows shall have their bytes."""
    if isinstance(feature, Mapping):
        return any(_has_media(inner) for inner in feature.values())
    if hasattr(feature, "feature"):  # a list
        return _has_media(feature.feature)
    return hasattr(feature, "decode")


def hub_part(
    name: str,
    key: str,
    subset: str | None,
    split: str | None,
    folder: str | None = None,
    hint: str = "",
) -> Part:
    """A hub's data set (of it the files below `folder`), streamed; whether it exists shows when its
    rows are read. `hint` ends the message where it can't be reached.
    """
    below = {} if folder is None else {"data_dir": folder}

    def load() -> Any:
        import datasets

        try:
            names = datasets.get_dataset_split_names(name, subset, **below)
            chosen = _choose_split(name, key, names, split)
            found = datasets.load_dataset(name, subset, split=chosen, streaming=True, **below)
            if found.features is not None and _has_media(found.features):
                found = found.decode(False)
            return found
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{key}={name}: there is no such file or directory here, and as a hub's data set "
                "it can't be reached "
                f"({type(error).__name__}: {why}). Give a file, a glob or a directory that "
                "datasets' save_to_disk wrote, "
                f"or check the name and the connection (HF_HUB_OFFLINE).{hint}"
            ) from error

    def count() -> int:
        loaded = load()
        known = (loaded.info.splits or {}).get(str(loaded.split))
        if known is not None and known.num_examples:
            return known.num_examples
        return sum(1 for _ in loaded)

    origin = ":".join(part for part in (name, folder, subset, split) if part)
    return Part(origin, lambda: _rows(origin, load()), count)


# ---- sources, and several of them as one stream ----


@dataclass(frozen=True, slots=True)
class Source:
    """Rows of one layout: where they are, how they are read, and how many of them are wanted."""

    key: str  # the option that names it
    name: str  # for messages
    parts: tuple[Part, ...]
    format: DataFormat = DataFormat.auto
    transforms: tuple[Transform, ...] = ()  # of a row's columns, before its format is looked for
    cap: int | None = None
    weight: float | None = None
    repeats: bool = False  # a cap above its rows gives rows again
    notes: tuple[str, ...] = ()  # what was assumed, for the log
    named_columns: bool = False  # data.columns says which column is what
    image_dir: Path | None = None  # of its pictures; None: where its files are

    def all_notes(self) -> list[str]:
        """What the log says of it, once each: what was assumed, and what of its path isn't read."""
        notes = [*self.notes, *(part.note for part in self.parts if part.note is not None)]
        return list(dict.fromkeys(notes))

    def rows(self, part: Part) -> Iterator[SourceRow]:
        """All rows of one of its parts, transformed."""
        for row in part.open():
            if row.problem is not None or not self.transforms:
                yield row
                continue
            columns = row.columns
            lost: list[str] = []
            try:
                for transform in self.transforms:
                    columns = transform(columns, lost)
            except RowError as error:
                yield replace(row, problem=str(error), raw=row.columns)
                continue
            yield replace(row, columns=columns, lost=tuple(lost))

    def size(self) -> int:
        """Rows that it can give: all, or its cap."""
        total = sum(part.count() for part in self.parts)
        if self.cap is None:
            return total
        if self.repeats and total:
            return self.cap
        return min(total, self.cap)

    def take(self, count: int | None, seed: int) -> Iterator[SourceRow]:
        """`count` of its rows drawn by `seed`, in their order; all for None. Where there are fewer
        and it repeats, all of them again and again, and of the last time a draw.
        """
        if count is None:
            return self._all_rows()
        total = sum(part.count() for part in self.parts)
        rng = random.Random(f"{seed}:{self.name}")
        if not self.repeats or count <= total or not total:
            return draw(self._all_rows(), total, count, rng)
        whole = chain.from_iterable(self._all_rows() for _ in range(count // total))
        return chain(whole, draw(self._all_rows(), total, count % total, rng))

    def _all_rows(self) -> Iterator[SourceRow]:
        return chain.from_iterable(self.rows(part) for part in self.parts)


def mixed(sources: Sequence[Source], seed: int) -> Iterator[SourceRow]:
    """The rows of all sources: interleaved in the proportions of their weights, or one source after
    the other.
    """
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return chain.from_iterable(source.take(source.cap, seed) for source in sources)
    sizes = [source.size() for source in sources]
    empty = next((source for source, size in zip(sources, sizes, strict=True) if size == 0), None)
    if empty is not None:
        raise UserError(
            f"{empty.key} of the source {empty.name} holds no rows, so no mixture has its weight."
        )
    counts = proportions(sizes, weights)
    streams = [source.take(count, seed) for source, count in zip(sources, counts, strict=True)]
    return interleave(streams, counts)


def proportions(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """The most rows of each source, at most its size, that are in the proportions of `weights`
    (rounded down, but at least 1).
    """
    largest = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    return [
        min(size, max(1, int(largest * weight + 1e-9)))
        for size, weight in zip(sizes, weights, strict=True)
    ]


def interleave(streams: Sequence[Iterator[T]], counts: Sequence[int]) -> Iterator[T]:
    """counts[i] values of streams[i], spread evenly: the next value comes from the stream whose
    share is furthest behind.
    """
    taken = [0] * len(counts)
    for _ in range(sum(counts)):
        due = min(
            (i for i in range(len(counts)) if taken[i] < counts[i]),
            key=lambda i: (taken[i] + 0.5) / counts[i],
        )
        taken[due] += 1
        yield next(streams[due])


def draw(values: Iterator[T], total: int, count: int, rng: random.Random) -> Iterator[T]:
    """`count` of `total` values, each choice of them equally likely, in their order (Knuth, TAOCP
    2, 3.4.2, algorithm S).
    """
    left, wanted = total, min(count, total)
    for value in values:
        if not wanted:
            return
        if rng.random() * left < wanted:
            wanted -= 1
            yield value
        left -= 1
