"""What a part of the bench measured: figures of every turn in a file, spreads of them in tables."""

import datetime
import json
import os
import platform
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.speed.protocol import Figures
from rlhf.types import UserError

PAGE = Path("docs/project/performance.md")
BEGIN, END = "<!-- figures of make bench -->\n", "<!-- end of the figures -->\n"


@dataclass(frozen=True, slots=True)
class Spread:
    """Least, median and largest of a figure over the turns."""

    least: float
    median: float
    most: float

    @staticmethod
    def of(values: Iterable[float]) -> "Spread":
        """Raises ValueError where there are none."""
        found = sorted(values)
        if not found:
            raise ValueError("no turn was measured")
        return Spread(found[0], statistics.median(found), found[-1])

    def __str__(self) -> str:
        return f"{number(self.median)} [{number(self.least)}, {number(self.most)}]"


def number(value: float) -> str:
    """With about three digits."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def spread(rows: Sequence[Figures], name: str, per: str | None = None) -> Spread:
    """Of a figure, or of its ratio to the figure `per` of the same turn."""
    return Spread.of(row[name] / (row[per] if per else 1.0) for row in rows)


def ratios(
    rows: Sequence[Figures], others: Sequence[Figures], figure: Callable[[Figures], float]
) -> Spread:
    """Of the figure in neighbouring turns: rows / others."""
    pairs = zip(rows, others, strict=True)
    return Spread.of(figure(one) / figure(other) for one, other in pairs)


@dataclass(frozen=True, slots=True)
class Result:
    """A part of the bench: what each of its contestants did in each turn."""

    part: str
    command: str
    date: str
    machine: str
    turns: dict[str, list[Figures]]
    facts: dict[str, Any]  # of the case, for the table's heading

    @staticmethod
    def now(
        part: str, command: str, turns: dict[str, list[Figures]], facts: Mapping[str, Any]
    ) -> "Result":
        date = datetime.date.today().isoformat()
        return Result(part, command, date, machine(), turns, dict(facts))

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.part}.json"
        held = {name: getattr(self, name) for name in self.__slots__}
        path.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
        return path

    @staticmethod
    def read(path: Path) -> "Result":
        return Result(**json.loads(path.read_text(encoding="utf-8")))


def read_all(folder: Path) -> dict[str, Result]:
    """The parts that were measured, by name. Raises UserError where there are none."""
    found = [Result.read(path) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise UserError(f"{folder} holds no figures: run `python -m benchmarks.speed` first.")
    return {result.part: result for result in found}


def machine() -> str:
    """Cores that this process may use, and their name."""
    names = re.findall(
        r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE
    )
    name = names[0] if names else "unknown processor"
    return f"{len(os.sched_getaffinity(0))} x {name}, {platform.system()}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def write_page(lines: Sequence[str], page: Path = PAGE) -> None:
    """Put the tables in their place. Raises ValueError where the page has none."""
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{page} has no place for the figures: {BEGIN.strip()}")
    block = "\n".join([BEGIN.strip(), *lines, END.strip(), ""])
    page.write_text(pattern.sub(lambda _: block, text), encoding="utf-8")
