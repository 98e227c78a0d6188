"""Rows that weigh more or less in the losses of TRL's trainers, by the column
``data.weight_column``; and pairs whose better side is a probability.

Weights are divided by their mean over the rows (SFT: over the tokens that train), so their scale
means nothing and equal ones change nothing; not by the mean of a batch, which would make a row's
weight hang on its neighbours. Each trainer is subclassed once:

    SFT          each token's loss times its row's weight; the loss divides by the number of tokens
    as before
    reward       each pair's loss times its weight, its centring term too
    DPO and its kin   (KTO, CPO, ORPO) TRL keeps the loss of a single row to itself, so the gradient
    that flows into a row's log-probabilities is
                 multiplied: the same update, since each row's loss depends on that row's
                 log-probabilities alone (KTO's KL estimate has no
                 gradient). The losses that are logged there are those of rows that weigh the same

Refused: packing, which joins rows of different weights, and the losses that sort a batch (aot),
which belong to no single row.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.types import UserError

COLUMN, SOFT_LABEL = "weight", "soft_label"
_CARRIED = (COLUMN, SOFT_LABEL)  # columns that reach the loss
Inputs = dict[str, Any]


def normalised(weights: Sequence[float], sizes: Sequence[int] | None = None) -> list[float]:
    """`weights` over their mean, in which each row counts `sizes` times (once without). Raises
    UserError when that mean is 0.
    """
    if len(set(weights)) == 1 and weights[0] > 0:
        return [1.0] * len(weights)
    counts = [1] * len(weights) if sizes is None else sizes
    mean = math.fsum(w * n for w, n in zip(weights, counts, strict=True)) / sum(counts)
    if mean <= 0:
        raise UserError(
            "data.weight_column: the weights of all rows that are short enough are 0, so nothing "
            "would be trained."
        )
    return [w / mean for w in weights]


def weigh(
    rows: datasets.Dataset, weights: Sequence[float] | None, sizes: Sequence[int] | None = None
) -> datasets.Dataset:
    """`rows` with their normalised weights as a column; as they are without weights. Raises
    UserError as `normalised`.
    """
    return rows if weights is None else rows.add_column(COLUMN, normalised(weights, sizes))


@dataclass(frozen=True, slots=True)
class WithWeights:
    """A collator that hands the weights and soft labels on, [B] float32 each."""

    collate: Callable[[list[Inputs]], Inputs]

    def __call__(self, rows: list[Inputs]) -> Inputs:
        batch = self.collate(
            [{key: value for key, value in row.items() if key not in _CARRIED} for row in rows]
        )
        return {
            **batch,
            **{
                name: torch.tensor([row[name] for row in rows], dtype=torch.float32)
                for name in _CARRIED
                if name in rows[0]
            },
        }


# (the trainer, its own compute_loss(model, inputs, return_outputs=), model, inputs, weights and
# soft labels [B], return_outputs) -> as compute_loss.
# Outputs are asked for where they are wanted only: SFTTrainer recomputes them by a pass of their
# own.
WeightedLoss = Callable[[Any, Callable[..., Any], Any, Inputs, dict[str, Tensor], bool], Any]


def weighted(trainer_class: type, loss: WeightedLoss) -> type:
    """`trainer_class` whose batches keep the weights (its collator, and the columns that it takes
    from the data), and whose loss then is `loss`.
    """

    class Weighted(trainer_class):
        data_collator: Any
        _signature_columns: Any

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.data_collator = WithWeights(self.data_collator)

        def _set_signature_columns_if_needed(self) -> None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = list(dict.fromkeys([*self._signature_columns, *_CARRIED]))

        def compute_loss(
            self,
            model: Any,
            inputs: Inputs,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            plain = functools.partial(super().compute_loss, num_items_in_batch=num_items_in_batch)
            carried = {key: inputs[key] for key in _CARRIED if key in inputs}
            if not carried:
                return plain(model, inputs, return_outputs=return_outputs)
            rest = {key: value for key, value in inputs.items() if key not in _CARRIED}
            return loss(self, plain, model, rest, carried, return_outputs)

    return Weighted


def changed(model: Any, change: Callable[[Any], None]) -> Callable[..., Any]:
    """`model` as a function whose outputs went through `change`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        outputs = model(*args, **kwargs)
        change(outputs)
        return outputs

    return call


def weighted_sft(trainer_class: type) -> type:
    """`trainer_class` (SFT) that multiplies the log-probabilities [B, L - 1], of which its loss is
    the sum, by the rows' weights.
    """

    def loss(
        trainer: Any,
        plain: Callable[..., Any],
        model: Any,
        inputs: Inputs,
        carried: dict[str, Tensor],
        return_outputs: bool,
    ) -> Any:
        weighed = False
        weights = carried[COLUMN]

        def weigh_tokens(outputs: Any) -> None:
            nonlocal weighed
            # TRL calls the model once more, for metrics that need whole logits
            if getattr(outputs, "log_probs", None) is not None:
                outputs.log_probs = outputs.log_probs * weights[:, None].to(outputs.log_probs.dtype)
                weighed = True

        result = plain(changed(model, weigh_tokens), inputs, return_outputs=return_outputs)
        if not weighed:
            raise RuntimeError(
                "SFTTrainer took its loss from something else than the model's log_probs, so the "
                "rows' weights went nowhere"
            )
        return result

    return weighted(trainer_class, loss)


def pair_loss(
    chosen: Tensor,
    rejected: Tensor,
    weights: Tensor | None,
    margin: Tensor | None,
    centering: float | None,
    soft_label: Tensor | None = None,
) -> Tensor:
    """Loss of scores [B], TRL's with each pair's terms times its weight: mean of w (preference +
    centering (chosen + rejected)^2).

    preference is -log sigmoid(chosen - rejected - margin), or with soft labels p the cross-entropy
    -(p log sigmoid(d) + (1 - p) log sigmoid(-d)) of d = chosen - rejected.
    `reward.losses.pairwise_loss` is the same without weights.
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    preference = -F.logsigmoid(difference)
    if soft_label is not None:
        preference = soft_label * preference - (1 - soft_label) * F.logsigmoid(-difference)
    loss = (preference if weights is None else preference * weights).mean()
    if centering is None:
        return loss
    square = (chosen + rejected) ** 2
    return loss + centering * (square if weights is None else square * weights).mean()


def decided_accuracy(trainer: Any, difference: Tensor, soft_label: Tensor) -> None:
    """The batch's pairs with a right answer, one by one, in place of what TRL just added to its
    accuracy: there each pair counts, as won by chosen.

    difference: chosen - rejected, [B]. A pair with a soft label of exactly 1/2 has no right answer.
    """
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    lean = soft_label - 0.5
    pairs = trainer.accelerator.gather_for_metrics(
        torch.stack([lean, (lean * difference.detach() > 0).to(lean.dtype)], dim=1)
    )
    metrics["accuracy"].pop()
    metrics["accuracy"].extend(pairs[pairs[:, 0] != 0, 1].tolist())
    if not metrics["accuracy"]:
        del metrics["accuracy"]


def weighted_reward(trainer_class: type) -> type:
    """`trainer_class` (reward) whose loss is `pair_loss` where rows have weights or soft labels;
    its metrics are TRL's, but `decided_accuracy`.
    """

    def loss(
        trainer: Any,
        plain: Callable[..., Any],
        model: Any,
        inputs: Inputs,
        carried: dict[str, Tensor],
        return_outputs: bool,
    ) -> Any:
        _, outputs = plain(model, inputs, return_outputs=True)
        chosen, rejected = torch.chunk(outputs.logits.squeeze(-1), chunks=2)
        soft_label = carried.get(SOFT_LABEL)
        value = pair_loss(
            chosen,
            rejected,
            carried.get(COLUMN),
            inputs.get("margin"),
            trainer.args.center_rewards_coefficient,
            soft_label,
        )
        if soft_label is not None:
            decided_accuracy(trainer, chosen - rejected, soft_label)
        return (value, outputs) if return_outputs else value

    return weighted(trainer_class, loss)


def scale_gradient(values: Tensor, weights: Tensor) -> None:
    """The gradient that flows into row i of `values` [N, ...] is multiplied by weights[i mod B]; N
    is a multiple of B.
    """
    if not values.requires_grad:
        return
    rows = weights.repeat(values.shape[0] // weights.shape[0]).view(-1, *[1] * (values.dim() - 1))
    values.register_hook(lambda gradient: gradient * rows.to(gradient.dtype))


def weighted_gradients(trainer_class: type) -> type:
    """`trainer_class` (DPO, KTO, CPO, ORPO) whose gradient of each row is multiplied by its weight;
    the loss that it returns is unweighted.
    """

    def loss(
        trainer: Any,
        plain: Callable[..., Any],
        model: Any,
        inputs: Inputs,
        carried: dict[str, Tensor],
        return_outputs: bool,
    ) -> Any:
        weights = carried[COLUMN]

        def scale(outputs: Any) -> None:
            scale_gradient(
                outputs.log_probs
                if getattr(outputs, "log_probs", None) is not None
                else outputs.logits,
                weights,
            )

        return plain(changed(model, scale), inputs, return_outputs=return_outputs)

    return weighted(trainer_class, loss)
