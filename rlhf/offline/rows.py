"""Rows of data sets as the token ids that TRL's trainers read: what all stages share, and SFT.
Tokens come from `rlhf.models.encoding`, as in every stage; `rlhf.data.encoded` makes them once and
keeps them in a file. Pairs are in `rlhf.offline.pairs`.

Every function here raises UserError for a row that can't be encoded, which it names by file and
row, and when no row is left. Rows with a column ``weight`` keep it, divided by its mean
(`row_weights`).
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conf.choices import RewrittenTurns
from rlhf.data.converting import Record
from rlhf.data.encoded import Encoded, Store, encoded
from rlhf.models import encoding
from rlhf.models.apart import encode_apart
from rlhf.models.encoding import (
    IGNORED,
    encode_completion,
    encode_conversation,
    encode_text,
    is_chat,
    prompt_ids,
)
from rlhf.offline.row_weights import COLUMN, normalised
from rlhf.types import Message, UserError

LOG = logging.getLogger("rlhf.stages")
Ids = list[int]
Row = dict[str, Any]
_TRAINED = "_trained"  # column: tokens of a row that train
_BATCH = 1000  # rows that are looked at together
NOWHERE = Store()


def require_template(
    tokenizer: Any, records: Sequence[Record], keys: Sequence[str], what: str
) -> None:
    """Raises UserError where some row is a conversation and the tokenizer has no template."""
    for record in records:
        if any(is_chat(record.value.get(key)) for key in keys):
            encoding.require_template(tokenizer, what)
            return


def with_weights(rows: Encoded, sizes: Sequence[int] | None = None) -> datasets.Dataset:
    """The rows with their weights over the mean in which row i counts `sizes[i]` times."""
    data = rows.data
    if COLUMN not in data.column_names:
        return data
    weights = normalised(data[COLUMN][:], sizes)
    return data.remove_columns(COLUMN).add_column(COLUMN, weights)


def weight_column(records: Sequence[Record]) -> dict[str, str]:
    """The column of weights, where the rows have them."""
    return {COLUMN: "number"} if COLUMN in records[0].value else {}


def batches(rows: datasets.Dataset) -> Iterator[pa.Table]:
    yield from rows.with_format("arrow").iter(batch_size=_BATCH)


def lengths(rows: datasets.Dataset, column: str) -> np.ndarray:
    """How many tokens each row has in `column`, [N]."""
    parts = [pc.list_value_length(batch[column]).to_numpy() for batch in batches(rows)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


# ---- SFT ----


def encode_sft_row(
    tokenizer: Any,
    row: Row,
    *,
    completion_only: bool,
    rewritten: RewrittenTurns = RewrittenTurns.split,
) -> list[tuple[Ids, Ids]]:
    """Token ids and labels of one row in a form of TRL's: text, prompt + completion, or messages;
    ``tools`` are what its conversation's template shows. Several where the template renders earlier
    answers otherwise (`encode_apart`).

    completion_only: what is not the assistant's has no label. Raises ValueError as the encoders.
    """
    if "text" in row:
        return [encode_text(tokenizer, row["text"])]
    tools = row.get("tools")
    given: Row = {"completion_only": completion_only, "tools": tools}
    messages, first = row.get("messages"), 0
    if messages is None:
        prompt, completion = row["prompt"], row["completion"]
        if not is_chat(completion):
            return [encode_completion(tokenizer, prompt, completion, **given)]
        if is_chat(prompt) and _is_one_answer(completion):
            return [encode_completion(tokenizer, prompt, completion[0], **given)]
        before = prompt if is_chat(prompt) else [{"role": "user", "content": prompt}]
        messages, first = [*before, *completion], len(before)
    if not completion_only:
        return [encode_conversation(tokenizer, messages, first=first, **given)]
    parts = encode_apart(tokenizer, messages, rewritten, first=first, tools=tools)
    return [(part.ids, part.labels) for part in parts]


def _is_one_answer(completion: Sequence[Message]) -> bool:
    if len(completion) != 1:
        return False
    return completion[0].get("role") == "assistant" and completion[0].get("train") is not False


def trained_tokens(labels: Sequence[int]) -> int:
    """Labels that train: the first token is never predicted."""
    return len(labels) - 1 - labels[1:].count(IGNORED) if labels else 0


@dataclass(frozen=True, slots=True)
class SFTEncoder:
    """``input_ids`` and ``labels`` of a row, or of the rows that it becomes; one with nothing to
    train within `max_length` tokens is left out. Counts what happens to them.
    """

    tokenizer: Any
    max_length: int
    completion_only: bool
    cut: bool
    carried: Mapping[str, str]
    rewritten: RewrittenTurns

    def options(self) -> dict[str, Any]:
        return {
            "cut": self.max_length if self.cut else None,
            "answers": self.completion_only,
            "rewritten": self.rewritten.value,
        }

    def columns(self) -> dict[str, str]:
        return {"input_ids": "ids", "labels": "ids", _TRAINED: "count", **self.carried}

    def __call__(self, value: Row, counts: Counter[str]) -> list[Row]:
        made = encode_sft_row(
            self.tokenizer,
            value,
            completion_only=self.completion_only,
            rewritten=self.rewritten,
        )
        counts["rows"] += len(made)
        if len(made) > 1:
            counts["apart"] += 1
            counts["parts"] += len(made)
        out = []
        limit = self.max_length if self.cut else None
        for ids, labels in made:
            counts["cut"] += limit is not None and len(ids) > limit
            trained = trained_tokens(labels[:limit])
            row = {"input_ids": ids[:limit], "labels": labels[:limit], _TRAINED: trained}
            if trained:
                out.append(row | carried_of(value, self))
        return out


def carried_of(value: Row, encode: Any) -> Row:
    return {name: value[name] for name in encode.carried}


def encode_sft(
    tokenizer: Any,
    records: Sequence[Record],
    *,
    name: str,
    max_length: int,
    completion_only: bool,
    cut: bool,
    rewritten: RewrittenTurns = RewrittenTurns.split,
    store: Store = NOWHERE,
) -> datasets.Dataset:
    """``input_ids`` and ``labels`` of SFT's rows, cut to `max_length` tokens when `cut` (packing
    splits them itself).

    Rows whose trained tokens all lie beyond the cut are left out; a warning counts both kinds.
    """
    require_template(tokenizer, records, ("prompt", "completion", "messages"), f"{name} data")
    carried = weight_column(records)
    encode = SFTEncoder(tokenizer, max_length, completion_only, cut, carried, rewritten)
    rows = encoded(encode, records, store, name)
    _tell_apart(rows.counts, name)
    total = rows.counts["rows"]
    if not len(rows.data):
        raise UserError(
            f"{name}: none of the {total} rows has a token to train within "
            f"stage.max_length={max_length} tokens."
        )
    shortened, dropped = rows.counts["cut"], total - len(rows.data)
    if shortened or dropped:
        LOG.warning(
            "%s: of %d rows, %d cut to stage.max_length=%d tokens, %d with nothing to train",
            name,
            total,
            shortened,
            max_length,
            dropped,
        )
    return with_weights(rows, rows.data[_TRAINED][:]).remove_columns(_TRAINED)


def _tell_apart(counts: Counter[str], name: str) -> None:
    """Warn of conversations whose earlier answers the template renders otherwise."""
    if counts["apart"]:
        LOG.warning(
            "%s: the chat template renders earlier answers of %d conversations otherwise once "
            "others follow: they are %d rows, each up to an answer, as a policy sees it "
            "(stage.rewritten_turns).",
            name,
            counts["apart"],
            counts["parts"],
        )


def sft_context(tokenizer: Any, row: Row) -> Ids:
    """What a sample starts from: the row's prompt, its conversation up to the first answer, or the
    first quarter of its text.
    """
    tools = row.get("tools")
    if "prompt" in row:
        return prompt_ids(tokenizer, row["prompt"], tools)
    if "messages" in row:
        roles = [message.get("role") for message in row["messages"]]
        first = roles.index("assistant") if "assistant" in roles else 0
        return prompt_ids(tokenizer, row["messages"][:first], tools) if first else []
    ids, _ = encode_text(tokenizer, row["text"])
    return ids[: max(1, len(ids) // 4)]
