"""Pairs and judged answers as the token ids that the trainers of preference losses read.

Raises UserError for a row that can't be encoded, which is named by file and row, and when no row
is left.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from conf.choices import KTOLoss, PreferenceLoss
from conf.stages import KTOStage
from conf.training import SORTING
from rlhf.data.converting import Record
from rlhf.data.encoded import Store, encoded
from rlhf.data.loading import tell_unread
from rlhf.data.reading import DataRequest, preference_records, unpaired_records
from rlhf.data.sources import data_files
from rlhf.models.encoding import answer_ids, prompt_ids, split_turn
from rlhf.models.templates import row_pictures
from rlhf.rows.columns import (
    LOG,
    NOWHERE,
    SAMPLES,
    Ids,
    Row,
    carried_of,
    lengths,
    parts_of,
    picture_column,
    require_template,
    short_enough,
    shown_in,
    weight_column,
)
from rlhf.types import WEIGHT, EncodedRows, Message, Picture, Tools, UserError

# Ethayarajh et al. 2024, equation 8: weighted good answers for each weighted bad one
_BALANCE = (1.0, 4 / 3)


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
        return {"prompt_ids": "ids", **sides, **picture_column(self.tokenizer), **self.carried}

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
        before, _ = split_turn(value.get("prompt"), texts[0])
        return columns | shown_in(self.tokenizer, before) | carried_of(value, self)


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
    return short_enough(rows, len(records), name, max_length, "rows")


def longest_row(rows: datasets.Dataset, *, mixed: bool = False) -> int:
    """Tokens of the longest sequence that a trainer builds of preference rows; `mixed`: any prompt
    may meet any answer (KTO's KL pairs).
    """
    sides = [c for c in rows.column_names if c.endswith("_ids") and c != "prompt_ids"]
    prompts = lengths(rows, "prompt_ids")
    answers = np.max([lengths(rows, side) for side in sides], axis=0)
    return int(prompts.max() + answers.max() if mixed else (prompts + answers).max())


def preference_contexts(rows: datasets.Dataset, count: int) -> list[Ids]:
    """What `count` samples start from: prompts, each once; the first quarter of whole texts without
    one.
    """
    return [context for context, _ in _started(rows, count)]


def _started(rows: datasets.Dataset, count: int) -> list[tuple[Ids, list[Picture]]]:
    """`preference_contexts`, each with its pictures."""
    found: list[tuple[Ids, list[Picture]]] = []
    for row in rows:
        ids = row["chosen_ids"] if "chosen_ids" in row else row["completion_ids"]
        context = row["prompt_ids"] or ids[: max(1, len(ids) // 4)]
        one = (context, row_pictures(row))
        if one not in found:
            found.append(one)
        if len(found) == count:
            break
    return found


# ---- what single losses ask of the rows ----


def check_row_weights(
    column: str | None, losses: list[PreferenceLoss], rows: Sequence[Record]
) -> None:
    """Log what the rows' weights do. Raises UserError for losses that compare the sorted rows of a
    batch. column: ``data.weight_column``.
    """
    if WEIGHT not in rows[0].value:
        return
    sorting = [loss.value for loss in losses if loss in SORTING]
    if sorting:
        raise UserError(
            f"stage.losses={sorting[0]} sorts the rows of a batch, so no row has a loss that its "
            f"weight (column {column!r}) could multiply. "
            "Use another loss, or set data.weight_column=null to weigh all rows the same."
        )
    LOG.info(
        "the column %r multiplies each row's gradient; the losses that are logged weigh all rows "
        "the same",
        column,
    )


def without_lone_row(rows: datasets.Dataset, micro: int, name: str) -> datasets.Dataset:
    """`rows` less the last where it would be alone in its forward pass of `micro` rows, since its
    answer would meet its own prompt. Raises UserError for a single row.
    """
    if len(rows) % micro != 1:
        return rows
    if len(rows) == 1:
        raise UserError(
            f"{name}: one answer is too few: stage.loss=kto compares each with another's prompt."
        )
    LOG.warning(
        "%s: the last of %d rows is left out: it would be alone in its forward pass of %d rows",
        name,
        len(rows),
        micro,
    )
    return rows.select(range(len(rows) - 1))


def balance_note(
    good: int, bad: int, desirable_weight: float, undesirable_weight: float
) -> str | None:
    """What to set when the weighted counts of good and bad answers are out of the paper's range;
    None when they are within.
    """
    ratio = desirable_weight * good / (undesirable_weight * bad)
    low, high = _BALANCE
    if low <= round(ratio, 2) <= round(high, 2):
        return None
    wanted = undesirable_weight * bad / good
    return (
        f"{good} good and {bad} bad answers with weights {desirable_weight:g} and "
        f"{undesirable_weight:g}: the paper keeps their weighted ratio in "
        f"[1, 4/3], it is {ratio:.2f}. Set stage.desirable_weight to a value in "
        f"[{low * wanted:.3g}, {high * wanted:.3g}]."
    )


def check_balance(stage: KTOStage, train: datasets.Dataset) -> None:
    """Warn of good and bad answers out of balance. Raises UserError where all are of one kind."""
    good = sum(train["label"])
    if not 0 < good < len(train):
        kind = "good" if good else "bad"
        raise UserError(
            f"training: each of the {len(train)} answers of at most "
            f"stage.max_length={stage.max_length} tokens is judged {kind}."
        )
    note = balance_note(good, len(train) - good, stage.desirable_weight, stage.undesirable_weight)
    if note is not None:
        LOG.warning("%s", note)


# ---- the stage's rows ----


def read(request: DataRequest, tokenizer: Any, micro: int) -> EncodedRows:
    """Read and encode the rows of a preference stage, `micro` of them in a forward pass. Raises
    UserError.
    """
    stage = request.stage
    unpaired = isinstance(stage, KTOStage)
    sides: tuple[str, ...] = ("completion",) if unpaired else ("chosen", "rejected")
    records = unpaired_records if unpaired else preference_records
    raw_train, raw_held_out = records(request)
    tell_unread(request.keys, tokenizer, stage.name)
    check_row_weights(request.data.weight_column, getattr(stage, "losses", []), raw_train)
    encode = {"max_length": stage.max_length, "store": Store.of(request)}
    train = encode_preferences(tokenizer, raw_train, sides, name="training", **encode)
    held_out = None
    if raw_held_out:
        held_out = encode_preferences(tokenizer, raw_held_out, sides, name="held-out", **encode)
    if unpaired:
        train, held_out = _fit_for_kto(stage, train, held_out, micro, request.seed)
    # KTO's KL pairs may meet any prompt with any answer
    mixed = unpaired and stage.loss is KTOLoss.kto
    most = max(longest_row(rows, mixed=mixed) for rows in parts_of(train, held_out))
    started = _started(held_out or train, SAMPLES)
    return EncodedRows(
        tokenizer,
        train,
        held_out,
        longest=min(most, stage.max_length),
        files=tuple(data_files(request.data)),
        contexts=tuple(context for context, _ in started),
        shown=tuple(shown for _, shown in started),
    )


def _fit_for_kto(
    stage: KTOStage,
    train: datasets.Dataset,
    held_out: datasets.Dataset | None,
    micro: int,
    seed: int,
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Training and held-out answers of which none is alone in its forward pass. Raises
    UserError.
    """
    check_balance(stage, train)
    # A file sorted by label would give passes with nothing to compare.
    if held_out is not None:
        held_out = held_out.shuffle(seed=seed)
    if stage.loss is KTOLoss.kto:
        if held_out is not None:
            held_out = without_lone_row(held_out, micro, "held-out")
        if len(train) < stage.batch_size:  # otherwise every step is a whole batch
            train = without_lone_row(train, micro, "training")
    return train, held_out
