"""metrics.jsonl as it grows: the newest figures from its end, and all series without reading again
what was read.

A run may take lines back: a resume cuts the file at its checkpoint (a new file, or a shorter one),
a rewind too, and the last line is written again while its step lasts. So the place where reading
goes on is the start of the last line that was seen, and it counts only where the line before it
still stands there word by word. Else everything is read again.
"""

import json
import math
import os
import threading
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

_TAIL = 1 << 16  # bytes at the end in which the newest figures are looked for
_TAIL_MOST = 1 << 22
_LINES = 60  # at the end: an evaluation's figures stand only in some
_OUTSIDE = ("step", "time_s")


@dataclass(slots=True)
class Series:
    """A metric: its steps, and the values there. Missing and infinite values are left out."""

    steps: "array[int]" = field(default_factory=lambda: array("q"))
    values: "array[float]" = field(default_factory=lambda: array("d"))

    def append(self, step: int, value: float) -> None:
        """Add the next point."""
        self.steps.append(step)
        self.values.append(value)

    def cut(self, step: int) -> None:
        """Remove the points from `step` on."""
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.values.pop()

    def points(self) -> Iterator[tuple[int, float]]:
        """Its points in their order."""
        return zip(self.steps, self.values, strict=True)


@dataclass(frozen=True, slots=True)
class Newest:
    """What the end of a file says. step, time_s: of the last line, None without one; figures: the
    newest value of each metric in the last lines.
    """

    step: int | None = None
    time_s: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)


def row_of(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl or samples.jsonl; None for one that a run did not write so."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return row if isinstance(step, int) and not isinstance(step, bool) else None


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a line that have a value."""
    out = {}
    for name, value in row.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and name not in _OUTSIDE and math.isfinite(value):
            out[name] = float(value)
    return out


def newest(path: Path) -> Newest:
    """The last figures of metrics.jsonl, from its end alone."""
    with path.open("rb") as file:
        lines = _last_lines(file)
    last: dict[str, Any] | None = None
    figures: dict[str, float] = {}
    for line in reversed(lines[-_LINES:]):
        row = row_of(line)
        if row is None:
            continue
        last = last or row
        figures = {**numbers(row), **figures}
    if last is None:
        return Newest()
    time_s = last.get("time_s")
    return Newest(last["step"], time_s if isinstance(time_s, (int, float)) else None, figures)


def _last_lines(file: BinaryIO) -> list[bytes]:
    """Whole lines at the end of a file; a torn last line is none of them."""
    size = file.seek(0, os.SEEK_END)
    length = _TAIL
    while True:
        start = max(0, size - length)
        file.seek(start)
        lines = file.read(size - start).split(b"\n")
        whole = lines[1:-1] if start else lines[:-1]
        if whole or not start or length >= _TAIL_MOST:
            return whole
        length *= 4


class Reader:
    """All series of one metrics.jsonl. Any thread may ask."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self.read_whole = 0  # how often it began anew
        self._begin()

    def _begin(self) -> None:
        self._series: dict[str, Series] = {}
        self._inode: int | None = None
        self._offset = 0  # where the last line that was seen starts
        self._before = b""  # the line before it
        self._last: tuple[int, dict[str, float]] | None = None  # that line's step and metrics
        self._step: int | None = None  # of the line before it
        self._unreadable = 0

    def series(self) -> dict[str, Series]:
        """The series as the file has them now; {} where there is none."""
        with self._lock:
            try:
                with self._path.open("rb") as file:
                    self._refresh(file)
            except FileNotFoundError:
                self._begin()
            return self._with_last()

    @property
    def unreadable(self) -> int:
        """Lines that no run of ours wrote so."""
        return self._unreadable

    def _refresh(self, file: BinaryIO) -> None:
        inode = os.fstat(file.fileno()).st_ino
        if not self._stands(file, inode):
            self._again(inode)
        file.seek(self._offset)
        if not self._take(file.read()):
            self._again(inode)
            file.seek(0)
            self._take(file.read(), patient=True)

    def _again(self, inode: int) -> None:
        self._begin()
        self._inode = inode
        self.read_whole += 1

    def _stands(self, file: BinaryIO, inode: int) -> bool:
        """Whether what was read is still what stands before the offset."""
        if self._inode != inode or file.seek(0, os.SEEK_END) < self._offset:
            return False
        file.seek(self._offset - len(self._before))
        return file.read(len(self._before)) == self._before

    def _take(self, content: bytes, patient: bool = False) -> bool:
        """Add the whole lines of `content`, which starts at the offset.

        False where steps go back, which tells of a file that was cut and has grown again; `patient`
        takes the later lines then.
        """
        *lines, _ = content.split(b"\n")  # the last part is torn, or empty
        self._last = None
        for number, line in enumerate(lines):
            row = row_of(line)
            if row is None:
                self._unreadable += bool(line.strip()) and number < len(lines) - 1
                self._pass(line, number, lines)
                continue
            step = row["step"]
            if self._step is not None and step <= self._step:
                if not patient:
                    return False
                for series in self._series.values():
                    series.cut(step)
            if number == len(lines) - 1:
                self._last = (step, numbers(row))
            else:
                self._settle(step, numbers(row))
            self._pass(line, number, lines)
        return True

    def _pass(self, line: bytes, number: int, lines: list[bytes]) -> None:
        """Go past a line, but for the last one, which may be written again."""
        if number < len(lines) - 1:
            self._offset += len(line) + 1
            self._before = line + b"\n"

    def _settle(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step = step
        for name, value in metrics.items():
            self._series.setdefault(name, Series()).append(step, value)

    def _with_last(self) -> dict[str, Series]:
        """Copies, the last line's values among them."""
        out = {
            name: Series(array("q", held.steps), array("d", held.values))
            for name, held in self._series.items()
        }
        if self._last is not None:
            step, metrics = self._last
            for name, value in metrics.items():
                out.setdefault(name, Series()).append(step, value)
        return out


class Readers:
    """The readers of the files that were asked for last."""

    def __init__(self, most: int = 8) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._held: dict[Path, Reader] = {}

    def of(self, path: Path) -> Reader:
        """The reader of a metrics.jsonl."""
        with self._lock:
            reader = self._held.pop(path, None) or Reader(path)
            self._held[path] = reader
            while len(self._held) > self._most:
                self._held.pop(next(iter(self._held)))
            return reader
