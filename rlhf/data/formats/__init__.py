"""Formats of data files, a module each or a few related ones: recognised by their columns, turned
into what stages use (base.Use), and written from the toolkit's own columns (draft.py).

A new format is a `Format` in a module here, named in FORMATS (and in conf.data.DataFormat); its
writers are named in rlhf/data/targets.py (and in conf.data.DataTarget). All are pure functions
over rows (dictionaries). Kinds of file (Parquet, Excel ...) are in rlhf/data/files.py and
rlhf/data/writing.py. Not read: pictures, videos and sounds.

A row has the first format that fits and leaves no column of its content unread (unread.py).
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from rlhf.data.formats import (
    argilla,
    chats,
    compared,
    comparisons,
    label_studio,
    mt_bench,
    openai,
    questions,
    sheet,
    trl,
    turns,
)
from rlhf.data.formats.base import Format, Made, Several, Use
from rlhf.data.formats.names import JUDGEMENTS, is_known, plain
from rlhf.data.formats.unread import remedies, texts_in, unread_columns
from rlhf.data.rows import Row, RowError
from rlhf.process.wording import nearest

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
    "remedies",
    "texts_in",
    "unread_columns",
]

# The most particular first: the first format that fits a row is the file's.
FORMATS: tuple[Format, ...] = (
    label_studio.LABEL_STUDIO_RANKER,
    label_studio.LABEL_STUDIO,
    argilla.ARGILLA,
    turns.MESSAGE_TREE,
    comparisons.HH_RLHF,
    comparisons.HH_RLHF_MESSAGES,
    comparisons.SHP,
    comparisons.NECTAR,
    mt_bench.MT_BENCH_JUDGMENT,
    mt_bench.MT_BENCH_ANSWER,
    comparisons.ALPACA_EVAL_ANNOTATION,
    comparisons.REWARDBENCH,
    sheet.LABEL_SHEET,
    sheet.ARENA,
    compared.SUMMARIES,
    compared.RATED,
    compared.COMPARED,
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
    turns.VERIFIABLE,
    turns.DIALOGUE,
    openai.MESSAGES,
    chats.SHAREGPT,
    openai.XLAM,
    comparisons.ALPACA_EVAL,
    chats.ALPACA,
    questions.QUESTION_PREFERENCE,
    questions.QUESTION_JUDGED,
    questions.QUESTION_ANSWER,
    trl.PROMPT,
    trl.TEXT,
    questions.QUESTION,
)


def by_name(name: str) -> Format:
    return next(f for f in FORMATS if f.name == name)


def reading(use: Use) -> list[Format]:
    """The formats that can be turned into `use`."""
    return [f for f in FORMATS if f.reads(use)]


def detect(row: Row, use: Use | None = None) -> Format | None:
    """The format that a row's columns show, among those for `use` when it is given; None when none
    fits. Of several the first one that reads all of the row's content.

    Names count in any case: a row {"Prompt": ...} has the format of {"prompt": ...}.
    """
    fitting = _fitting(row, use)
    for format_ in fitting:
        with suppress(RowError):  # another one may read the row
            if not unread_columns(format_, row, use):
                return format_
    if fitting:
        return fitting[0]
    lowered = _lower(row)
    if lowered.keys() == row.keys():
        return None
    found = detect(lowered, use)
    return None if found is None else _of_lower(found)


def _fitting(row: Row, use: Use | None) -> list[Format]:
    known = FORMATS if use is None else reading(use)
    return [f for f in known if row.keys() >= set(f.keys) and f.test(row)]


def _lower(row: Row) -> dict[str, Any]:
    """A row with the names of its columns in lower case; as it is where two would be the same."""
    out = {plain(str(key)): value for key, value in row.items()}
    if len(out) != len(row):
        return dict(row)
    return out


def _of_lower(format_: Format) -> Format:
    """`format_` for rows whose columns have capitals."""

    def lowered(function: Callable[[Row], Any] | None) -> Any:
        return None if function is None else lambda row: function(_lower(row))

    def columns(row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
        consumed, answers = format_.taken(_lower(row))
        return _names(row, consumed), _names(row, answers)

    return replace(
        format_,
        sft=lowered(format_.sft),
        pair=lowered(format_.pair),
        pairs=lowered(format_.pairs),
        unpaired=lowered(format_.unpaired),
        prompt=lowered(format_.prompt),
        find_columns=columns,
        not_content=lambda row: _names(row, format_.not_content(_lower(row))),
        extra=lowered(format_.extra),
        note=lowered(format_.note),
    )


def _names(row: Row, lower: tuple[str, ...]) -> tuple[str, ...]:
    """A row's own names of columns in lower case."""
    return tuple(key for key in row if plain(str(key)) in lower)


# the plainest format of each kind, for rows that have nothing in common with any
_PLAINEST = {
    None: trl.PROMPT_COMPLETION,
    Use.sft: trl.PROMPT_COMPLETION,
    Use.preference: trl.PREFERENCE,
    Use.unpaired: trl.UNPAIRED,
    Use.prompt: trl.PROMPT,
}


def nearest_format(row: Row, use: Use | None) -> tuple[Format, str, str | None]:
    """The format for `use` (any for None) that lacks the fewest columns, the plainer of equals; the
    first column that it lacks, and the row's column that may be that one, misspelt.
    """
    own = [key for key in row if isinstance(key, str) and not is_known(key)]

    def misspelt(format_: Format, key: str) -> str | None:
        return nearest(key, [name for name in own if name not in format_.keys], cutoff=0.8)

    def distance(format_: Format) -> tuple[float, int]:
        # a column that is there under a misspelt name counts half
        missing = [key for key in format_.keys if key not in row]
        cost = sum(0.5 if misspelt(format_, key) else 1.0 for key in missing)
        return cost / len(format_.keys), -FORMATS.index(format_)

    known = FORMATS if use is None else reading(use)
    best = min((f for f in known if f.keys), key=distance)
    if distance(best)[0] > 0.5:  # most of its columns are missing
        best = _PLAINEST[use]
    missing = next((key for key in best.keys if key not in row), "")
    return best, missing, misspelt(best, missing)


# by which an annotation tool's rows say that a text was rejected
_VERDICTS = ("accept", "reject", "ignore", "accepted", "rejected", "approved")


def judging_key(row: Row) -> str | None:
    """The column by which a row says whether its text or answer is good: true or false, or a tool's
    word for it (Prodigy's answer: accept, reject, ignore); None for other rows.
    """
    for key, value in row.items():
        word = plain(str(key))
        if word in JUDGEMENTS and isinstance(value, bool):
            return str(key)
        if word in ("answer", "status", "verdict") and value in _VERDICTS:
            return str(key)
    return None
