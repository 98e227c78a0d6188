"""Chat templates by name, for a tokenizer without one, or in place of its own (data.chat_template);
what a template reads of a message, and the text that it gives for a conversation.

Written after what each family's models are trained on; with the family's tokenizer (its
beginning-of-sequence and end-of-turn tokens) they give the same text, with these differences. An
assistant's turn ends with the tokenizer's own end-of-sequence token, whatever the family calls it,
since every stage ends a response so (rlhf/models/encoding.py); chatml and qwen models have
<|im_end|> there, llama-3 ones <|eot_id|>. An assistant's text is never trimmed. A system message
goes before the first user's where the family has no place for it (mistral, gemma). mistral is the
layout without spaces around [INST], qwen the one with a default system message. llama-2 begins
every exchange with a beginning-of-sequence token, as its models were trained. llama-2 and vicuna
begin an answer with a space. plain marks no roles: a line for each message. hermes is chatml with
functions: it shows `tools`, writes calls as <tool_call>, answers as <tool_response> and reasoning
as <think>, after the family's models; the words that introduce the functions are ours.

`generation` marks tell transformers and TRL which tokens are the assistant's.
"""

import difflib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from rlhf.types import PICTURES, Message, Picture, RowError, Tools, UserError

_PROCESSOR = "rlhf_processor"  # attribute of a picture model's tokenizer
NAMES = (
    "chatml",
    "llama-2",
    "llama-3",
    "mistral",
    "qwen",
    "gemma",
    "zephyr",
    "alpaca",
    "vicuna",
    "plain",
    "hermes",
)
Chat = Sequence[Message]
_BASE = "transformers.tokenization_utils_base"  # where transformers' own methods are from
# other names for reasoning_content: gpt-oss's template reads thinking, some read reasoning
_REASONING = ("thinking", "reasoning")
_CODE = re.compile(r"\{[{%].*?[}%]\}", re.DOTALL)
_NAME = re.compile(r"\.\s*(\w+)|\[?'(\w+)'|\[?\"(\w+)\"|\b(tools)\b")


class TemplateRefusal(UserError, ValueError):
    """A row that the chat template refuses, or can't render. A ValueError too, as every row that
    can't be encoded.
    """


def template_text(name: str) -> str:
    """The Jinja source of data.chat_template: one of NAMES, or a file. Raises UserError."""
    if name in NAMES:
        return (
            resources.files(__name__)
            .joinpath(f"{name}.jinja")
            .read_text(encoding="utf-8")
            .rstrip("\n")
        )
    place = Path(name).expanduser()
    if not place.is_file():
        near = difflib.get_close_matches(name.lower(), NAMES, n=1)
        hint = f" Nearest name: {near[0]}." if near else ""
        raise UserError(
            f"data.chat_template={name}: no such file, and no such name. Expected a file with a "
            f"Jinja template, or {', '.join(NAMES)}.{hint}"
        )
    return place.read_text(encoding="utf-8")


# ---- what a template reads of a message ----


def template_reads(tokenizer: Any, key: str) -> bool:
    """Whether the tokenizer's chat template (one of them, where it has several) reads `key` of a
    message, or `tools`.
    """
    names = {name for text in _templates(tokenizer) for name in _names(text)}
    return key in names or (key == "reasoning_content" and not names.isdisjoint(_REASONING))


def _templates(tokenizer: Any) -> list[str]:
    template = tokenizer.chat_template or ""
    if isinstance(template, dict):
        return list(template.values())
    return [template]


@functools.lru_cache(maxsize=32)
def _names(template: str) -> frozenset[str]:
    """The attributes and keys that a template's code names, and `tools`; what it writes itself is
    none of it, nor are its own variables.
    """
    names = (match for code in _CODE.findall(template) for match in _NAME.findall(code))
    return frozenset(name for groups in names for name in groups if name)


def as_template_reads(tokenizer: Any, messages: Sequence[Message]) -> list[Any]:
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


# ---- conversations as text ----


def rendered(
    tokenizer: Any, messages: Chat, *, generation_prompt: bool, tools: Tools | None = None
) -> str:
    """The text of a conversation under the chat template, each picture as all of its tokens.
    Raises TemplateRefusal, and RowError for pictures that have no place.
    """
    return beginnings_rendered(
        tokenizer, messages, [len(messages)], generation_prompt=generation_prompt, tools=tools
    )[0]


def rendered_short(
    tokenizer: Any, messages: Chat, *, generation_prompt: bool, tools: Tools | None = None
) -> str:
    """The same with one image token for each picture. Raises as `rendered`."""
    shown = as_template_reads(tokenizer, messages)
    processor = _reading(tokenizer, messages)
    if processor is not None:
        shown = processor.as_parts(tokenizer, shown)
    return _through_template(tokenizer, [shown], generation_prompt, tools)[0]


def processor_of(tokenizer: Any) -> Any:
    """The processor (rlhf/models/processors.py) of a picture model's tokenizer; None for a model of
    text.
    """
    return vars(tokenizer).get(_PROCESSOR)


def keep_processor(tokenizer: Any, processor: Any) -> None:
    """`processor_of` gives it from now on."""
    vars(tokenizer)[_PROCESSOR] = processor


def _reading(tokenizer: Any, messages: Chat) -> Any:
    """The processor of a picture model. Raises RowError for pictures where the model reads none."""
    processor = processor_of(tokenizer)
    if processor is None and any(message.get("images") for message in messages):
        raise RowError(
            "the conversation holds pictures, but the model reads text alone: give model.path a "
            "model that reads pictures, or leave out the rows that hold some"
        )
    return processor


def pictures_of(messages: Chat) -> list[Picture]:
    """The pictures of a conversation, in the order of their places."""
    return [picture for message in messages for picture in message.get("images") or ()]


def beginnings_rendered(
    tokenizer: Any,
    messages: Chat,
    stops: Sequence[int],
    *,
    generation_prompt: bool,
    tools: Tools | None = None,
) -> list[str]:
    """The texts of several beginnings of a conversation, of `stops` messages each and at least
    one. Raises as `rendered`.
    """
    if not stops:
        return []
    shown = as_template_reads(tokenizer, messages)
    processor = _reading(tokenizer, messages)
    if processor is not None:
        shown = processor.as_parts(tokenizer, shown)
    chats = [shown[:stop] for stop in stops]
    texts = _through_template(tokenizer, chats, generation_prompt, tools)
    if processor is None:
        return texts
    return [
        processor.expanded(text, pictures_of(messages[:stop]))
        for text, stop in zip(texts, stops, strict=True)
    ]


def row_pictures(row: Mapping[str, Any]) -> list[Picture]:
    """The pictures of an encoded row."""
    found: list[Picture] = json.loads(row.get(PICTURES) or "[]")
    return found


def _through_template(
    tokenizer: Any, chats: Sequence[list[Any]], generation_prompt: bool, tools: Tools | None
) -> list[str]:
    """The texts of several conversations."""
    from jinja2 import TemplateError

    try:
        compiled = _compiled_of(tokenizer)
        if compiled is not None and all(chats):
            return compiled.texts(tokenizer, chats, generation_prompt, tools)
        return [
            tokenizer.apply_chat_template(
                chat, tools=tools or None, tokenize=False, add_generation_prompt=generation_prompt
            )
            for chat in chats
        ]
    # A template is a program on the row: it fails with any of these on what it does not expect.
    except (TemplateError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise TemplateRefusal(
            f"the chat template refuses a conversation of {len(chats[-1])} messages: {error}"
        ) from error


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A template as transformers compiles it, called without the work that its own call repeats
    for every conversation.
    """

    template: Any
    always: dict[str, Any]  # what every template may call

    def texts(
        self,
        tokenizer: Any,
        chats: Sequence[list[Any]],
        generation_prompt: bool,
        tools: Tools | None,
    ) -> list[str]:
        given = {
            **self.always,
            "tools": tools or None,
            "documents": None,
            "add_generation_prompt": generation_prompt,
            **tokenizer.special_tokens_map,
        }
        template = self.template
        environment, out = template.environment, []
        for chat in chats:
            context = environment.context_class(
                environment,
                {**given, "messages": chat},
                template.name,
                template.blocks,
                globals=self.always,
            )
            out.append(environment.concat(template.root_render_func(context)))
        return out


def _compiled_of(tokenizer: Any) -> _Compiled | None:
    """The tokenizer's template; None where calling it may be more than rendering it."""
    kind, template = type(tokenizer), tokenizer.chat_template
    for name in ("apply_chat_template", "get_chat_template"):
        if getattr(getattr(kind, name, None), "__module__", None) != _BASE:
            return None
    if not isinstance(template, str):
        return None
    return _compiled(template)


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> _Compiled | None:
    from transformers.utils import chat_template_utils

    compile_ = getattr(chat_template_utils, "_compile_jinja_template", None)
    if compile_ is None:  # another version of transformers
        return None
    compiled = compile_(template)
    if compiled.environment.is_async:
        return None
    return _Compiled(compiled, dict(compiled.globals))
