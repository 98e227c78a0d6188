"""Texts that spell a special token and are not to become it: what an environment says, such as the
output of a tool, must not end a turn or begin one.

A mark is put into each such token's text. Where the rendered text has the mark, it is cut, and the
pieces are tokenised apart: none of them spells the token any more, and together they say the text.
"""

import re
import weakref
from collections.abc import Sequence
from typing import Any

from rlhf.models.turns import (
    check_rows,
    closing_id,
    ids_of,
    prompt_text,
    single_bos,
    special_ids,
)
from rlhf.types import Message, Observation, Tools

_MARK = "\ue000"  # of Unicode's private use; a template may write it as JSON does
_CUT = re.compile(r"\ue000|\\ue000")
_KNOWN: "weakref.WeakKeyDictionary[Any, re.Pattern[str] | None]" = weakref.WeakKeyDictionary()


def marked(tokenizer: Any, observation: Observation) -> Observation:
    """`observation` with a mark in each text of a special token."""
    if isinstance(observation, str):
        pattern = _pattern(tokenizer)
        return observation if pattern is None else pattern.sub(_mark, observation)
    return [marked_message(tokenizer, message) for message in observation]


def marked_message(tokenizer: Any, message: Message) -> Message:
    """The same of one message."""
    pattern = _pattern(tokenizer)
    if pattern is None:
        return message
    out = dict(message)
    for key, value in message.items():
        if isinstance(value, str) and key != "role":
            out[key] = pattern.sub(_mark, value)
    return out  # type: ignore[return-value] # the same keys


def _mark(match: "re.Match[str]") -> str:
    return match[0][0] + _MARK + match[0][1:]


def ids_of_marked(tokenizer: Any, text: str, head: str = "") -> list[int]:
    """Token ids of a rendered text that may have marks, which say nothing. head: the text of a
    special token before it, whose id is left out.
    """
    first, rest = cut(text)
    ids = _behind(tokenizer, head, [first])[0]
    for piece in pieces_behind(tokenizer, rest):
        ids += piece
    check_rows(tokenizer, ids)
    return ids


def conversation_ids(tokenizer: Any, messages: Sequence[Message], tools: Tools | None) -> list[int]:
    """What a policy reads before its next turn, as `prompt_ids` has it; what tools said stays text.
    Raises TemplateRefusal.
    """
    told: list[Message] = []
    for message in messages:
        is_told = message["role"] == "tool"
        told.append(marked_message(tokenizer, message) if is_told else message)
    text = prompt_text(tokenizer, told, tools)
    return single_bos(tokenizer, ids_of_marked(tokenizer, text))


def cut(text: str) -> tuple[str, list[str]]:
    """A text up to its first mark, and what lies between and behind the marks."""
    first, *rest = _CUT.split(text)
    return first, rest


def pieces_behind(tokenizer: Any, pieces: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that go on with another text: some tokenizers begin every text with a
    blank, but not behind a special token.
    """
    if not pieces:
        return []
    end = tokenizer.convert_ids_to_tokens(closing_id(tokenizer, chat=True))
    return _behind(tokenizer, end, pieces)


def _behind(tokenizer: Any, head: str, texts: Sequence[str]) -> list[list[int]]:
    drop = 1 if head else 0
    return [ids[drop:] for ids in ids_of(tokenizer, [head + text for text in texts])]


def _pattern(tokenizer: Any) -> "re.Pattern[str] | None":
    """What finds the texts of special tokens, the longest first."""
    if tokenizer not in _KNOWN:
        texts = {str(tokenizer.convert_ids_to_tokens(i)) for i in special_ids(tokenizer)}
        several = sorted((text for text in texts if len(text) > 1), key=lambda t: (-len(t), t))
        together = "|".join(re.escape(text) for text in several)
        _KNOWN[tokenizer] = re.compile(together) if together else None
    return _KNOWN[tokenizer]
