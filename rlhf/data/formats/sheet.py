"""Sheets for people without a tool: pair_id, prompt, response_a, response_b, preference (a, b, tie,
skip), annotator, comment.

A tie, a skip and an empty preference give no pair: they are set aside.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from rlhf.data.formats.base import (
    Format,
    Several,
    Use,
    of_two,
    prompt_or_nothing,
)
from rlhf.data.formats.draft import Draft, Writer, plain_text, shown_pair
from rlhf.data.formats.values import CONTENT
from rlhf.data.rows import Row, RowError, optional_text, text_of, text_or_chat
from rlhf.process.wording import describe

SIDES = ("a", "b")  # what the column preference calls the two responses
NO_SIDE = ("tie", "skip")  # what else it may hold


def response_column(name: str) -> str:
    """The column of the response called `name`: a, b, or a number from 1."""
    return f"response_{name}"


def response_columns(row: Mapping[str, Any]) -> list[str]:
    """The columns of the responses that a row has: response_a and response_b, or response_1,
    response_2 ... in the order of their numbers.
    """
    pair = [name for name in map(response_column, SIDES) if name in row]
    if pair:
        return pair
    numbered = [name for name in row if re.fullmatch(r"response_[1-9][0-9]*", name)]
    return sorted(numbered, key=lambda name: int(name.removeprefix("response_")))


def _pairs_sheet(row: Row) -> Several:
    preference = optional_text(row, "preference").strip().lower()
    if not preference:
        return Several(set_aside=["not labelled yet"])
    if preference in NO_SIDE:
        return Several(set_aside=[f"a {preference}"])
    if preference not in SIDES:
        raise RowError(
            f"key 'preference': expected a, b, tie or skip, found {describe(row['preference'])}"
        )
    prompt = prompt_or_nothing(row, "prompt")
    first, second = (text_of(row, response_column(side)) for side in SIDES)
    return Several([of_two(row, prompt, first, second, SIDES.index(preference) + 1)])


def _write_pair(draft: Draft) -> list[dict[str, Any]]:
    prompt = plain_text(draft.columns["prompt"], "prompt", empty=True)
    for side in ("chosen", "rejected"):
        plain_text(draft.columns[side], side)
    first, second, position = shown_pair(draft)
    annotator, comment = draft.take("annotator", ""), draft.take("comment", "")
    content = json.dumps([prompt, *sorted((first, second))])
    pair_id = draft.take("pair_id", hashlib.sha256(content.encode()).hexdigest()[:16])
    row = {
        "pair_id": pair_id,
        "prompt": prompt,
        response_column(SIDES[0]): first,
        response_column(SIDES[1]): second,
        "preference": SIDES[position - 1],
        "annotator": annotator,
        "comment": comment,
    }
    for key, value in draft.margin().items():
        row[key] = repr(float(value))
    return [row]


def _write_table(draft: Draft) -> list[dict[str, Any]]:
    """Columns as they are, true and false in words. Raises RowError for conversations."""
    several = len(draft.columns) > 1
    row = {
        key: plain_text(value, key, empty=key == "prompt" and several)
        for key, value in draft.columns.items()
        if key in CONTENT
    }
    if "label" in draft.columns:
        row["label"] = "true" if draft.columns["label"] else "false"
    return [row]


LABEL_SHEET = Format(
    "label_sheet",
    ("prompt", "response_a", "response_b", "preference"),
    "prompt, response_a, response_b, preference (a, b, tie, skip; and pair_id, annotator, comment)",
    pairs=_pairs_sheet,
    prompt=lambda row: text_or_chat(row, "prompt"),
    consumed=("prompt",),
    answers=("response_a", "response_b", "preference", "margin"),
)
WRITE_SHEET: dict[Use, Writer] = {
    Use.sft: _write_table,
    Use.preference: _write_pair,
    Use.unpaired: _write_table,
    Use.prompt: _write_table,
}
