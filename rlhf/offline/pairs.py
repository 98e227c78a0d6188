"""Pairs and judged answers as the token ids that TRL's trainers read, for reward models and
preference losses. What is said in `rlhf.offline.rows` holds here too.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from rlhf.data.converting import Record
from rlhf.data.encoded import Encoded, Store, encoded
from rlhf.models.encoding import IGNORED, answer_ids, prompt_ids, split_turn
from rlhf.models.turns import EMBEDDING_ROWS
from rlhf.offline.row_weights import COLUMN, SOFT_LABEL
from rlhf.offline.rows import (
    NOWHERE,
    Ids,
    Row,
    batches,
    carried_of,
    lengths,
    require_template,
    weight_column,
    with_weights,
)
from rlhf.types import Message, Tools, UserError

LOG = logging.getLogger("rlhf.stages")


def _warn_of_long(name: str, kept: int, total: int, max_length: int, rows: str) -> None:
    if kept < total:
        LOG.warning(
            "%s: %d of %d %s are longer than stage.max_length=%d tokens and are left out",
            name,
            total - kept,
            total,
            rows,
            max_length,
        )


def _none_left(name: str, total: int, max_length: int, rows: str) -> UserError:
    return UserError(
        f"{name}: each of the {total} {rows} is longer than stage.max_length={max_length} tokens."
    )


def _short_enough(
    rows: Encoded, total: int, name: str, max_length: int, what: str
) -> datasets.Dataset:
    """The rows that were kept, with a warning of those that were too long. Raises UserError."""
    total -= rows.bad
    if not len(rows.data):
        raise _none_left(name, total, max_length, what)
    _warn_of_long(name, len(rows.data), total, max_length, what)
    return with_weights(rows)


# ---- reward models ----


@dataclass(frozen=True, slots=True)
class EncodedPairs:
    """Pairs as the trainer reads them."""

    # chosen_ids, rejected_ids, margin or soft_label where the stage uses it, weight where the rows
    # have one
    data: datasets.Dataset

    def longest(self) -> int:
        """Tokens of the longest answer with its prompt."""
        return max(int(lengths(self.data, side).max()) for side in ("chosen_ids", "rejected_ids"))


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
        return {"chosen_ids": "ids", "rejected_ids": "ids", **margin, **self.carried}

    def __call__(self, value: Row, counts: Counter[str]) -> Row | None:
        columns: Row = {}
        context: Any = None
        head: Ids = []
        for side in ("chosen", "rejected"):
            before, turn = split_turn(value.get("prompt"), value[side])
            if context is None or before != context:
                context, head = before, prompt_ids(self.tokenizer, before, value.get("tools"))
            answer = answer_ids(self.tokenizer, before, turn, value.get("tools"))
            columns[f"{side}_ids"] = head + answer
        if self.margin:
            margin = value["margin"]
            if margin is None or not math.isfinite(margin):
                raise ValueError(f"margin is {margin!r}, expected a finite number")
            columns["margin"] = float(margin)
        if max(map(len, (columns["chosen_ids"], columns["rejected_ids"]))) > self.max_length:
            return None
        return columns | carried_of(value, self)


def encode_pairs(
    tokenizer: Any,
    records: Sequence[Record],
    *,
    name: str,
    max_length: int,
    margin: bool,
    soft_label: bool = False,
    store: Store = NOWHERE,
) -> EncodedPairs:
    """Token ids of both answers of every pair; a warning counts the pairs longer than `max_length`
    tokens, which are left out.

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
    return EncodedPairs(_short_enough(rows, len(records), name, max_length, "pairs"))


def padding_token(tokenizer: Any, *pairs: EncodedPairs) -> str:
    """A token that pads and occurs in no pair. Raises UserError when the whole vocabulary occurs.

    The classifier takes the last token that isn't padding as a row's last. Were padding the
    end-of-sequence token, as it is for many tokenizers, training would read the score one token
    before the end and scoring at the end.
    """
    used: set[int] = set()
    for group in pairs:
        for batch in batches(group.data):
            for side in ("chosen_ids", "rejected_ids"):
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


# ---- preference losses ----


def encode_sides(
    tokenizer: Any,
    prompt: str | list[Message] | None,
    answers: Sequence[str | list[Message]],
    tools: Tools | None = None,
) -> tuple[Ids, list[Ids]]:
    """Token ids of the context that all `answers` share, and of each answer with its
    end-of-sequence token.

    Raises ValueError as `split_turn`, and for conversations that differ before their last message.
    """
    parts = [split_turn(prompt, answer) for answer in answers]
    context = parts[0][0]
    if any(other != context for other, _ in parts):
        raise ValueError(
            "the answers must differ in their last message only, but the conversations differ "
            "earlier"
        )
    sides = [answer_ids(tokenizer, context, turn, tools) for _, turn in parts]
    return prompt_ids(tokenizer, context, tools), sides


@dataclass(frozen=True, slots=True)
class PreferenceEncoder:
    """``prompt_ids`` and ``<side>_ids`` of a row; one of more than `max_length` tokens is left
    out.
    """

    tokenizer: Any
    sides: tuple[str, ...]
    max_length: int
    carried: Mapping[str, str]

    def options(self) -> dict[str, Any]:
        return {"longest": self.max_length, "sides": list(self.sides)}

    def columns(self) -> dict[str, str]:
        sides = {f"{side}_ids": "ids" for side in self.sides}
        return {"prompt_ids": "ids", **sides, **self.carried}

    def __call__(self, value: Row, counts: Counter[str]) -> Row | None:
        texts = [value[side] for side in self.sides]
        context, answers = encode_sides(
            self.tokenizer, value.get("prompt"), texts, value.get("tools")
        )
        if len(context) + max(map(len, answers)) > self.max_length:
            return None
        columns: Row = {"prompt_ids": context}
        for side, ids in zip(self.sides, answers, strict=True):
            columns[f"{side}_ids"] = ids
        return columns | carried_of(value, self)


def encode_preferences(
    tokenizer: Any,
    records: Sequence[Record],
    sides: Sequence[str],
    *,
    name: str,
    max_length: int,
    store: Store = NOWHERE,
) -> datasets.Dataset:
    """``prompt_ids``, ``<side>_ids`` for each of `sides`, and ``label`` where the rows have one.

    Rows with a side of more than `max_length` tokens are left out, since an answer that is cut has
    no end to learn; a warning counts them.
    """
    require_template(tokenizer, records, ("prompt", *sides), f"{name} data")
    label = {"label": "flag"} if "label" in records[0].value else {}
    encode = PreferenceEncoder(
        tokenizer, tuple(sides), max_length, {**label, **weight_column(records)}
    )
    rows = encoded(encode, records, store, name)
    return _short_enough(rows, len(records), name, max_length, "rows")


def longest_row(rows: datasets.Dataset, *, mixed: bool = False) -> int:
    """Tokens of the longest sequence that a trainer builds of preference rows; `mixed`: any prompt
    may meet any answer (KTO's KL pairs).
    """
    sides = [c for c in rows.column_names if c.endswith("_ids") and c != "prompt_ids"]
    prompts = lengths(rows, "prompt_ids")
    answers = np.max([lengths(rows, side) for side in sides], axis=0)
    return int(prompts.max() + answers.max() if mixed else (prompts + answers).max())


def labelled(rows: datasets.Dataset) -> datasets.Dataset:
    """Encoded pairs in the columns of TRL's CPO and ORPO collator: whole sequences, and labels that
    leave the prompt out.
    """

    def columns(row: Row) -> Row:
        out: Row = {COLUMN: row[COLUMN]} if COLUMN in row else {}
        for side in ("chosen", "rejected"):
            context, answer = row["prompt_ids"], row[f"{side}_ids"]
            out[f"{side}_input_ids"] = context + answer
            out[f"{side}_attention_mask"] = [1] * (len(context) + len(answer))
            out[f"{side}_labels"] = [IGNORED] * len(context) + answer
        return out

    return rows.map(columns, remove_columns=rows.column_names)


def preference_contexts(rows: datasets.Dataset, count: int) -> list[Ids]:
    """What `count` samples start from: prompts, each once; the first quarter of whole texts without
    one.
    """
    contexts: list[Ids] = []
    for row in rows:
        ids = row["chosen_ids"] if "chosen_ids" in row else row["completion_ids"]
        context = row["prompt_ids"] or ids[: max(1, len(ids) // 4)]
        if context not in contexts:
            contexts.append(context)
        if len(contexts) == count:
            break
    return contexts
