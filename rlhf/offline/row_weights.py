"""Rows that weigh more or less in the loss (column ``data.weight_column``), and pairs whose better
side is a probability (column ``soft_label``): the arithmetic. `rlhf/offline/trainers.py` says how
each trainer uses it.

Weights are divided by their mean over all rows (SFT: over the tokens that train), so their scale
means nothing and equal weights change nothing. The mean is not a batch's, which would make a row's
weight depend on the rows beside it.

Refused: packing, which joins rows of different weights, and the losses that sort a batch (aot),
which belong to no single row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.types import SOFT_LABEL, WEIGHT

CARRIED = (WEIGHT, SOFT_LABEL)  # columns that reach the loss
Inputs = dict[str, Any]  # a row or a batch, by column


def without_carried(row: Inputs) -> Inputs:
    """A row or batch without its weights and soft labels."""
    return {key: value for key, value in row.items() if key not in CARRIED}


@dataclass(frozen=True, slots=True)
class WithWeights:
    """A collator that adds the rows' weights and soft labels to the batch, [B] float32 each."""

    collate: Callable[[list[Inputs]], Inputs]

    def __call__(self, rows: list[Inputs]) -> Inputs:
        batch = dict(self.collate([without_carried(row) for row in rows]))
        for name in CARRIED:
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        return batch


def changed(model: Any, change: Callable[[Any], None]) -> Callable[..., Any]:
    """`model` as a function that applies `change` to its outputs, in place, before it returns
    them.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        outputs = model(*args, **kwargs)
        change(outputs)
        return outputs

    return call


def pair_loss(
    chosen: Tensor,
    rejected: Tensor,
    weights: Tensor | None,
    margin: Tensor | None,
    centering: float | None,
    soft_label: Tensor | None = None,
) -> Tensor:
    """A reward model's loss as TRL has it, with each pair's terms times its weight w: the mean over
    pairs of w (preference + centering (chosen + rejected)^2), in nats.

    chosen, rejected: scores [B]. weights, margin, soft_label: [B] or None. preference is
    -log sigmoid(chosen - rejected - margin), or with soft labels p the cross-entropy
    -(p log sigmoid(d) + (1 - p) log sigmoid(-d)) of d = chosen - rejected.
    `reward.losses.pairwise_loss` is the same without weights.
    """
    difference = chosen - rejected
    if margin is not None:
        difference = difference - margin
    preference = -F.logsigmoid(difference)
    if soft_label is not None:
        preference = soft_label * preference - (1 - soft_label) * F.logsigmoid(-difference)
    if weights is not None:
        preference = preference * weights
    loss = preference.mean()
    if centering is None:
        return loss
    square = (chosen + rejected) ** 2
    if weights is not None:
        square = square * weights
    return loss + centering * square.mean()


def scale_gradient(values: Tensor, weights: Tensor) -> None:
    """Multiply the gradient that flows into row i of `values` [N, ...] by weights[i mod B], where
    `weights` is [B] and N a multiple of B (TRL joins the chosen and the rejected rows).
    """
    if not values.requires_grad:
        return
    rows = weights.repeat(values.shape[0] // weights.shape[0])
    rows = rows.view(-1, *[1] * (values.dim() - 1))
    values.register_hook(lambda gradient: gradient * rows.to(gradient.dtype))
