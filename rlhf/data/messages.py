"""What one message of a data file may hold, as the one record that stages pass on
(rlhf.types.Message), whichever tool wrote it. A message that doesn't fit raises `RowError`.

Beside role (or from) and content (or value):

    tool_calls         OpenAI's; its older function_call; a call as {name, arguments}. Arguments
                       given as a JSON text become an object, since templates walk through them
    tool_call_id, name
    reasoning_content  also called reasoning or thinking
    train              weight (OpenAI), loss (ms-swift), train or training (axolotl)

Any other key is kept: the chat template gets the whole message. Null and empty values are left out,
as Parquet files have every key in every message. Text in parts is joined as it stands. A picture
leaves a PICTURE_MARK in the content, and what the row gives for it among `images`; None where that
is in the row's own column (rlhf/data/pictures.py). Videos and sounds are refused.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from rlhf.data.calls import call_of, checked_text, is_nothing, missing, parsed, refuse_halves
from rlhf.data.media import (
    PARTS_OF_MEDIA,
    PARTS_OF_PICTURES,
    picture_of_part,
    pictures_of_message,
    refuse_media,
)
from rlhf.process.wording import describe, nearest
from rlhf.types import PICTURE_MARK, Message, RowError

_CALLS = "calls"  # a speaker whose text is the call
SPEAKERS = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "function_call": _CALLS,
    "tool_call": _CALLS,
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
}
# keys of the record; a template that reads others gets them too
RECORD = (
    "role",
    "content",
    "tool_calls",
    "tool_call_id",
    "name",
    "reasoning_content",
    "train",
    "images",
)
_SPELLINGS = {"role": "from", "from": "role", "content": "value", "value": "content"}
_FLAGS = ("train", "training", "weight", "loss", "loss_weight")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_PARTS_OF_TEXT = ("text", "input_text", "output_text")
_PARTS_OF_CALLS = ("tool_call", "tool_calls", "function_call")
_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


# ---- messages ----


def chat_of_list(
    value: Any, key: str, *, role: str = "role", content: str = "content"
) -> list[Message]:
    """A list of messages, also as a JSON text, whose speakers and texts are under `role` and
    `content`, or under the other tools' names for them. Raises RowError naming the message.
    """
    messages = value
    if isinstance(value, str) and value.lstrip().startswith("["):
        messages = parsed(value, key, "a list of messages")
    if not isinstance(messages, list) or not messages:
        raise RowError(f"key {key!r}: expected a list of messages, found {describe(messages)}")
    return [message_of(m, f"{key}[{i}]", role, content) for i, m in enumerate(messages)]


def message_of(message: Any, where: str, role: str = "role", content: str = "content") -> Message:
    """One message as the record. Raises RowError; `where` is its place for messages."""
    if not isinstance(message, Mapping):
        raise RowError(
            f"key {where!r}: expected an object with {role!r} and {content!r}, found "
            f"{describe(message)}"
        )
    refuse_media(message, f"{where}: ")
    role, content = _spelling(message, role), _spelling(message, content)
    rest = {
        str(key): value
        for key, value in message.items()
        if key not in (role, content) and not is_nothing(value)
    }
    try:
        if role not in message:
            raise missing(role, list(message))
        speaker = _speaker(checked_text(message[role], role), role)
        read = _content_of(message, content, where, calls=speaker == _CALLS)
        calls = [*read.calls, *_calls_of(rest)]
        out: dict[str, Any] = {"role": "assistant" if speaker == _CALLS else speaker}
        out["content"] = _text_beside(read, calls, out["role"], message, content)
        _refuse_second(rest, out)
        if calls:
            out["tool_calls"] = _checked_calls(calls, out["role"])
        out |= pictures_of_message(rest, read.images, out["content"])
        if "images" in out and out["role"] == "assistant":
            raise RowError("expected pictures in what is asked, found one in an answer")
        out |= _texts_of(rest, read)
        if (train := _train_of(rest)) is not None:
            out["train"] = train
        if rest:
            refuse_halves(json.dumps(rest, ensure_ascii=False, default=str), ", ".join(rest))
    except RowError as error:
        raise RowError(f"{where}: {error}") from None
    return cast(Message, out | rest)


def _spelling(message: Mapping[Any, Any], key: str) -> str:
    """`key`, or the name that another tool has for it where only that is there."""
    other = _SPELLINGS.get(key, key)
    if key not in message and other in message:
        return other
    return key


def _speaker(name: str, key: str) -> str:
    if name not in SPEAKERS:
        raise RowError(
            f"key {key!r}: expected one of {', '.join(SPEAKERS)}, found {name!r}; "
            f"nearest: {nearest(name, list(SPEAKERS))!r}"
        )
    return SPEAKERS[name]


def _refuse_second(rest: dict[str, Any], out: Mapping[str, Any]) -> None:
    """Take the keys role and content out of `rest` where they repeat what `from` and `value` said.
    Raises RowError where they say something else.
    """
    said = {"role": out["role"], "content": out["content"]}
    for key in said.keys() & rest.keys():
        second = rest.pop(key)
        if key == "role" and isinstance(second, str):
            second = SPEAKERS.get(second, second)
        if second != said[key]:
            raise RowError(
                f"keys {key!r} and {_SPELLINGS[key]!r}: expected one of them, found both, which "
                "say different things"
            )


@dataclass(slots=True)
class _Content:
    """What a message's content holds."""

    text: str | None = None  # None: nothing, not even an empty text
    reasoning: str = ""
    calls: list[Any] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)  # of its parts


def _content_of(message: Mapping[Any, Any], key: str, where: str, *, calls: bool) -> _Content:
    value = message.get(key)
    if calls:
        return _content_of_caller(value, key)
    if value is None:
        return _Content()
    if isinstance(value, list):
        return _content_of_parts(value, key)
    return _Content(checked_text(value, key, empty=True))


def _content_of_caller(value: Any, key: str) -> _Content:
    """The calls that a ShareGPT speaker makes: a JSON text (after a thought), or calls."""
    text = ""
    if isinstance(value, str):
        if thought := _THOUGHT.match(value):
            text, value = thought.group().strip(), value[thought.end() :]
        value = parsed(value, key, "a call as {name, arguments} or a list of them")
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise RowError(f"key {key!r}: expected at least one call, found none")
    return _Content(text, calls=calls)


def _content_of_parts(parts: list[Any], key: str) -> _Content:
    texts, reasons, calls, images = [], [], [], []
    for i, part in enumerate(parts):
        name = f"{key}[{i}]"
        if isinstance(part, str):
            texts.append(checked_text(part, name, empty=True))
            continue
        kind, value = _part(part, name)
        if kind in PARTS_OF_PICTURES:
            texts.append(PICTURE_MARK)
            images.append(value)
        elif kind in _PARTS_OF_CALLS:
            given = parsed(value, name, "a call") if isinstance(value, str) else value
            calls += given if isinstance(given, list) else [given]
        elif kind in _REASONING:
            reasons.append(checked_text(value, name, empty=True))
        else:
            texts.append(checked_text(value, name, empty=True))
    return _Content("".join(texts) if texts else None, "".join(reasons), calls, images)


def _part(part: Any, name: str) -> tuple[str, Any]:
    """The kind of a part of a content, and what it holds. Raises RowError for a part that is not
    read, and for keys that would be lost.
    """
    if not isinstance(part, Mapping):
        raise RowError(f"key {name!r}: expected a text or a part of one, found {describe(part)}")
    held = {str(key): value for key, value in part.items() if not is_nothing(value)}
    kind = held.pop("type", next((key for key in PARTS_OF_PICTURES if key in held), "text"))
    if kind in PARTS_OF_PICTURES:
        return kind, picture_of_part(held, kind, name)
    refuse_media(held, f"{name}: ")
    if kind in PARTS_OF_MEDIA:
        raise RowError(
            f"key {name!r}: videos and sounds are not read, found a part of type {kind!r}"
        )
    known = (*_PARTS_OF_TEXT, *_REASONING, *_PARTS_OF_CALLS, *PARTS_OF_PICTURES)
    if kind not in known:
        raise RowError(
            f"key {name!r}: expected a part of one of the types {', '.join(known)}, found {kind!r}"
        )
    key = next((key for key in (kind, "text", "value") if key in held), None)
    value = "" if key is None else held.pop(key)
    if held:
        raise RowError(
            f"key {name!r}: expected a part of type {kind!r} with its text alone, found "
            f"{', '.join(map(repr, held))} too, which nothing reads"
        )
    return kind, value


def _text_beside(
    read: _Content, calls: list[Any], role: str, message: Mapping[Any, Any], key: str
) -> str:
    """A message's text, "" where it holds calls alone."""
    if read.text is not None:
        return read.text
    if calls:
        return ""
    if key not in message:
        raise missing(key, list(message))
    raise RowError(f"key {key!r}: expected text, found {describe(message[key])}")


def _texts_of(rest: dict[str, Any], read: _Content) -> dict[str, str]:
    """tool_call_id, name and reasoning_content, taken out of `rest`."""
    out: dict[str, str] = {}
    for key in ("tool_call_id", "name"):
        if key in rest:
            out[key] = checked_text(rest.pop(key), key)
    reasons = [read.reasoning] if read.reasoning else []
    for key in _REASONING:
        # under its other names it may be something else, such as a switch: then it stays a key
        if key in rest and (key == "reasoning_content" or isinstance(rest[key], str)):
            reasons.append(checked_text(rest.pop(key), key))
    if len(set(reasons)) > 1:
        raise RowError(
            f"keys {', '.join(map(repr, _REASONING))}: expected one reasoning, found several, "
            "which say different things"
        )
    if reasons:
        out["reasoning_content"] = reasons[0]
    return out


def _train_of(rest: dict[str, Any]) -> bool | None:
    """Whether the turn trains, as its flags (taken out of `rest`) say; None without any."""
    flags = {key: rest.pop(key) for key in _FLAGS if key in rest}
    for key, value in flags.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise RowError(
                f"key {key!r}: expected 0 or 1 (false or true), found {describe(value)}: a turn "
                "trains or it does not. A weight of a whole row is a column (data.weight_column)"
            )
    said = {bool(value) for value in flags.values()}
    if len(said) > 1:
        raise RowError(
            f"keys {', '.join(map(repr, flags))}: expected the same of each, found "
            f"{', '.join(map(str, flags.values()))}"
        )
    if not said:
        return None
    return said.pop()


# ---- the texts of a message ----

Change = Callable[[str, str], str]  # (where, text) -> text


def texts_of_message(message: Mapping[str, Any]) -> list[str]:
    """What a template may show of a message: its text, its reasoning, and each call as JSON."""
    texts = [message["content"], message.get("reasoning_content", "")]
    for call in message.get("tool_calls", ()):
        texts.append(json.dumps(call.get("function", call), ensure_ascii=False, default=str))
    return [text for text in texts if text]


def with_texts(message: Message, where: str, change: Change) -> Message:
    """A message whose text, reasoning and texts in arguments are what `change` gives for them; the
    text itself is called `where`, the others are called by their keys below it.
    """
    out = cast(Message, {**message})
    if "images" in message:
        pieces = message["content"].split(PICTURE_MARK)
        out["content"] = PICTURE_MARK.join(_changed_piece(where, text, change) for text in pieces)
    elif message["content"] or "tool_calls" not in message:  # calls alone have no text
        out["content"] = change(where, message["content"])
    if "reasoning_content" in message:
        out["reasoning_content"] = change(
            f"{where}.reasoning_content", message["reasoning_content"]
        )
    if "tool_calls" in message:
        calls = []
        for i, call in enumerate(message["tool_calls"]):
            function = call["function"]
            name = f"{where}.tool_calls[{i}].function.arguments"
            arguments = _changed(function["arguments"], name, change)
            calls.append({**call, "function": {**function, "arguments": arguments}})
        out["tool_calls"] = calls
    return out


def _changed_piece(where: str, text: str, change: Change) -> str:
    """A text beside pictures, whose blanks around it stay: they part it from the pictures."""
    core = text.strip()
    if not core:
        return text
    start = text.index(core[0])
    return f"{text[:start]}{change(where, core)}{text[start + len(core) :]}"


def _changed(value: Any, where: str, change: Change) -> Any:
    if isinstance(value, str):
        return change(where, value)
    if isinstance(value, Mapping):
        return {key: _changed(held, f"{where}.{key}", change) for key, held in value.items()}
    if isinstance(value, list):
        return [_changed(held, f"{where}[{i}]", change) for i, held in enumerate(value)]
    return value


# ---- calls ----


def _calls_of(rest: dict[str, Any]) -> list[Any]:
    """A message's calls, taken out of `rest`: OpenAI's tool_calls, or its older function_call."""
    given, old = rest.pop("tool_calls", None), rest.pop("function_call", None)
    if isinstance(given, str):
        given = parsed(given, "tool_calls", "a list of calls")
    if isinstance(given, Mapping):
        given = [given]
    if given is not None and not isinstance(given, list):
        raise RowError(f"key 'tool_calls': expected a list of calls, found {describe(given)}")
    if given and old is not None:
        raise RowError("keys 'tool_calls' and 'function_call': expected one of them, found both")
    if old is not None:
        return [old]
    return given or []


def _checked_calls(calls: list[Any], role: str) -> list[dict[str, Any]]:
    if role != "assistant":
        raise RowError(f"key 'tool_calls': expected them of the assistant, found role {role!r}")
    return [call_of(call, f"tool_calls[{i}]") for i, call in enumerate(calls)]
