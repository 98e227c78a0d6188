"""Rows of several sources as one stream, so that no file has to fit into memory: which of a
source's rows are taken, and in which order those of several sources come.

A cap, or a weight, takes fewer rows than a source has: which ones is drawn by run.seed over the
whole source (files are often sorted), and their order stays. Weights are proportions: the mixture
is the largest that has them and repeats no row, and any first part of it has them too. Without
weights the sources follow one another.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar

from conf.choices import DataFormat
from rlhf.data.files import SourceRow
from rlhf.data.parts import Part
from rlhf.data.rows import RowError
from rlhf.types import UserError

Row = dict[str, Any]
Transform = Callable[[Row], Row]
T = TypeVar("T")


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
    notes: tuple[str, ...] = ()  # what was assumed, for the log

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
        total = sum(part.count() for part in self.parts)
        return draw(rows, total, count, random.Random(f"{seed}:{self.name}"))


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
