"""Which keys of a message a chat template reads, by the names in its code."""

import functools
import re
from collections.abc import Sequence
from typing import Any

from rlhf.types import Message

Chat = Sequence[Message]
# other names for reasoning_content: gpt-oss's template reads thinking, some read reasoning
_REASONING = ("thinking", "reasoning")
_CODE = re.compile(r"\{[{%].*?[}%]\}", re.DOTALL)
_NAME = re.compile(r"\.\s*(\w+)|\[?'(\w+)'|\[?\"(\w+)\"|\b(tools)\b")


def template_reads(tokenizer: Any, key: str) -> bool:
    """Whether the tokenizer's chat template (one of them, where it has several) reads `key` of a
    message, or `tools`.
    """
    names = {name for text in _templates(tokenizer) for name in _names(text)}
    return key in names or (key == "reasoning_content" and not names.isdisjoint(_REASONING))


def _templates(tokenizer: Any) -> list[str]:
    template = tokenizer.chat_template or ""
    return list(template.values()) if isinstance(template, dict) else [template]


@functools.lru_cache(maxsize=32)
def _names(template: str) -> frozenset[str]:
    """The attributes and keys that a template's code names, and `tools`; what it writes itself is
    none of it, nor are its own variables.
    """
    names = (match for code in _CODE.findall(template) for match in _NAME.findall(code))
    return frozenset(name for groups in names for name in groups if name)


def as_template_reads(tokenizer: Any, messages: Chat) -> list[Any]:
    """Messages for the tokenizer's template: their reasoning under the name that it has there,
    where that is not reasoning_content.
    """
    if not any("reasoning_content" in message for message in messages):
        return list(messages)
    names = {name for text in _templates(tokenizer) for name in _names(text)}
    other = next((name for name in _REASONING if name in names), None)
    if other is None or "reasoning_content" in names:
        return list(messages)
    return [
        {**message, other: message["reasoning_content"]}
        if "reasoning_content" in message
        else message
        for message in messages
    ]
