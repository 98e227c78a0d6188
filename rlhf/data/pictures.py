"""Pictures in the messages of a row: which picture stands at which mark. A message that shows some
has a PICTURE_MARK in its content for each, and lists them as `images`.

    <image> in texts             the marks of the pictures in the row's column images (or image)
    parts of type image          the same, where messages have their content in parts
    neither                      the pictures begin the first user's message, as TRL and ms-swift
                                 have it

Marks and pictures have to be equally many. Texts beside pictures become messages. Only what is
asked shows pictures: an answer that does is refused.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from rlhf.data.formats.draft import is_transcript
from rlhf.data.formats.values import chats_of, is_conversation, on_messages
from rlhf.data.media import IMAGE_TEXT, given_pictures
from rlhf.data.picture_files import Pictures
from rlhf.data.rows import Chat, Row
from rlhf.types import PICTURE_MARK, JudgedAnswer, Message, PreferencePair, RowError

_ANSWERS = ("chosen", "rejected", "completion")
AT_BEGINNING = (
    "pictures without a mark in the texts stand at the beginning of the first user's message"
)


def with_pictures(made: Sequence[Any], row: Row, column: str | None) -> tuple[list[Any], list[str]]:
    """What a row gives (formats.base.Made), the pictures of its `column` at their marks, and notes
    on it. Raises RowError.
    """
    given = [] if column is None else given_pictures(row[column], column)
    out, notes = [], dict[str, None]()
    for one in made:
        value, told = _with_pictures(one.value, given, column or "images")
        out.append(replace(one, value=value))
        notes |= dict.fromkeys(told)
    return out, list(notes)


def in_turns(made: Sequence[Any]) -> list[Any]:
    """What a row gives, as messages. Raises RowError for whole texts, which have no turns."""
    return [replace(one, value=conversation(one.value)) for one in made]


def _with_pictures(value: Any, given: list[Any], column: str) -> tuple[Any, list[str]]:
    if given:
        value = conversation(value)
    messages = [message for chat in chats_of(value) for message in chat]
    inside = [image for message in messages for image in message.get("images", ())]
    waiting = sum(image is None for image in inside)
    notes = []
    if len(inside) > waiting and (given or waiting):
        raise RowError(
            f"key {column!r}: expected the pictures there or in the messages, found some in both"
        )
    if given or waiting:
        if given and not inside and not any(IMAGE_TEXT in m["content"] for m in messages):
            value = _at_beginning(value, len(given))
            notes.append(AT_BEGINNING)
        value = _filled(value, given, column, in_parts=waiting > 0)
    _check(value)
    return value, notes


def _filled(value: Any, given: list[Any], column: str, *, in_parts: bool) -> Any:
    """The value with a picture at each mark, in their order. Raises RowError."""

    def marks_of(message: Message) -> int:
        if in_parts:
            return len(message.get("images", ()))
        return message["content"].count(IMAGE_TEXT)

    messages = [message for chat in chats_of(value) for message in chat]
    marks = sum(map(marks_of, messages))
    if marks != len(given):
        what = "parts of type image" if in_parts else f"{IMAGE_TEXT} in its texts"
        raise RowError(
            f"key {column!r}: expected as many pictures as marks, found {len(given)} pictures and "
            f"{marks} marks ({what})"
        )
    left = iter(given)

    def fill(message: Message) -> Message:
        number = marks_of(message)
        if not number:
            return message
        content = message["content"]
        if not in_parts:
            _refuse_mark(content)
            content = content.replace(IMAGE_TEXT, PICTURE_MARK)
        images = [next(left) for _ in range(number)]
        return {**message, "content": content, "images": images}

    return on_messages(value, fill)


def _refuse_mark(text: str) -> None:
    if PICTURE_MARK in text:
        raise RowError(
            "expected texts without the character U+FFFC beside pictures, since it stands for one "
            "here"
        )


def _at_beginning(value: Any, number: int) -> Any:
    """The value with marks before the first user's text. Raises RowError where there is none."""
    found = False

    def mark(message: Message) -> Message:
        nonlocal found
        if found or message["role"] != "user":
            return message
        found = True
        return {**message, "content": IMAGE_TEXT * number + message["content"]}

    out = on_messages(value, mark)
    if not found:
        raise RowError("expected a user's message that shows the row's pictures, found none")
    return out


def _check(value: Any) -> None:
    """Raises RowError for an answer with a picture, and for the mark's own character in a text."""
    answers = _answers_of(value)
    for chat in chats_of(value):
        answers += [message for message in chat if message["role"] == "assistant"]
        for message in chat:
            if message["content"].count(PICTURE_MARK) != len(message.get("images", ())):
                _refuse_mark(PICTURE_MARK)
    if any(message.get("images") for message in answers):
        raise RowError(
            "expected pictures in what is asked, found one in an answer, which no model here writes"
        )


def _answers_of(value: Any) -> Chat:
    if isinstance(value, PreferencePair):
        sides: list[Any] = [value.chosen, value.rejected]
    elif isinstance(value, JudgedAnswer):
        sides = [value.completion]
    elif isinstance(value, dict):
        sides = [value.get("completion", [])]
    else:
        sides = []
    return [message for side in sides if isinstance(side, list) for message in side]


# ---- texts as messages ----


def conversation(value: Any) -> Any:
    """A value of a use as messages: a prompt's text is the user's, an answer's the assistant's.
    Raises RowError for whole texts, which have no turns.
    """
    if is_conversation(value):
        return value
    if isinstance(value, PreferencePair):
        return replace(
            value,
            prompt=_asked(value.prompt),
            chosen=_said(value.chosen),
            rejected=_said(value.rejected),
        )
    if isinstance(value, JudgedAnswer):
        return replace(value, prompt=_asked(value.prompt), completion=_said(value.completion))
    if isinstance(value, dict):
        asked = _asked(value.get("prompt", ""))
        return {**value, "prompt": asked, "completion": _said(value["completion"])}
    return _asked(value)


def _asked(prompt: Any) -> Chat:
    if isinstance(prompt, list):
        return prompt
    if not prompt:
        raise RowError(
            "expected a prompt and its answer, or messages, beside pictures, found whole texts, "
            "which have no turns"
        )
    if is_transcript(prompt):
        raise RowError(
            "expected messages beside pictures, found a transcript of Human: and Assistant:. "
            "data.format=hh_rlhf_messages reads it as turns"
        )
    return [{"role": "user", "content": prompt}]


def _said(answer: Any) -> Chat:
    if isinstance(answer, list):
        return answer
    return [{"role": "assistant", "content": answer}]


def opened(value: Any, pictures: Pictures) -> Any:
    """A value of a use whose messages list `Picture`s in place of what the row gave. Raises
    RowError for one that can't be used.
    """
    numbers = count(1)

    def look(given: Any) -> Any:
        return pictures.of(given, f"picture {next(numbers)}")

    def open_each(message: Message) -> Message:
        if "images" not in message:
            return message
        return {**message, "images": [look(given) for given in message["images"]]}

    return on_messages(value, open_each)
