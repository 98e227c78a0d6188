"""samples.jsonl page by page, the newest first."""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rlhf.board.runs.metrics import row_of

A_PAGE = 10  # samples
_BLOCK = 1 << 20
_TEXTS = ("prompt", "response", "chosen", "rejected")  # shown whole, as text
_NOT_FIGURES = (*_TEXTS, "step", "turns", "nonfinite")


@dataclass(frozen=True, slots=True)
class Sample:
    """A line: its texts by name, an episode's turns (role and text), and the rest as words."""

    step: int
    texts: tuple[tuple[str, str], ...]
    turns: tuple[tuple[str, str], ...]
    figures: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Page:
    """Samples of one page; `pages` counts from 1."""

    samples: tuple[Sample, ...]
    page: int
    pages: int
    count: int


def page_of(path: Path, page: int) -> Page:
    """The page `page` (from 1) of the file; the nearest one where there is no such page. A torn
    last line is left out.
    """
    with path.open("rb") as file:
        starts = _line_starts(file)
        count = len(starts) - 1
        pages = max(1, -(-count // A_PAGE))
        page = min(max(1, page), pages)
        last = count - (page - 1) * A_PAGE
        samples = []
        for number in range(last - 1, max(-1, last - 1 - A_PAGE), -1):
            file.seek(starts[number])
            row = row_of(file.read(starts[number + 1] - starts[number]))
            if row is not None:
                samples.append(_sample(row))
    return Page(tuple(samples), page, pages, count)


def _line_starts(file: BinaryIO) -> "array[int]":
    """Where each whole line starts, and where the last one ends. They are looked for anew each
    time: a resume takes lines away.
    """
    starts = array("q", [0])
    at = 0
    while block := file.read(_BLOCK):
        found = block.find(b"\n")
        while found >= 0:
            starts.append(at + found + 1)
            found = block.find(b"\n", found + 1)
        at += len(block)
    return starts


def _sample(row: Mapping[str, Any]) -> Sample:
    texts = [(name, _words(row[name])) for name in _TEXTS if row.get(name) is not None]
    turns = []
    for turn in row.get("turns") or []:
        if isinstance(turn, dict):
            turns.append((str(turn.get("role", "")), str(turn.get("text", ""))))
    figures = []
    for name, value in row.items():
        if name in _NOT_FIGURES or value is None:
            continue
        if isinstance(value, str) and len(value) > 60:
            texts.append((name, value))
        else:
            figures.append((name, _words(value)))
    return Sample(row["step"], tuple(texts), tuple(turns), tuple(figures))


def _words(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
