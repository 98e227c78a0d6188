"""Calls of functions in what a policy wrote, and the messages that answer them.

A template known to TRL says how its family writes calls; transformers' parser reads them by it.
Beside it, for every family, two common forms are read: <tool_call> {"name": ..., "arguments": ...}
</tool_call> (Hermes, Qwen), and a response that is nothing but such an object or a list of them.
"""

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.types import Message, Tools

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_MISTRAL = "[TOOL_CALLS]"  # followed by a list
_FENCE = re.compile(r"```(?:json|tool_call)?\s*\n(.*?)\n?```", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_][\w.-]{0,63}")  # what is repeated as a name
_ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True, slots=True)
class Call:
    """A call that the policy wrote."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Broken:
    """What looks like a call, and can't be read."""

    reason: str


Read = Call | Broken
Reader = Callable[[str], list[Read]]


def make_reader(tokenizer: Any, tools: Tools) -> Reader:
    """What reads the calls of a turn, in the form of the tokenizer's template where TRL knows it,
    else in a common form. `tokenizer`: None where there is none.
    """
    template = None if tokenizer is None else _response_template(tokenizer)
    if template is None:
        return read_calls

    def read(text: str) -> list[Read]:
        calls = _by_template(text + (tokenizer.eos_token or ""), template, tools)
        return calls or read_calls(text)

    return read


def _response_template(tokenizer: Any) -> Any:
    """How the tokenizer's family writes calls; None where neither it nor TRL knows."""
    own = getattr(tokenizer, "response_template", None)
    if own is not None or not getattr(tokenizer, "chat_template", None):
        return own
    from trl.chat_template_utils import add_response_schema

    try:
        # on a copy: the policy's own tokenizer is saved with it
        known = add_response_schema(copy.copy(tokenizer))
    except ValueError:
        return None
    return getattr(known, "response_template", None)


def _by_template(text: str, template: Any, tools: Tools) -> list[Read]:
    from transformers.utils.chat_parsing import parse_response

    try:
        message = parse_response(text, template, prefix="", tools=tools)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        return [Broken(str(error)[:200])]
    calls = message.get("tool_calls") or []
    return [_call(item) for item in calls] if isinstance(calls, list) else [_call(calls)]


def read_calls(text: str) -> list[Read]:
    """The calls of a turn in a common form, in order; none for a turn without calls."""
    _, _, text = text.rpartition("</think>")
    if _OPEN in text:
        return _tagged(text)
    text = text.strip()
    fenced = _FENCE.fullmatch(text)
    if fenced is not None:
        text = fenced[1].strip()
    meant = text.startswith(_MISTRAL)
    text = text.removeprefix(_MISTRAL).strip()
    if not text.startswith(("{", "[")):
        return [Broken(f"no list of calls behind {_MISTRAL}")] if meant else []
    meant = meant or ('"name"' in text and any(f'"{key}"' in text for key in _ARGUMENTS))
    return _of_json(text) if meant else []


def _tagged(text: str) -> list[Read]:
    """The contents of <tool_call> </tool_call>."""
    calls: list[Read] = []
    for piece in text.split(_OPEN)[1:]:
        content, closed, _ = piece.partition(_CLOSE)
        calls += _of_json(content) if closed else [Broken(f"{_OPEN} without {_CLOSE}")]
    return calls


def _of_json(text: str) -> list[Read]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return [Broken(f"no JSON: {error}")]
    return [_call(item) for item in value] if isinstance(value, list) else [_call(value)]


def _call(value: Any) -> Read:
    """A call of its JSON, alone or in OpenAI's object {"function": ...}."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return Broken('expected an object with "name" and "arguments"')
    arguments: Any = next((value[key] for key in _ARGUMENTS if value.get(key) is not None), {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            return Broken(f"its arguments are no JSON: {error}")
    if not isinstance(arguments, dict):
        return Broken("its arguments are no object")
    return Call(value["name"], arguments)


def answer(name: str, text: str) -> Message:
    """The message that answers a call."""
    return {"role": "tool", "name": name, "content": text}


def complain(read: Read, reason: str) -> Message:
    """The message that answers a call that is not made."""
    named = isinstance(read, Call) and _NAME.fullmatch(read.name)
    return answer(named[0] if named else "error", f"error: {reason}")


def as_text(messages: list[Message]) -> str:
    """The same for a prompt that is a text, which no template renders."""
    blocks = [f"<tool_response>\n{m['content']}\n</tool_response>\n" for m in messages]
    return "\n" + "".join(blocks)
