"""What one row of a data file holds: texts, chats, margins and judgements by key. A row that
doesn't fit raises `RowError`, which says why.
"""

import math
from collections.abc import Mapping
from typing import Any

from rlhf.data.calls import checked_text, missing
from rlhf.data.messages import chat_of_list
from rlhf.process.wording import describe
from rlhf.types import Message, RowError

Row = Mapping[str, Any]
Chat = list[Message]


def value_of(row: Row, key: str) -> Any:
    """The value of a required key. Raises RowError naming the nearest key there is."""
    if key not in row:
        raise missing(key, list(row))
    return row[key]


def text_of(row: Row, key: str, *, empty: bool = False) -> str:
    """A required text. Raises RowError."""
    return checked_text(value_of(row, key), key, empty=empty)


def optional_text(row: Row, key: str) -> str:
    """An optional text; absent, null and empty are the same."""
    if row.get(key) is None:
        return ""
    return text_of(row, key, empty=True)


def chat_of(
    row: Row, key: str, value: Any = None, *, role: str = "role", content: str = "content"
) -> Chat:
    """A list of messages as the one record (rlhf/data/messages.py). Raises RowError naming the
    message.
    """
    messages = value_of(row, key) if value is None else value
    return chat_of_list(messages, key, role=role, content=content)


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


def annotator_of(value: Any) -> dict[str, str]:
    """The field `annotator` from a number, a name, or an object that holds an email, a username or
    an id; nothing for null.
    """
    if isinstance(value, Mapping):
        value = value.get("email") or value.get("username") or value.get("id")
    if value is None:
        return {}
    return {"annotator": str(value)}
