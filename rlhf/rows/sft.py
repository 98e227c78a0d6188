"""Rows of supervised fine-tuning as token ids and labels: plain text, prompts with completions, or
conversations.

Raises UserError for a row that can't be encoded, which is named by file and row, and when no row
is left.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets

from conf.choices import RewrittenTurns
from rlhf.data.converting import Record
from rlhf.data.encoded import Store, encoded
from rlhf.data.loading import tell_unread
from rlhf.data.reading import DataRequest, sft_records
from rlhf.data.sources import data_files
from rlhf.models.conversations import encode_apart, encode_conversation
from rlhf.models.encoding import (
    IGNORED,
    encode_completion,
    encode_text,
    is_chat,
    prompt_ids,
)
from rlhf.models.templates import pictures_of, processor_of
from rlhf.rows.columns import (
    LOG,
    NOWHERE,
    SAMPLES,
    Ids,
    Row,
    carried_of,
    longest,
    parts_of,
    picture_column,
    require_template,
    shown_in,
    weight_column,
    with_weights,
)
from rlhf.types import WEIGHT, EncodedRows, Message, Picture, UserError

_TRAINED = "_trained"  # column: tokens of a row that train


@dataclass(frozen=True, slots=True)
class _Made:
    """A row as token ids."""

    ids: Ids
    labels: Ids
    shown: Row  # the column of its pictures


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
    made = _made(tokenizer, row, completion_only, rewritten)
    return [(one.ids, one.labels) for one in made]


def _made(
    tokenizer: Any, row: Row, completion_only: bool, rewritten: RewrittenTurns
) -> list[_Made]:
    if "text" in row:
        ids, labels = encode_text(tokenizer, row["text"])
        return [_Made(ids, labels, shown_in(tokenizer))]
    tools = row.get("tools")
    given: Row = {"completion_only": completion_only, "tools": tools}
    messages, first = row.get("messages"), 0
    if messages is None:
        prompt, completion = row["prompt"], row["completion"]
        answer = completion
        if is_chat(prompt) and is_chat(completion) and _is_one_answer(completion):
            answer = completion[0]
        if not is_chat(answer):
            ids, labels = encode_completion(tokenizer, prompt, answer, **given)
            return [_Made(ids, labels, shown_in(tokenizer, prompt))]
        before = prompt if is_chat(prompt) else [{"role": "user", "content": prompt}]
        messages, first = [*before, *completion], len(before)
    if not completion_only:
        ids, labels = encode_conversation(tokenizer, messages, first=first, **given)
        return [_Made(ids, labels, shown_in(tokenizer, messages))]
    parts = encode_apart(tokenizer, messages, rewritten, first=first, tools=tools)
    return [_Made(part.ids, part.labels, shown_in(tokenizer, part.messages)) for part in parts]


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
        columns = {"input_ids": "ids", "labels": "ids", _TRAINED: "count"}
        return {**columns, **picture_column(self.tokenizer), **self.carried}

    def __call__(self, value: Row, counts: Counter[str]) -> list[Row]:
        made = _made(self.tokenizer, value, self.completion_only, self.rewritten)
        processor = processor_of(self.tokenizer)
        counts["rows"] += len(made)
        if len(made) > 1:
            counts["apart"] += 1
            counts["parts"] += len(made)
        out = []
        limit = self.max_length if self.cut else None
        for one in made:
            ids, labels = one.ids, one.labels
            if processor is not None:
                labels = processor.unlabelled(ids, labels)
                if processor.features(ids[:limit]) < processor.features(ids):
                    counts["pictures cut"] += 1
                    continue
            counts["cut"] += limit is not None and len(ids) > limit
            trained = trained_tokens(labels[:limit])
            row = {"input_ids": ids[:limit], "labels": labels[:limit], _TRAINED: trained}
            if trained:
                out.append(row | one.shown | carried_of(value, self))
        return out


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
    if rows.counts["pictures cut"]:
        LOG.warning(
            "%s: of %d rows, %d are left out: a picture of theirs lies beyond stage.max_length=%d "
            "tokens",
            name,
            total,
            rows.counts["pictures cut"],
            max_length,
        )
    shortened, dropped = rows.counts["cut"], total - len(rows.data) - rows.counts["pictures cut"]
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
        before = _beginning(row)
        return prompt_ids(tokenizer, before, tools) if before else []
    ids, _ = encode_text(tokenizer, row["text"])
    return ids[: max(1, len(ids) // 4)]


def _beginning(row: Row) -> list[Message]:
    """A row's conversation up to the first answer; none of a text."""
    prompt: Any = row.get("prompt")
    if is_chat(prompt):
        return list(prompt)
    messages = row.get("messages") or []
    roles = [message.get("role") for message in messages]
    first = roles.index("assistant") if "assistant" in roles else 0
    return list(messages[:first])


# ---- the stage's rows ----


def read(request: DataRequest, tokenizer: Any) -> EncodedRows:
    """Read and encode the rows of ``stage=sft``. Raises UserError."""
    stage = request.stage
    train, held_out = sft_records(request)
    tell_unread(request.keys, tokenizer, stage.name)
    if stage.packing and WEIGHT in train[0].value:
        raise UserError(
            "stage.packing=true joins rows, and the rows' weights (column "
            f"{request.data.weight_column!r}) would be lost. Set stage.packing=false, or "
            "data.weight_column=null to weigh all rows the same."
        )
    encode = {
        "max_length": stage.max_length,
        "completion_only": stage.completion_only,
        "rewritten": stage.rewritten_turns,
        "store": Store.of(request),
    }
    rows = encode_sft(tokenizer, train, name="training", cut=not stage.packing, **encode)
    judged = None
    if held_out:
        judged = encode_sft(tokenizer, held_out, name="held-out", cut=True, **encode)
    started = list(_contexts(tokenizer, held_out or train))
    return EncodedRows(
        tokenizer,
        rows,
        judged,
        longest=max(longest(part, "input_ids") for part in parts_of(rows, judged)),
        files=tuple(data_files(request.data)),
        contexts=tuple(ids for ids, _ in started),
        shown=tuple(shown for _, shown in started),
    )


def _contexts(tokenizer: Any, records: Sequence[Record]) -> Iterator[tuple[Ids, list[Picture]]]:
    """What the first SAMPLES of `records` are continued from, with its pictures."""
    for record in islice(records, SAMPLES):
        # a row that can't be encoded was counted and left out
        with suppress(ValueError):
            yield sft_context(tokenizer, record.value), pictures_of(_beginning(record.value))
