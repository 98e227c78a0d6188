"""One part of an evaluation as its report shows it: what kind of thing was measured, in sentences,
tables and pictures. Whatever measures makes a `Section`; `eval.report` writes them all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def with_interval(estimate: float, low: float, high: float) -> str:
    """A figure with its interval as tables show it, without a sign before zeros."""
    shown = [f"{round(value, 3) + 0.0:.3f}" for value in (estimate, low, high)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under columns, as text that is shown as it is; `title` stands above."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows, start=1):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.title!r}, row {number}: expected {len(self.columns)} cells, "
                    f"found {len(row)}"
                )

    @classmethod
    def of(cls, title: str, rows: Sequence[Mapping[str, str]]) -> "Table":
        """The table of rows that name their columns; all rows have those of the first."""
        columns = tuple(rows[0]) if rows else ()
        for number, row in enumerate(rows, start=1):
            if tuple(row) != columns:
                raise ValueError(
                    f"table {title!r}, row {number}: expected the columns {list(columns)}, found "
                    f"{list(row)}"
                )
        return cls(title, columns, tuple(tuple(row.values()) for row in rows))

    def as_rows(self) -> list[dict[str, str]]:
        """Each row as its cells by column."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a report.

    `text` is sentences, a paragraph each. `plots` are PNG files by what they show. `figures` goes
    into report.json as it is: numbers, texts, lists and objects of these.
    """

    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: Mapping[str, Path] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
