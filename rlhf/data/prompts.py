"""Prompts as the policy reads them: tokenised, each with a name of its own."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from rlhf.data.converting import Record
from rlhf.data.encoded import Store, encoded
from rlhf.data.loading import DataRequest, Loaded, tell_unread
from rlhf.models import encoding
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
            text = self.tokenizer.decode(kept)
        return {"ids": kept, "length": len(ids), "text": text}


def tokenised(tokenizer: Any, loaded: Loaded, request: DataRequest) -> list[Prompt]:
    """Records as prompts of at most ``data.max_prompt_length`` tokens. Raises UserError:
    conversations without a chat template, and prompts that are too long, naming the longest row,
    unless ``data.truncate_prompts`` is set.
    """
    data, records = request.data, loaded.records
    if any(isinstance(record.value, list) for record in records):
        encoding.require_template(tokenizer, loaded.name)
    tell_unread(loaded.keys, tokenizer, loaded.name)
    limit, out = data.max_prompt_length, []
    too_long: list[tuple[int, int, str]] = []  # tokens, row number, place
    given = [replace(record, value=(record.value, record.tools)) for record in records]
    rows = encoded(PromptEncoder(tokenizer, limit), given, Store.of(request), loaded.name)
    for number, row in zip(rows.numbers, rows.data, strict=True):
        record = records[number]
        if row["length"] > limit:
            too_long.append((row["length"], record.number, record.place))
        text = record.value if row["text"] is None else row["text"]
        ids, own = tuple(row["ids"]), record.value
        out.append(
            Prompt(prompt_id(record), text, ids, own, fields=record.fields, tools=record.tools)
        )
    if too_long and not data.truncate_prompts:
        tokens, number, place = max(too_long)
        where = f"row {number}" if len(loaded.formats) == 1 else place
        raise UserError(
            f"{loaded.name}: {len(too_long)} of {len(out)} prompts are longer than "
            f"data.max_prompt_length={limit} tokens; the longest is {where} "
            f"with {tokens}. Raise data.max_prompt_length, or set data.truncate_prompts=true to "
            "keep each prompt's last tokens."
        )
    return out
