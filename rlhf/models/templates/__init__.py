"""Chat templates by name, for a tokenizer without one, or in place of its own (data.chat_template).

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

from importlib import resources
from pathlib import Path

from rlhf.process.wording import nearest
from rlhf.types import UserError

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
        near = nearest(name, NAMES)
        hint = f" Nearest name: {near}." if near else ""
        raise UserError(
            f"data.chat_template={name}: no such file, and no such name. Expected a file with a "
            f"Jinja template, or {', '.join(NAMES)}.{hint}"
        )
    return place.read_text(encoding="utf-8")
