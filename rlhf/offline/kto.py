"""KTO's own needs: answers that meet another prompt, batches of at least two, and a balance of good
and bad answers (Ethayarajh et al. 2024).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from conf.stages import KTOStage
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.stages")
_BALANCE = (1.0, 4 / 3)  # equation 8: weighted good answers for each weighted bad one


def mismatch_shift(prompts: Sequence[list[int]]) -> int:
    """By how many rows to rotate the answers of a batch so that the fewest meet a prompt equal to
    their own; 0 for a single row.
    """
    count = len(prompts)
    if count <= 1:
        return 0

    def equal_prompts(shift: int) -> int:
        return sum(prompts[i] == prompts[i - shift] for i in range(count))

    return min(range(1, count), key=equal_prompts)


@dataclass(frozen=True, slots=True)
class KLPairs:
    """A collator that gives each row of a batch the answer of another row, from which KTO estimates
    its KL divergence, and then collates as TRL does.

    TRL pairs rows once for the whole file and then must read it in order. Paired here, a shuffled
    batch holds its own pairs, and both estimates of a batch come from the same answers.
    """

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        shift = mismatch_shift([row["prompt_ids"] for row in rows])
        paired = [
            {**row, "KL_completion_ids": rows[i - shift]["completion_ids"]}
            for i, row in enumerate(rows)
        ]
        return self.collate(paired)


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
