"""What a detector returns, and what the report is made of."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from conf.choices import TaskClass
from rlhf.data.formats import Use
from rlhf.data.prepare.items import Item, joined
from rlhf.data.report.texts import excerpt

VERSION = 1  # of report.json; raised whenever a field changes its name or meaning


class Severity(Enum):
    """How a finding is meant."""

    info = "info"  # worth knowing
    warn = "warn"  # likely to hurt what is trained
    fail = "fail"  # wrong for certain


class StandardResult(Enum):
    passed = "pass"
    failed = "fail"
    unknown = "not measurable"


@dataclass(frozen=True, slots=True)
class Named:
    """A row that a finding names."""

    file: str
    row: int  # from 1
    split: str  # train, eval
    note: str  # what is wrong in this row, such as the row that it repeats
    excerpt: str  # the start of its text, on one line, without control characters


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong or worth knowing, the rows that show it, and the option that repairs
    it.
    """

    check: str
    severity: Severity
    message: str
    remedy: str
    total: int = 0  # rows that show it; 0: a matter of all rows together
    rows: tuple[Named, ...] = ()  # the first of them


@dataclass(frozen=True, slots=True)
class Standard:
    """A quality standard with its verdict."""

    name: str
    verdict: StandardResult
    found: str
    expected: str
    source: str  # who sets it
    remedy: str


@dataclass(frozen=True, slots=True)
class Table:
    """Figures for people: cells are texts or numbers, as many a row as there are columns."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | float | None, ...], ...]


@dataclass(frozen=True, slots=True)
class Histogram:
    """Values of several series over the same bins. Titles and names are the report's own words,
    never a row's.
    """

    title: str
    unit: str
    series: Mapping[str, Sequence[float]]
    mark: float | None = None  # a value to draw a line at
    mark_name: str = "limit"


@dataclass(frozen=True, slots=True)
class Bars:
    """One bar a label. Labels are the report's own words, never a row's."""

    title: str
    unit: str
    labels: tuple[str, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A small copy of a picture, for the page."""

    jpeg: bytes
    width: int  # pixels
    height: int
    place: str  # the first row that shows the picture
    split: str
    size: str  # of the picture itself


@dataclass(frozen=True, slots=True)
class Section:
    """What one detector says: figures for programs, findings, and tables and plots for people."""

    name: str  # its key in report.json
    title: str
    figures: Mapping[str, Any]  # as JSON can hold them
    findings: tuple[Finding, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Histogram | Bars, ...] = ()
    unmeasured: str | None = None  # why there is nothing to say
    thumbnails: tuple[Thumbnail, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What every detector may need beside the rows."""

    kind: Use
    limit: int = 1024  # tokens
    task: TaskClass | None = None
    named: int = 100  # rows that a finding names
    seed: int = 0
    near: float = 0.8  # as option threshold of step near_duplicates
    sample: int = 20_000  # rows at most that clusters and languages are counted on
    tokenizer: Any = None
    folder: Path | None = None  # below which rows name their pictures


@dataclass(frozen=True, slots=True)
class Report:
    """The whole examination."""

    kind: str
    rows: Mapping[str, int]  # by split
    sections: tuple[Section, ...]
    standards: tuple[Standard, ...]
    files: Mapping[str, Path] = field(default_factory=dict)  # where it was written

    def findings(self) -> list[Finding]:
        """All findings, the gravest first, else in the order of the sections."""
        order = {Severity.fail: 0, Severity.warn: 1, Severity.info: 2}
        return sorted(
            (f for section in self.sections for f in section.findings),
            key=lambda f: order[f.severity],
        )


class Marked:
    """Rows that show a problem, each with what is wrong in it: all are counted, and the first
    `most` are kept to be named, so that a problem of all rows takes no more memory than one of few.
    """

    def __init__(self, most: int, rows: Iterable[tuple[Item, str]] = ()) -> None:
        self._most, self._count = most, 0
        self.first: list[tuple[Item, str]] = []
        for item, note in rows:
            self.add(item, note)

    def __len__(self) -> int:
        return self._count

    def add(self, item: Item, note: str) -> None:
        """One more row."""
        self._count += 1
        if len(self.first) < self._most:
            self.first.append((item, note))

    def named(self) -> tuple[Named, ...]:
        """The rows that were kept."""
        return tuple(
            Named(item.origin, item.number, item.split, note, excerpt(joined(item.columns)))
            for item, note in self.first
        )


def finding(
    check: str, severity: Severity, message: str, remedy: str, rows: Marked
) -> tuple[Finding, ...]:
    """A finding about `rows`; nothing when there are none."""
    if len(rows):
        return (Finding(check, severity, message, remedy, len(rows), rows.named()),)
    return ()
