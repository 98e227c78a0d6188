"""KTO: its trainer, and its own collator, by which answers meet another prompt (Ethayarajh et al.
2024).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trl import KTOTrainer

from rlhf.offline.likelihood import PreferenceTrainer


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


class KTO(PreferenceTrainer, KTOTrainer):
    """KTO, on single answers that are good or bad."""
