"""Rows that are needed together: in memory where they are few, else on disk, so that memory doesn't
grow with the texts.
"""

import errno
import os
import pickle
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from rlhf.types import UserError

Row = TypeVar("Row")
Value = TypeVar("Value")
IN_MEMORY = 10_000  # rows
_READ = 64  # rows read from a file at once
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OnDisk(Sequence[Row]):
    """Rows in a file without a name, which ends with this object. Each access reads a new copy: a
    change of a row is lost unless the row is passed on. Forked processes may read at the same time.
    folder: where the file is; None: the system's folder of temporary files.
    """

    def __init__(self, rows: Iterable[Row], folder: Path | None = None) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open for this object
        self._ends = array("Q", [0])
        for row in rows:
            self._ends.append(self._ends[-1] + self._file.write(pickle.dumps(row, protocol=5)))
        self._file.flush()

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return list(self._blocks(start, stop))
            return [self[i] for i in range(start, stop, step)]
        number = range(len(self))[index]  # raises IndexError
        return next(self._read(number, number + 1))

    def __iter__(self) -> Iterator[Row]:
        return self._blocks(0, len(self))

    def _blocks(self, first: int, last: int) -> Iterator[Row]:
        for start in range(first, last, _READ):
            yield from self._read(start, min(start + _READ, last))

    def _read(self, start: int, stop: int) -> Iterator[Row]:
        """Neighbouring rows, by their places: forked processes share the file."""
        first = self._ends[start]
        content = memoryview(os.pread(self._file.fileno(), self._ends[stop] - first, first))
        for number in range(start, stop):
            own = content[self._ends[number] - first : self._ends[number + 1] - first]
            row: Row = pickle.loads(own)  # noqa: S301 - what this object wrote
            yield row


class Mapped(Sequence[Value], Generic[Row, Value]):
    """`function` of each of the rows, computed anew at each access."""

    def __init__(self, function: Callable[[Row], Value], rows: Sequence[Row]) -> None:
        self._function, self._rows = function, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Value: ...

    @overload
    def __getitem__(self, index: slice) -> list[Value]: ...

    def __getitem__(self, index: int | slice) -> Value | list[Value]:
        if isinstance(index, slice):
            return list(map(self._function, self._rows[index]))
        return self._function(self._rows[index])

    def __iter__(self) -> Iterator[Value]:
        return map(self._function, self._rows)


def gathered(rows: Iterator[Row], folder: Path | None = None) -> Sequence[Row]:
    """All of the rows: a list of up to IN_MEMORY, more of them in a file in `folder` (None: the
    system's folder of temporary files). Raises UserError where that takes no more.
    """
    first = list(islice(rows, IN_MEMORY))
    if len(first) < IN_MEMORY:
        return first
    try:
        return OnDisk(chain(first, rows), folder)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        remedy = ""
        if folder is None:
            remedy = ", or name another folder in the environment variable TMPDIR"
        raise UserError(
            f"{folder or tempfile.gettempdir()}: the rows can't be kept there ({error}). Make room"
            f"{remedy}."
        ) from error


class _Picked(Sequence[Row]):
    """Some rows of others, where they are: neighbours are read together."""

    def __init__(self, rows: Sequence[Row], indices: Sequence[int]) -> None:
        self._rows, self._indices = rows, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return self._together(self._indices[index])
        return self._rows[self._indices[index]]

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self._indices), _READ):
            yield from self._together(self._indices[start : start + _READ])

    def _together(self, indices: Sequence[int]) -> list[Row]:
        """Rows at these places: all between them are read where they are most of those."""
        if not len(indices):
            return []
        first, last = min(indices), max(indices)
        if last - first < 2 * len(indices):
            between = self._rows[first : last + 1]
            return [between[index - first] for index in indices]
        return [self._rows[index] for index in indices]


class _Together(Sequence[Row]):
    """Rows of one sequence after those of another, where they are."""

    def __init__(self, first: Sequence[Row], second: Sequence[Row]) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        border = len(self._first)
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return [self[i] for i in range(start, stop, step)]
            before = self._first[min(start, border) : min(stop, border)]
            start = max(start - border, 0)
            stop = max(stop - border, 0)
            return [*before, *self._second[start:stop]]
        number = range(len(self))[index]  # raises IndexError
        if number < border:
            return self._first[number]
        return self._second[number - border]

    def __iter__(self) -> Iterator[Row]:
        return chain(self._first, self._second)


def picked(rows: Sequence[Row], indices: Sequence[int]) -> Sequence[Row]:
    """Some of the rows, where they are."""
    if isinstance(rows, list):
        return [rows[index] for index in indices]
    return _Picked(rows, indices)


def mapped(function: Callable[[Row], Value], rows: Sequence[Row]) -> Sequence[Value]:
    """`function` of each of the rows: a list of those that are one, else computed anew at each
    access.
    """
    if isinstance(rows, list):
        return [function(row) for row in rows]
    return Mapped(function, rows)


def together(first: Sequence[Row], second: Sequence[Row]) -> Sequence[Row]:
    """Both, one after the other, where they are."""
    if isinstance(first, list) and isinstance(second, list):
        return [*first, *second]
    return _Together(first, second)
