"""Battles of two models as LMSYS publishes them for a competition: the turns of a conversation as
JSON texts, and a column for each outcome.

    {"prompt": "[\"Hi\"]", "response_a": "[\"Hello\"]", "response_b": "[\"What?\"]",
     "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0, "model_a", "model_b"}

A tie gives no pair and is set aside. So is a conversation of several turns: each model answered its
own earlier answers, so the last ones do not follow the same conversation.
"""

import json
from collections.abc import Mapping
from typing import Any

from rlhf.data.calls import is_nothing
from rlhf.data.formats.base import Format, Several, of_two
from rlhf.data.rows import Chat, Row, RowError, finite, text_of
from rlhf.process.wording import describe

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
