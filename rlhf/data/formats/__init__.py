"""Formats of data files, a module each or a few related ones: recognised by their columns, turned
into what stages use (base.Use), and written from the toolkit's own columns (draft.py).

A new format is a `Format` in a module here, named in FORMATS (and in conf.choices.DataFormat); its
writers are named in rlhf/data/targets.py (and in conf.choices.DataTarget). All are pure functions
over rows (dictionaries). Kinds of file (Parquet, Excel ...) are in rlhf/data/files.py and
rlhf/data/writing.py. Not read: pictures, videos and sounds.
"""

from collections.abc import Mapping
from typing import Any

from rlhf.data.formats import (
    argilla,
    chats,
    comparisons,
    label_studio,
    mt_bench,
    openai,
    sheet,
    trl,
)
from rlhf.data.formats.base import Format, Made, Several, Use
from rlhf.data.messages import texts_of_message
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

# The most particular first: the first format that fits a row is the file's.
FORMATS: tuple[Format, ...] = (
    label_studio.LABEL_STUDIO_RANKER,
    label_studio.LABEL_STUDIO,
    argilla.ARGILLA,
    comparisons.HH_RLHF,
    comparisons.SHP,
    comparisons.NECTAR,
    mt_bench.MT_BENCH_JUDGMENT,
    mt_bench.MT_BENCH_ANSWER,
    comparisons.ALPACA_EVAL_ANNOTATION,
    comparisons.REWARDBENCH,
    sheet.LABEL_SHEET,
    chats.ALPACA_PREFERENCE,
    chats.SHAREGPT_PREFERENCE,
    openai.OPENAI_PREFERENCE,
    openai.SWIFT_PREFERENCE,
    openai.REJECTED_MESSAGES,
    openai.CHOSEN_MESSAGES,
    trl.ULTRAFEEDBACK,
    trl.PREFERENCE,
    trl.IMPLICIT,
    trl.UNPAIRED,
    openai.MESSAGES_UNPAIRED,
    chats.SHAREGPT_UNPAIRED,
    chats.ALPACA_UNPAIRED,
    trl.PROMPT_COMPLETION,
    openai.MESSAGES,
    chats.SHAREGPT,
    openai.XLAM,
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
    return next((f for f in known if row.keys() >= set(f.keys) and f.test(row)), None)


def nearest_format(row: Row, use: Use) -> tuple[Format, str]:
    """The format for `use` that lacks the fewest columns, and the first column that it lacks."""

    def lacking(format_: Format) -> list[str]:
        return [k for k in format_.keys if k not in row]

    def distance(format_: Format) -> tuple[float, int, int]:
        # a column that is there under a misspelt name counts half
        others = [column for column in row if column not in format_.keys]
        cost = sum(0.5 if nearest(key, others) else 1.0 for key in lacking(format_))
        # the plainer of equals
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
        if value:
            return [value]
        return []
    if isinstance(value, PreferencePair):
        return texts_in([value.prompt, value.chosen, value.rejected, value.tools])
    if isinstance(value, JudgedAnswer):
        return texts_in([value.prompt, value.completion, value.tools])
    if isinstance(value, Mapping):
        if "role" in value and "content" in value:
            return texts_of_message(value)
        return texts_in(list(value.values()))
    if isinstance(value, (list, tuple)):
        return [text for part in value for text in texts_in(part)]
    return []
