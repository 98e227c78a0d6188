"""Where rows come from: files, globs, data sets and mixtures of them, streamed, so that no file has
to fit into memory.

A cap, or a weight, takes fewer rows than a source has: which ones is drawn by run.seed over the
whole source (files are often sorted), and their order stays. Weights are proportions: the mixture
is the largest that has them and repeats no row, and any first part of it has them too. Without
weights the sources follow one another.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from conf.choices import DataFormat
from conf.schema import Config, DataConfig, SourceConfig
from rlhf.data.files import SourceRow
from rlhf.data.parts import Part, parts_of
from rlhf.data.rows import RowError
from rlhf.types import UserError

Row = dict[str, Any]
Transform = Callable[[Row], Row]
T = TypeVar("T")
_CAP = re.compile(r"(.+)#(\d+)")


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
    notes: tuple[str, ...] = ()  # what was assumed, to be said aloud

    def rows(self, part: Part) -> Iterator[SourceRow]:
        """All rows of one of its parts, transformed."""
        for row in part.open():
            columns = row.columns
            try:
                for transform in self.transforms if row.problem is None else ():
                    columns = transform(columns)
            except RowError as error:
                yield replace(row, problem=str(error), raw=row.columns)
                continue
            yield row if columns is row.columns else replace(row, columns=columns)

    def size(self) -> int:
        """Rows that it can give: all, or its cap."""
        total = sum(part.count() for part in self.parts)
        return total if self.cap is None else min(total, self.cap)

    def take(self, count: int | None, seed: int) -> Iterator[SourceRow]:
        """`count` of its rows drawn by `seed`, in their order; all for None."""
        rows = chain.from_iterable(self.rows(part) for part in self.parts)
        if count is None:
            return rows
        return draw(
            rows,
            sum(part.count() for part in self.parts),
            count,
            random.Random(f"{seed}:{self.name}"),
        )


def train_sources(cfg: Config) -> list[Source]:
    """What data.path, data.sources or data.dataset name; empty when none is set. Raises UserError
    for what isn't there.
    """
    data = cfg.data
    if data.sources:
        out = [_named(name, source, data) for name, source in data.sources.items()]
        origins = Counter(part.origin for source in out for part in source.parts)
        twice = next((origin for origin, times in origins.items() if times > 1), None)
        if twice is not None:
            raise UserError(
                f"data.sources: {twice} is in more than one of them. Name it once, with the "
                "weight that it shall have."
            )
        return out
    if data.dataset is not None:
        from rlhf.data import registry

        assert data.registry is not None
        if data.format is not DataFormat.auto or data.columns:
            option = "data.columns" if data.columns else f"data.format={data.format.value}"
            raise UserError(
                f"{option} and data.dataset={data.dataset}: the registry says both format and "
                f"columns. Leave {option} out."
            )
        return registry.sources(Path(data.registry).expanduser(), data.dataset)
    return [] if data.path is None else [_plain(data.path, "data.path", data)]


def eval_sources(cfg: Config) -> list[Source]:
    """What data.eval_path names; empty when it isn't set. Raises UserError for what isn't there."""
    return (
        []
        if cfg.data.eval_path is None
        else [_plain(cfg.data.eval_path, "data.eval_path", cfg.data)]
    )


def one_source(path: str, key: str) -> Source:
    """The rows of `path`, in whatever format, `key` being the option that names it. Raises
    UserError for what isn't there.
    """
    return _plain(path, key, DataConfig())


def given(data: DataConfig) -> str | None:
    """The training rows' option with its value, for messages; None when none is set."""
    if data.sources:
        return f"data.sources={{{', '.join(data.sources)}}}"
    if data.dataset is not None:
        return f"data.dataset={data.dataset}"
    return None if data.path is None else f"data.path={data.path}"


def data_files(cfg: Config) -> list[Path]:
    """Every file on this machine that the run reads, once each, for its manifest."""
    joined = [
        file
        for path in cfg.data.join
        for part in parts_of(path, "data.join")
        for file in part.files
    ]
    files = [
        file
        for source in (*train_sources(cfg), *eval_sources(cfg))
        for part in source.parts
        for file in part.files
    ]
    return list(dict.fromkeys([*files, *joined]))


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
    return interleave(
        [source.take(count, seed) for source, count in zip(sources, counts, strict=True)], counts
    )


def proportions(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """The most rows of each source, at most its size, that stand to each other as the weights do
    (rounded down, but at least 1).
    """
    largest = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    return [
        min(size, max(1, int(largest * weight + 1e-9)))
        for size, weight in zip(sizes, weights, strict=True)
    ]


def interleave(streams: Sequence[Iterator[T]], counts: Sequence[int]) -> Iterator[T]:
    """counts[i] values of streams[i], spread evenly: next comes the stream whose next value is due
    first.
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


def _plain(path: str, key: str, data: DataConfig) -> Source:
    only_train = key == "data.path"
    subset, split = (data.subset, data.split) if only_train else (None, None)
    place, cap = split_cap(path, key)
    return Source(
        key,
        path,
        parts_of(place, key, subset, split),
        data.format,
        _transforms(data.columns, data),
        cap,
    )


def _named(name: str, source: SourceConfig, data: DataConfig) -> Source:
    key = f"data.sources.{name}.path"
    place, cap = split_cap(source.path, key)
    if cap is not None and source.cap is not None:
        raise UserError(
            f"{key}={source.path}: the cap is given twice, as #{cap} and as "
            f"data.sources.{name}.cap={source.cap}."
        )
    form = source.format if source.format is not DataFormat.auto else data.format
    columns = source.columns or data.columns
    parts = parts_of(place, key, source.subset, source.split)
    return Source(
        key,
        name,
        parts,
        form,
        _transforms(columns, data),
        cap if cap is not None else source.cap,
        source.weight,
    )


def _transforms(columns: dict[str, Any], data: DataConfig) -> tuple[Transform, ...]:
    out: list[Transform] = [lambda row: rename(row, columns)] if columns else []
    if data.join:
        from rlhf.data.formats import mt_bench

        out.append(mt_bench.joiner(tuple(data.join)))
    return tuple(out)


def split_cap(path: str, key: str) -> tuple[str, int | None]:
    """`path#500` as the path and the most rows to take of it; a path that has no such ending, or is
    there as it stands, has no cap.
    """
    match = _CAP.fullmatch(path)
    if match is None or Path(path).expanduser().exists():
        return path, None
    if int(match[2]) < 1:
        raise UserError(f"{key}={path}: expected at least one row after '#', found {match[2]}.")
    return match[1], int(match[2])


def rename(row: Row, columns: dict[str, Any]) -> Row:
    """A row whose column columns[name] is called `name`; a column that had that name before is left
    out. A missing one stays missing.
    """
    taken = {source: name for name, source in columns.items() if source in row}
    replaced = set(taken.values())
    return {
        taken.get(key, key): value
        for key, value in row.items()
        if key in taken or key not in replaced
    }
