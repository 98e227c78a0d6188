"""What the tests of preparation steps share: rows as items, and a context that keeps what a step
rejects.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.data.formats import Use
from rlhf.data.prepare.items import Context, Item

Columns = dict[str, Any]


def items(
    rows: Sequence[Columns], origin: str = "rows.jsonl", split: str = "train"
) -> Iterator[Item]:
    """Rows of one file, each its own item."""
    return iter(
        [Item(dict(row), origin, number, split) for number, row in enumerate(rows, start=1)]
    )


@dataclass
class Ran:
    """What a step gave and what it left out."""

    kept: list[Item]
    rejected: list[tuple[Item, str]]
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> list[Columns]:
        return [item.columns for item in self.kept]

    @property
    def numbers(self) -> list[int]:
        return [item.number for item in self.kept]

    @property
    def left_out(self) -> dict[int, str]:
        """Reason by row number."""
        return {item.number: reason for item, reason in self.rejected}


def run(
    step: Any,
    options: Any,
    rows: Sequence[Columns] | Iterator[Item],
    folder: Path,
    kind: Use = Use.preference,
    **context: Any,
) -> Ran:
    """Run a step on rows (or on items, given as an iterator) in `folder`."""
    rejected: list[tuple[Item, str]] = []
    given = items(rows) if isinstance(rows, (list, tuple)) else rows
    place = Context(
        kind,
        seed=context.pop("seed", 0),
        folder=folder,
        rejected=lambda item, reason: rejected.append((item, reason)),
        **context,
    )
    kept = list(step(options, given, place))
    return Ran(kept, rejected, place.figures)
