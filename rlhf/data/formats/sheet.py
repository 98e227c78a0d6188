"""Sheets for people without a tool: pair_id, prompt, response_a, response_b, preference (a, b, tie,
skip), annotator, comment.

A tie, a skip and an empty preference give no pair: they are set aside.

LMSYS's battles of two models are such tables too, with the turns of a conversation as JSON texts
and a column for each outcome:

    {"prompt": '["Hi"]', "response_a": '["Hello"]', "response_b": '["What?"]',
     "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0, "model_a", "model_b"}

There a conversation of several turns is set aside like a tie: each model answered its own earlier
answers, so the last ones do not follow the same conversation.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from rlhf.data.calls import is_nothing
from rlhf.data.formats.base import (
    Format,
    Several,
    Use,
    of_two,
    prompt_or_nothing,
)
from rlhf.data.formats.draft import Draft, Writer, plain_text, shown_pair
from rlhf.data.formats.values import CONTENT
from rlhf.data.rows import Chat, Row, RowError, finite, optional_text, text_of, text_or_chat
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

# ---- battles ----

_TEXTS = ("prompt", "response_a", "response_b")
_WINNERS = ("winner_model_a", "winner_model_b", "winner_tie")
_TIE = 3  # what `_outcome` calls one


def _listed(value: Any) -> list[Any] | None:
    """The turns of a column; None for anything but a list, or the JSON text of one."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, list) else None


def _turns(row: Row) -> dict[str, list[Any]]:
    """The questions, and each model's answers to them, by column; columns of plain texts are one
    turn each. Raises RowError.
    """
    lists = {key: _listed(row[key]) for key in _TEXTS}
    if all(turns is None for turns in lists.values()):
        return {key: [row[key]] for key in _TEXTS}
    out: dict[str, list[Any]] = {}
    for key, turns in lists.items():
        if not turns:
            raise RowError(
                f"key {key!r}: expected the turns as a list, or as its JSON text, found "
                f"{describe(row[key])}"
            )
        out[key] = turns
    counts = [len(turns) for turns in out.values()]
    if len(set(counts)) > 1:
        raise RowError(
            f"keys {', '.join(map(repr, _TEXTS))}: expected as many turns in each, found "
            f"{', '.join(map(str, counts))}"
        )
    return out


def _first(turns: Mapping[str, list[Any]], key: str) -> str:
    """The first turn of a column. Raises RowError for null and other things that are no text."""
    name = f"{key}[0]"
    return text_of({name: turns[key][0]}, name)


def _prompt(row: Row) -> Chat:
    """The first question: what follows it was asked of one model's answer. Raises RowError."""
    return [{"role": "user", "content": _first(_turns(row), "prompt")}]


def _outcome(row: Row) -> int:
    """1 or 2 for the model that won, 3 for a tie. Raises RowError."""
    won = []
    for place, key in enumerate(_WINNERS, start=1):
        flag = 0.0 if is_nothing(row.get(key)) else finite(row[key])
        if flag not in (0.0, 1.0):
            raise RowError(f"key {key!r}: expected 0 or 1, found {describe(row[key])}")
        if flag:
            won.append(place)
    if len(won) != 1:
        raise RowError(
            f"keys {', '.join(map(repr, _WINNERS))}: expected 1 in one of them, found it in "
            f"{len(won)}"
        )
    return won[0]


def _pairs(row: Row) -> Several:
    turns, outcome = _turns(row), _outcome(row)
    if outcome == _TIE:
        return Several(set_aside=["a tie: winner_tie is 1"])
    count = len(turns["prompt"])
    if count > 1:
        reason = f"{count} turns: the last answers do not follow the same conversation"
        return Several(set_aside=[reason])
    first, second = (_first(turns, side) for side in _TEXTS[1:])
    return Several([of_two(row, _prompt(row), first, second, outcome)])


ARENA = Format(
    "arena",
    (*_TEXTS, *_WINNERS[:2]),
    "prompt, response_a, response_b (turns as JSON texts), winner_model_a, winner_model_b, "
    "winner_tie (1 for what came out)",
    pairs=_pairs,
    prompt=_prompt,
    consumed=("prompt",),
    answers=(*_TEXTS[1:], *_WINNERS),
)
