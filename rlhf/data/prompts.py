"""Prompts as the policy reads them: tokenised, each with a name of its own."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.converting import Record
from rlhf.data.encoded import Encoded, Store, encoded
from rlhf.data.loading import DataRequest, Loaded, tell_unread
from rlhf.data.prepare.held import Mapped, mapped
from rlhf.models import encoding
from rlhf.models.turns import text_of
from rlhf.types import Prompt, UserError


def stable_hash(value: Any) -> str:
    """16 hexadecimal digits that depend on a prompt's content alone."""
    content = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def prompt_id(record: Record) -> str:
    """Names a prompt; with other functions to call it is another one."""
    if record.tools is None:
        return stable_hash(record.value)
    return stable_hash([record.value, record.tools])


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """Of (prompt, tools) the prompt's ``ids``, its last `limit` tokens where it has more, its
    ``length``, and the ``text`` that the ids say where that is not the row's own.
    """

    tokenizer: Any
    limit: int

    def options(self) -> dict[str, Any]:
        return {"limit": self.limit}

    def columns(self) -> dict[str, str]:
        return {"ids": "ids", "length": "count", "text": "text"}

    def __call__(self, value: Any, counts: Counter[str]) -> dict[str, Any]:
        prompt, tools = value
        ids = encoding.prompt_ids(self.tokenizer, prompt, tools)
        if not ids:
            raise ValueError("the prompt has no tokens, so there is nothing to continue")
        kept, text = ids[-self.limit :], None
        if len(ids) > self.limit or not isinstance(prompt, str):
            text = text_of(self.tokenizer, kept)
        return {"ids": kept, "length": len(ids), "text": text}


def tokenised(tokenizer: Any, loaded: Loaded, request: DataRequest) -> Sequence[Prompt]:
    """Records as prompts of at most ``data.max_prompt_length`` tokens, each made anew at every
    access: its row and tokens are in files where there are many. Raises UserError: conversations
    without a chat template, and prompts that are too long, naming the longest row, unless
    ``data.truncate_prompts`` is set.
    """
    data, records = request.data, loaded.records
    if any(isinstance(record.value, list) for record in records):
        encoding.require_template(tokenizer, loaded.name)
    tell_unread(loaded.keys, tokenizer, loaded.name)
    given = mapped(_with_tools, records)
    encode = PromptEncoder(tokenizer, data.max_prompt_length)
    rows = encoded(encode, given, Store.of(request), loaded.name)
    if not data.truncate_prompts:
        _refuse_long(rows, loaded, data.max_prompt_length)

    def prompt(index: int) -> Prompt:
        row, record = rows.data[index], records[rows.numbers[index]]
        own = record.value
        text, ids = own if row["text"] is None else row["text"], tuple(row["ids"])
        return Prompt(prompt_id(record), text, ids, own, fields=record.fields, tools=record.tools)

    return Mapped(prompt, range(len(rows.numbers)))


def _with_tools(record: Record) -> Record:
    return record.having((record.value, record.tools))


def _refuse_long(rows: Encoded, loaded: Loaded, limit: int) -> None:
    """Raises UserError for prompts of more than `limit` tokens."""
    lengths = rows.data["length"][:]
    too_long = [number for number, n in zip(rows.numbers, lengths, strict=True) if n > limit]
    if not too_long:
        return
    most = max(lengths)
    longest = [number for number, n in zip(rows.numbers, lengths, strict=True) if n == most]
    record = max((loaded.records[number] for number in longest), key=lambda r: (r.number, r.place))
    where = f"row {record.number}" if len(loaded.formats) == 1 else record.place
    raise UserError(
        f"{loaded.name}: {len(too_long)} of {len(lengths)} prompts are longer than "
        f"data.max_prompt_length={limit} tokens; the longest is {where} "
        f"with {most}. Raise data.max_prompt_length, or set data.truncate_prompts=true to "
        "keep each prompt's last tokens."
    )
