"""Rows of data sets as the token ids that TRL's trainers read, for SFT, reward models and
preference losses. Tokens come from `rlhf.models.encoding`, as in every stage.

Every function here raises UserError for a row that can't be encoded, which it names, and when no
row is left. Rows with a column ``weight`` keep it, divided by its mean (`row_weights`).
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from rlhf.models.encoding import (
    IGNORED,
    answer_ids,
    encode_answer,
    encode_completion,
    encode_conversation,
    encode_text,
    is_chat,
    prompt_ids,
    require_template,
    split_turn,
)
from rlhf.offline.row_weights import COLUMN, SOFT_LABEL, normalised
from rlhf.process import watchdog
from rlhf.types import Message, Tools, UserError

LOG = logging.getLogger("rlhf.stages")
Ids = list[int]
Row = dict[str, Any]


def _encode_all(
    rows: datasets.Dataset, what: str, encode: Callable[[Row], Row | None]
) -> tuple[list[Row], list[int]]:
    """The columns that `encode` makes of each row, with the row's weight, and the rows' numbers.
    Rows of which it makes None are left out.

    what: "training row", for messages. Raises UserError where `encode` raises ValueError.
    """
    kept: list[Row] = []
    numbers: list[int] = []
    for number, row in enumerate(rows):
        watchdog.alive()
        try:
            columns = encode(row)
        except ValueError as error:
            raise UserError(f"{what} {number}: {error}.") from error
        if columns is None:
            continue
        if COLUMN in row:
            columns[COLUMN] = row[COLUMN]
        kept.append(columns)
        numbers.append(number)
    return kept, numbers


def _dataset(rows: list[Row], sizes: Sequence[int] | None = None) -> datasets.Dataset:
    """Encoded rows as a data set, their weights over the mean in which row i counts `sizes[i]`
    times.
    """
    columns: dict[str, list[Any]] = {}
    for name in rows[0]:
        columns[name] = [row[name] for row in rows]
    if COLUMN in columns:
        columns[COLUMN] = normalised(columns[COLUMN], sizes)
    return datasets.Dataset.from_dict(columns)


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


# ---- SFT ----


def encode_sft_row(tokenizer: Any, row: Row, *, completion_only: bool) -> tuple[Ids, Ids]:
    """Token ids and labels of one row in a form of TRL's: text, prompt + completion, or messages.

    completion_only: what is not the assistant's has no label. Raises ValueError as the encoders.
    """
    if "text" in row:
        return encode_text(tokenizer, row["text"])
    given = {"completion_only": completion_only, "tools": row.get("tools")}
    if "messages" in row:
        return encode_conversation(tokenizer, row["messages"], **given)
    prompt, completion = row["prompt"], row["completion"]
    if not is_chat(completion):
        return encode_completion(tokenizer, prompt, completion, **given)
    if is_chat(prompt) and len(completion) == 1 and completion[0].get("role") == "assistant":
        return encode_completion(tokenizer, prompt, completion[0], **given)
    before = prompt if is_chat(prompt) else [{"role": "user", "content": prompt}]
    return encode_conversation(tokenizer, [*before, *completion], first=len(before), **given)


def trained_tokens(labels: Sequence[int]) -> int:
    """Labels that train: the first token is never predicted."""
    return sum(label != IGNORED for label in labels[1:])


def encode_sft(
    tokenizer: Any,
    rows: datasets.Dataset,
    *,
    name: str,
    max_length: int,
    completion_only: bool,
    cut: bool,
) -> datasets.Dataset:
    """``input_ids`` and ``labels`` of SFT's rows, cut to `max_length` tokens when `cut` (packing
    splits them itself).

    Rows whose trained tokens all lie beyond the cut are left out; a warning counts both kinds.
    """
    if any(is_chat(rows[0].get(key)) for key in ("prompt", "completion", "messages")):
        require_template(tokenizer, f"{name} data")
    shortened = 0

    def encode(row: Row) -> Row | None:
        nonlocal shortened
        ids, labels = encode_sft_row(tokenizer, row, completion_only=completion_only)
        if cut and len(ids) > max_length:
            ids, labels = ids[:max_length], labels[:max_length]
            shortened += 1
        return {"input_ids": ids, "labels": labels} if trained_tokens(labels) else None

    kept, _ = _encode_all(rows, f"{name} row", encode)
    if not kept:
        raise UserError(
            f"{name}: none of the {len(rows)} rows has a token to train within "
            f"stage.max_length={max_length} tokens."
        )
    dropped = len(rows) - len(kept)
    if shortened or dropped:
        LOG.warning(
            "%s: of %d rows, %d cut to stage.max_length=%d tokens, %d with nothing to train",
            name,
            len(rows),
            shortened,
            max_length,
            dropped,
        )
    return _dataset(kept, [trained_tokens(row["labels"]) for row in kept])


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


# ---- reward models ----


@dataclass(frozen=True, slots=True)
class EncodedPairs:
    """Pairs as the trainer reads them, and which rows they come from."""

    # chosen_ids, rejected_ids, margin or soft_label where the stage uses it, weight where the rows
    # have one
    data: datasets.Dataset
    rows: list[int]  # row number of each pair

    def longest(self) -> int:
        """Tokens of the longest answer with its prompt."""
        sides = (self.data["chosen_ids"], self.data["rejected_ids"])
        return max(len(ids) for side in sides for ids in side)


def encode_pairs(
    tokenizer: Any,
    rows: datasets.Dataset,
    *,
    name: str,
    max_length: int,
    margin: bool,
    soft_label: bool = False,
) -> EncodedPairs:
    """Token ids of both answers of every pair; a warning counts the pairs longer than `max_length`
    tokens, which are left out.

    A pair is never cut: the score is read at its last token. Raises UserError also for a missing or
    non-finite margin.
    """
    if is_chat(rows[0]["chosen"]):
        require_template(tokenizer, f"{name} pairs")
    if margin and "margin" not in rows.column_names:
        raise UserError(
            f"stage.margin=true, but the {name} pairs have no margin. Columns: "
            f"{', '.join(rows.column_names)}."
        )

    def encode(row: Row) -> Row | None:
        prompt, tools = row.get("prompt"), row.get("tools")
        columns: Row = {
            "chosen_ids": encode_answer(tokenizer, prompt, row["chosen"], tools),
            "rejected_ids": encode_answer(tokenizer, prompt, row["rejected"], tools),
        }
        if margin:
            if row["margin"] is None or not math.isfinite(row["margin"]):
                raise ValueError(f"margin is {row['margin']!r}, expected a finite number")
            columns["margin"] = float(row["margin"])
        elif soft_label:
            columns[SOFT_LABEL] = float(row[SOFT_LABEL])
        longest = max(len(columns["chosen_ids"]), len(columns["rejected_ids"]))
        return columns if longest <= max_length else None

    kept, numbers = _encode_all(rows, f"{name} pair", encode)
    if not kept:
        raise _none_left(name, len(rows), max_length, "pairs")
    _warn_of_long(name, len(kept), len(rows), max_length, "pairs")
    return EncodedPairs(_dataset(kept), numbers)


def padding_token(tokenizer: Any, *pairs: EncodedPairs) -> str:
    """A token that pads and occurs in no pair. Raises UserError when the whole vocabulary occurs.

    The classifier takes the last token that isn't padding as a row's last. Were padding the
    end-of-sequence token, as it is for many tokenizers, training would read the score one token
    before the end and scoring at the end.
    """
    used: set[int] = set()
    for group in pairs:
        for side in ("chosen_ids", "rejected_ids"):
            for ids in group.data[side]:
                used.update(ids)
    candidates = (
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
        *reversed(range(len(tokenizer))),
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
    contexts = [context for context, _ in parts]
    if any(context != contexts[0] for context in contexts):
        raise ValueError(
            "the answers must differ in their last message only, but the conversations differ "
            "earlier"
        )
    answered = [answer_ids(tokenizer, contexts[0], turn, tools) for _, turn in parts]
    return prompt_ids(tokenizer, contexts[0], tools), answered


def encode_preferences(
    tokenizer: Any, rows: datasets.Dataset, sides: Sequence[str], *, name: str, max_length: int
) -> datasets.Dataset:
    """``prompt_ids``, ``<side>_ids`` for each of `sides`, and ``label`` where the rows have one.

    Rows with a side of more than `max_length` tokens are left out, since an answer that is cut has
    no end to learn; a warning counts them.
    """
    if any(is_chat(rows[0].get(key)) for key in ("prompt", *sides)):
        require_template(tokenizer, f"{name} data")

    def encode(row: Row) -> Row | None:
        given = [row[side] for side in sides]
        context, answers = encode_sides(tokenizer, row.get("prompt"), given, row.get("tools"))
        if len(context) + max(map(len, answers)) > max_length:
            return None
        columns: Row = {"prompt_ids": context}
        for side, ids in zip(sides, answers, strict=True):
            columns[f"{side}_ids"] = ids
        if "label" in row:
            columns["label"] = row["label"]
        return columns

    kept, _ = _encode_all(rows, f"{name} row", encode)
    if not kept:
        raise _none_left(name, len(rows), max_length, "rows")
    _warn_of_long(name, len(kept), len(rows), max_length, "rows")
    return _dataset(kept)


def longest_row(rows: datasets.Dataset, *, mixed: bool = False) -> int:
    """Tokens of the longest sequence that a trainer builds of preference rows; `mixed`: any prompt
    may meet any answer (KTO's KL pairs).
    """
    sides = [c for c in rows.column_names if c.endswith("_ids") and c != "prompt_ids"]
    if mixed:
        answers = [len(ids) for side in sides for ids in rows[side]]
        return max(map(len, rows["prompt_ids"])) + max(answers)
    return max(len(row["prompt_ids"]) + len(row[side]) for row in rows for side in sides)


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

    return datasets.Dataset.from_list([columns(row) for row in rows])


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
