"""Steps that look at each row by itself, one after the other over a part of the rows: what a
process does to which parts are handed out.

Such a step (conf: `rowwise`) puts new columns into an item and never changes the ones that it has,
and counts in context.tallies alone, from which its figures are made when all parts are through.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.data.formats import Use
from rlhf.data.prepare import store
from rlhf.data.prepare.items import Context, Item
from rlhf.data.prepare.plan import Planned
from rlhf.data.prepare.steps import KEYS, STEPS

PART = 128  # rows


@dataclass(slots=True)
class StepPart:
    """What a step did to a part of the rows."""

    rows_in: int
    rows_out: int = 0
    # lines of the rows that came out, where they are kept
    kept: list[str] = field(default_factory=list)
    rejected: str = ""  # lines of those that it left out
    reasons: list[str] = field(default_factory=list)  # of those, in order
    tallies: Counter[Any] = field(default_factory=Counter)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Steps:
    """Neighbouring steps of a pipeline, to be called with a part of the rows."""

    steps: Sequence[Planned]
    kind: Use
    folder: Path
    keep: bool  # whether each step's rows are written
    split_done: bool
    following: Planned | None  # the step that takes what comes out

    def __call__(self, items: list[Item]) -> tuple[list[Item], list[StepPart]]:
        """The items that come out of the last step, and what each step did."""
        lines: dict[int, tuple[dict[str, Any], str]] = {}  # of the items as they came last
        parts = []
        for step in self.steps:
            items, part = self._apply(step, items)
            if self.keep:
                part.kept = [_line(item, lines) for item in items]
            parts.append(part)
        if self.following is not None and self.following.name in KEYS:
            key_of, options = KEYS[self.following.name], self.following.options
            for item in items:
                item.key = key_of(options, item.columns, self.kind)
        return items, parts

    def _apply(self, step: Planned, items: list[Item]) -> tuple[list[Item], StepPart]:
        began = time.perf_counter()
        part, rejected = StepPart(len(items)), []

        def reject(item: Item, reason: str) -> None:
            part.reasons.append(reason)
            row = store.rejected_row(step.name, reason, item.origin, item.number, item.columns)
            rejected.append(store.line(row))

        context = Context(self.kind, step.seed, self.folder, self.split_done, reject)
        out = list(STEPS[step.name](step.options, iter(items), context))
        part.rows_out, part.rejected, part.tallies = len(out), "".join(rejected), context.tallies
        part.seconds = time.perf_counter() - began
        return out, part


def _line(item: Item, lines: dict[int, tuple[dict[str, Any], str]]) -> str:
    """An item's line; the same one where its columns are, which goes between processes once."""
    columns, text = lines.get(id(item), (None, ""))
    if columns is not item.columns:
        text = store.item_line(item)
        lines[id(item)] = item.columns, text
    return text
