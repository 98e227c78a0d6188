"""Prompts as the policy reads them: tokenised, each with a name of its own."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conf.schema import DataConfig
from rlhf.data.converting import Record
from rlhf.data.encoded import Encoded, Store, encoded
from rlhf.data.formats.values import has_pictures, on_messages, pictures_in
from rlhf.data.loading import DataRequest, Loaded, tell_unread
from rlhf.data.prepare.held import Mapped, mapped
from rlhf.models import encoding
from rlhf.models.turns import text_of
from rlhf.types import Message, Prompt, UserError


def stable_hash(value: Any) -> str:
    """16 hexadecimal digits that depend on a prompt's content alone: of pictures on their bytes,
    wherever their files are.
    """
    if has_pictures(value):
        value = on_messages(value, _with_bytes_named)
    content = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _with_bytes_named(message: Message) -> Any:
    if "images" not in message:
        return message
    return {**message, "images": [picture["sha256"] for picture in message["images"]]}


def prompt_id(record: Record) -> str:
    """Names a prompt; with other functions to call it is another one."""
    if record.tools is None:
        return stable_hash(record.value)
    value = record.value
    if has_pictures(value):
        value = on_messages(value, _with_bytes_named)
    return stable_hash([value, record.tools])


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
    _refuse_long(rows, loaded, data)

    def prompt(index: int) -> Prompt:
        row, record = rows.data[index], records[rows.numbers[index]]
        own = record.value
        text, ids = own if row["text"] is None else row["text"], tuple(row["ids"])
        images = tuple(pictures_in(own))
        return Prompt(
            prompt_id(record),
            text,
            ids,
            own,
            fields=record.fields,
            tools=record.tools,
            images=images,
        )

    return Mapped(prompt, range(len(rows.numbers)))


def _with_tools(record: Record) -> Record:
    return record.having((record.value, record.tools))


def _refuse_long(rows: Encoded, loaded: Loaded, data: DataConfig) -> None:
    """Raises UserError for prompts of more than data.max_prompt_length tokens: for all, or with
    data.truncate_prompts for those that show pictures, whose tokens can't be cut.
    """
    limit, records = data.max_prompt_length, loaded.records
    lengths = rows.data["length"][:]
    numbered = list(zip(rows.numbers, lengths, strict=True))
    too_long = [(number, n) for number, n in numbered if n > limit]
    if data.truncate_prompts:
        too_long = [(number, n) for number, n in too_long if has_pictures(records[number].value)]
    if not too_long:
        return
    most = max(n for _, n in too_long)
    longest = [records[number] for number, n in too_long if n == most]
    record = max(longest, key=lambda r: (r.number, r.place))
    where = f"row {record.number}" if len(loaded.formats) == 1 else record.place
    if data.truncate_prompts:
        raise UserError(
            f"{loaded.name}: {len(too_long)} prompts with pictures are longer than "
            f"data.max_prompt_length={limit} tokens, and a picture's tokens can't be cut; the "
            f"longest is {where} with {most}. Raise data.max_prompt_length, or leave them out."
        )
    raise UserError(
        f"{loaded.name}: {len(too_long)} of {len(lengths)} prompts are longer than "
        f"data.max_prompt_length={limit} tokens; the longest is {where} "
        f"with {most}. Raise data.max_prompt_length, or set data.truncate_prompts=true to "
        "keep each prompt's last tokens."
    )
