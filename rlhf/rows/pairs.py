"""Pairs as the token ids that a reward model's trainer reads.

Raises UserError for a row that can't be encoded, which is named by file and row, and when no pair
is left.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow.compute as pc

from rlhf.data.converting import Record
from rlhf.data.encoded import Store, encoded
from rlhf.data.loading import tell_unread
from rlhf.data.reading import DataRequest, check_first_strength, preference_records
from rlhf.data.sources import data_files
from rlhf.models.encoding import answer_ids, is_chat, prompt_ids, split_turn
from rlhf.models.turns import EMBEDDING_ROWS
from rlhf.rows.columns import (
    NOWHERE,
    Ids,
    Row,
    carried_of,
    longest,
    parts_of,
    picture_column,
    read_batches,
    require_template,
    short_enough,
    shown_in,
    weight_column,
)
from rlhf.types import SOFT_LABEL, EncodedRows, UserError

SIDES = ("chosen_ids", "rejected_ids")


@dataclass(frozen=True, slots=True)
class PairEncoder:
    """``chosen_ids`` and ``rejected_ids`` of a pair; one of more than `max_length` tokens is left
    out.
    """

    tokenizer: Any
    max_length: int
    margin: bool
    carried: Mapping[str, str]

    def options(self) -> dict[str, Any]:
        return {"longest": self.max_length}

    def columns(self) -> dict[str, str]:
        margin = {"margin": "number"} if self.margin else {}
        sides = {"chosen_ids": "ids", "rejected_ids": "ids"}
        return {**sides, **margin, **picture_column(self.tokenizer), **self.carried}

    def __call__(self, value: Row, counts: Counter[str]) -> Row | None:
        columns: Row = {}
        context: Any = None
        head: Ids = []
        shown: Row = {}
        for side in ("chosen", "rejected"):
            before, turn = split_turn(value.get("prompt"), value[side])
            if context is None or before != context:
                other = shown_in(self.tokenizer, before)
                if context is not None and other != shown:
                    raise ValueError("both answers must read the same pictures, in one order")
                context, head = before, prompt_ids(self.tokenizer, before, value.get("tools"))
                shown = other
            answer = answer_ids(self.tokenizer, before, turn, value.get("tools"))
            columns[f"{side}_ids"] = head + answer
        if self.margin:
            margin = value["margin"]
            if margin is None or not math.isfinite(margin):
                raise ValueError(f"margin is {margin!r}, expected a finite number")
            columns["margin"] = float(margin)
        if max(map(len, (columns["chosen_ids"], columns["rejected_ids"]))) > self.max_length:
            return None
        return columns | shown | carried_of(value, self)


def encode_pairs(
    tokenizer: Any,
    records: Sequence[Record],
    *,
    name: str,
    max_length: int,
    margin: bool,
    soft_label: bool = False,
    store: Store = NOWHERE,
) -> datasets.Dataset:
    """Token ids of both answers of every pair: chosen_ids, rejected_ids, margin or soft_label where
    the stage uses it, weight where the rows have one. A warning counts the pairs longer than
    `max_length` tokens, which are left out.

    A pair is never cut: the score is read at its last token. Raises UserError also for a missing or
    non-finite margin.
    """
    require_template(tokenizer, records, ("prompt", "chosen", "rejected"), f"{name} pairs")
    first = records[0].value
    if margin and "margin" not in first:
        raise UserError(
            f"stage.margin=true, but the {name} pairs have no margin. Columns: {', '.join(first)}."
        )
    carried = weight_column(records)
    if soft_label and not margin:
        carried = {SOFT_LABEL: "number", **carried}
    rows = encoded(PairEncoder(tokenizer, max_length, margin, carried), records, store, name)
    return short_enough(rows, len(records), name, max_length, "pairs")


def padding_token(tokenizer: Any, *pairs: datasets.Dataset) -> str:
    """A token that pads and occurs in no pair. Raises UserError when the whole vocabulary occurs.

    The classifier takes the last token that isn't padding as a row's last. Were padding the
    end-of-sequence token, as it is for many tokenizers, training would read the score one token
    before the end and scoring at the end.
    """
    used: set[int] = set()
    for group in pairs:
        for batch in read_batches(group):
            for side in SIDES:
                used.update(pc.unique(pc.list_flatten(batch[side])).to_pylist())
    candidates = (
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
        *reversed(range(vars(tokenizer).get(EMBEDDING_ROWS, len(tokenizer)))),
    )
    for token_id in candidates:
        if token_id is not None and token_id != tokenizer.eos_token_id and token_id not in used:
            return str(tokenizer.convert_ids_to_tokens(token_id))
    raise UserError(
        "every token of the tokenizer's vocabulary occurs in the pairs, so none is left for "
        "padding: add a pad token to the tokenizer."
    )


# ---- the stage's rows ----


def check_first(request: DataRequest) -> None:
    """The first rows have the margin or the soft label that the stage asks for. Raises
    UserError.
    """
    if request.stage.margin or request.stage.soft_label:
        check_first_strength(request)


def read(request: DataRequest, tokenizer: Any) -> EncodedRows:
    """Read and encode the pairs of ``stage=reward``; the tokenizer's padding is a token that occurs
    in none. Raises UserError.
    """
    stage = request.stage
    train, held_out = preference_records(request)
    tell_unread(request.keys, tokenizer, stage.name)
    encode = {
        "max_length": stage.max_length,
        "margin": stage.margin,
        "soft_label": stage.soft_label,
        "store": Store.of(request),
    }
    rows = encode_pairs(tokenizer, train, name="training", **encode)
    judged = encode_pairs(tokenizer, held_out, name="held-out", **encode) if held_out else None
    tokenizer.pad_token = padding_token(tokenizer, *parts_of(rows, judged))
    return EncodedRows(
        tokenizer,
        rows,
        judged,
        longest=max(longest(part, *SIDES) for part in parts_of(rows, judged)),
        files=tuple(data_files(request.data)),
        conversational=is_chat(train[0].value["chosen"]),
    )
