"""Formats of data files: told apart by their columns, turned into what stages use (base.Use).

Pure functions over rows (dictionaries). Not read: tool calls and images.
"""

from collections.abc import Mapping
from typing import Any

from rlhf.data.formats import chats, comparisons, tools, trl
from rlhf.data.formats.base import Format, Made, Several, Use
from rlhf.data.rows import Row, RowError
from rlhf.process.wording import nearest
from rlhf.types import JudgedAnswer, PreferencePair

__all__ = [
    "FORMATS",
    "Format",
    "Made",
    "RowError",
    "Several",
    "Use",
    "by_name",
    "detect",
    "judging_key",
    "nearest_format",
    "reading",
    "texts_in",
]

# The most particular first: the first one that fits a row names the file.
FORMATS: tuple[Format, ...] = (
    tools.LABEL_STUDIO_RANKER,
    tools.LABEL_STUDIO,
    tools.ARGILLA,
    comparisons.HH_RLHF,
    comparisons.SHP,
    comparisons.NECTAR,
    comparisons.MT_BENCH_JUDGMENT,
    comparisons.MT_BENCH_ANSWER,
    comparisons.ALPACA_EVAL_ANNOTATION,
    comparisons.REWARDBENCH,
    tools.LABEL_SHEET,
    chats.ALPACA_PREFERENCE,
    chats.SHAREGPT_PREFERENCE,
    chats.SWIFT_PREFERENCE,
    trl.ULTRAFEEDBACK,
    trl.PREFERENCE,
    trl.IMPLICIT,
    trl.UNPAIRED,
    chats.MESSAGES_UNPAIRED,
    chats.SHAREGPT_UNPAIRED,
    chats.ALPACA_UNPAIRED,
    trl.PROMPT_COMPLETION,
    chats.MESSAGES,
    chats.SHAREGPT,
    comparisons.ALPACA_EVAL,
    chats.ALPACA,
    trl.PROMPT,
    trl.TEXT,
)


def by_name(name: str) -> Format:
    return next(f for f in FORMATS if f.name == name)


def reading(use: Use) -> list[Format]:
    """The formats that can be turned into `use`."""
    return [f for f in FORMATS if f.reads(use)]


def detect(row: Row, use: Use | None = None) -> Format | None:
    """The format that a row's columns show, among those for `use` when it is given; None when none
    fits.
    """
    known = FORMATS if use is None else reading(use)
    return next((f for f in known if all(k in row for k in f.keys) and f.test(row)), None)


def nearest_format(row: Row, use: Use) -> tuple[Format, str]:
    """The format for `use` that lacks the fewest columns, and the first column that it lacks."""

    def lacking(format_: Format) -> list[str]:
        return [k for k in format_.keys if k not in row]

    def distance(format_: Format) -> tuple[float, int, int]:
        # a column that is there under a misspelt name counts half
        cost = sum(
            0.5 if nearest(k, [c for c in row if c not in format_.keys]) else 1.0
            for k in lacking(format_)
        )
        # the plainer one of equals
        return cost / len(format_.keys), -len(format_.keys), -FORMATS.index(format_)

    best = min(reading(use), key=distance)
    return best, (lacking(best) or [""])[0]


def judging_key(row: Row) -> str | None:
    """The true/false column by which an unpaired preference row says whether its answer is good;
    None for other rows.
    """
    if not any(k in row for k in ("completion", "conversations", "messages", "output")):
        return None
    return next((k for k in ("label", "kto_tag") if isinstance(row.get(k), bool)), None)


def texts_in(value: Any) -> list[str]:
    """Every text of a converted record: strings, and the contents of messages."""
    if isinstance(value, str):
        return [value] if value else []
    if isinstance(value, PreferencePair):
        return texts_in([value.prompt, value.chosen, value.rejected])
    if isinstance(value, JudgedAnswer):
        return texts_in([value.prompt, value.completion])
    if isinstance(value, Mapping):
        return (
            texts_in(value["content"])
            if set(value) == {"role", "content"}
            else texts_in(list(value.values()))
        )
    return [t for v in value for t in texts_in(v)] if isinstance(value, (list, tuple)) else []
