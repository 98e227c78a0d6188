"""Rows by hand for the tests of the data report."""

from collections.abc import Sequence
from typing import Any

from rlhf.data.formats import Use
from rlhf.data.prepare.items import Item
from rlhf.data.report.records import Finding, Section, Settings

PREFERENCE = Settings(kind=Use.preference)
SFT = Settings(kind=Use.sft)
UNPAIRED = Settings(kind=Use.unpaired)

LONG = (
    "the quick brown fox jumps over the lazy dog while seven wizards watch from a quiet hill "
    "above the old mill and drink their tea in silence"
)


def items(*rows: dict[str, Any], origin: str = "a.jsonl", split: str = "train") -> list[Item]:
    """Rows numbered from 1."""
    return [Item(row, origin, number, split) for number, row in enumerate(rows, start=1)]


def texts(*values: str, **place: str) -> list[Item]:
    return items(*({"text": value} for value in values), **place)


def pair_rows(*pairs: tuple[str, str], prompt: str = "") -> list[Item]:
    return items(
        *({"prompt": prompt, "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs)
    )


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def found(section: Section, check: str) -> Finding:
    """The section's finding of a check. Raises KeyError without one."""
    return {f.check: f for f in section.findings}[check]


def rows_of(section: Section, check: str) -> list[int]:
    """The row numbers that a check names; [] when it found nothing."""
    return next(([r.row for r in f.rows] for f in section.findings if f.check == check), [])


def checks(section: Section) -> list[str]:
    return [f.check for f in section.findings]


def numbers(rows: Sequence[Item]) -> list[int]:
    return [row.number for row in rows]
