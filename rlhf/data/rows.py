"""What one row of a data file holds: texts, chats, margins and judgements by key. A row that
doesn't fit raises `RowError`, which says why.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from rlhf.process.wording import describe, nearest, nearest_hint

Row = Mapping[str, Any]
Message = dict[str, str]
Chat = list[Message]

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_HALVES = re.compile("[\ud800-\udfff]")
_ROLES = ("system", "user", "assistant", "tool", "developer")


class RowError(ValueError):
    """Why a row doesn't fit: the key, what was expected, and what the row holds instead."""


def value_of(row: Row, key: str) -> Any:
    """The value of a required key. Raises RowError naming the nearest key there is."""
    if key not in row:
        keys = [k for k in row if isinstance(k, str)]
        hint = nearest_hint(key, keys, "; nearest key: '", "'")
        raise RowError(
            f"key {key!r}: expected, but missing; found keys: "
            f"{', '.join(map(str, row)) or 'none'}{hint}"
        )
    return row[key]


def text_of(row: Row, key: str, *, empty: bool = False) -> str:
    """A required text. Raises RowError."""
    value = value_of(row, key)
    if not isinstance(value, str):
        raise RowError(f"key {key!r}: expected text, found {describe(value)}")
    if not value and not empty:
        raise RowError(f"key {key!r}: expected text, found an empty one")
    if _HALVES.search(value):
        raise RowError(
            f"key {key!r}: expected text, found half of a surrogate pair (U+D800 to U+DFFF), "
            "which no encoding holds"
        )
    return value


def optional_text(row: Row, key: str) -> str:
    """An optional text; absent, null and empty are the same."""
    if row.get(key) is None:
        return ""
    return text_of(row, key, empty=True)


def chat_of(
    row: Row, key: str, value: Any = None, *, role: str = "role", content: str = "content"
) -> Chat:
    """A list of messages, as {"role", "content"} with transformers' role names. Raises RowError
    naming the message.
    """
    messages = value_of(row, key) if value is None else value
    if not isinstance(messages, list) or not messages:
        raise RowError(f"key {key!r}: expected a list of messages, found {describe(messages)}")
    return [_message(m, f"{key}[{i}]", role, content) for i, m in enumerate(messages)]


def _message(message: Any, where: str, role: str, content: str) -> Message:
    if not isinstance(message, Mapping):
        raise RowError(
            f"key {where!r}: expected an object with {role!r} and {content!r}, found "
            f"{describe(message)}"
        )
    try:
        speaker, text = text_of(message, role), text_of(message, content, empty=True)
    except RowError as error:
        raise RowError(f"{where}: {error}") from None
    known = dict.fromkeys(_ROLES) if role == "role" else _SPEAKERS
    if speaker not in known:
        raise RowError(
            f"{where}: key {role!r}: expected one of {', '.join(known)}, found {speaker!r}; "
            f"nearest: {nearest(speaker, list(known))!r}"
        )
    return {"role": speaker if role == "role" else _SPEAKERS[speaker], "content": text}


def text_or_chat(row: Row, key: str) -> str | Chat:
    """A text, or a list of messages. Raises RowError."""
    value = value_of(row, key)
    if isinstance(value, str):
        return text_of(row, key)
    if not isinstance(value, list):
        raise RowError(f"key {key!r}: expected text or a list of messages, found {describe(value)}")
    return chat_of(row, key, value)


def answer_of(row: Row, key: str) -> str | Chat:
    """A response: a text, or messages that end with an assistant's. Raises RowError."""
    value = text_or_chat(row, key)
    if isinstance(value, list) and value[-1]["role"] != "assistant":
        raise RowError(
            f"key {key!r}: expected the last message to be an assistant's, found role "
            f"{value[-1]['role']!r}"
        )
    return value


def without_answer(chat: Chat, key: str) -> Chat:
    """A conversation as a prompt: without the assistant's turn that ends it, where there is one.
    Raises RowError when nothing is left.
    """
    prompt = chat[:-1] if chat[-1]["role"] == "assistant" else chat
    if not prompt:
        raise RowError(
            f"key {key!r}: expected a message before the assistant's, found the assistant's alone"
        )
    return prompt


def finite(value: Any) -> float | None:
    """A finite number, also one that a table has as text; None for anything else, true and false
    included.
    """
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def number_of(row: Row, key: str) -> float:
    """A required finite number, also as a table's text. Raises RowError."""
    value = value_of(row, key)
    number = finite(value)
    if number is None:
        raise RowError(f"key {key!r}: expected a finite number, found {describe(value)}")
    return number


def margin_of(row: Row) -> float | None:
    """``margin``, or the difference of ``score_chosen`` and ``score_rejected``; None without
    either. Raises RowError.
    """

    def present(key: str) -> bool:
        return row.get(key) is not None and row[key] != ""

    if present("margin"):
        return number_of(row, "margin")
    if present("score_chosen") and present("score_rejected"):
        return number_of(row, "score_chosen") - number_of(row, "score_rejected")
    return None


_JUDGEMENTS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def judgement_of(row: Row, key: str) -> bool:
    """Whether a row's answer is good: true or false, 1 or 0, also as a table's text. Raises
    RowError.
    """
    value = value_of(row, key)
    good = None
    if isinstance(value, (bool, int, float, str)):
        good = _JUDGEMENTS.get(str(value).strip().lower())
    if good is None:
        raise RowError(f"key {key!r}: expected true or false (or 1 or 0), found {describe(value)}")
    return good
