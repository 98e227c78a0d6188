"""What the trainers of preferences share; and DPO, CPO and ORPO: losses of pairs with a term for
the likelihood of the chosen answer.

TRL takes that term as a mean over a micro-batch's tokens, so how a batch is split would change the
update: a short answer in a small micro-batch would weigh more. Here it is a mean over the tokens of
the whole optimizer step, on all ranks, and over all held-out tokens in an evaluation.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from conf.choices import PreferenceLoss
from rlhf.models.encoding import IGNORED
from rlhf.offline import step_rows
from rlhf.offline.picture_rows import seeing
from rlhf.offline.private_hooks import CPOTrainer, DPOTrainer, ORPOTrainer
from rlhf.offline.trainers import Carried, Inputs, Loss, StageTrainer
from rlhf.process import distributed
from rlhf.types import WEIGHT


class PreferenceTrainer(StageTrainer):
    """What DPO, KTO, CPO and ORPO share: rows of token ids, and weighted gradients.

    TRL keeps the loss of a single row to itself, so a row's weight multiplies the gradient that
    flows into the row's log-probabilities. The update is the same, since each row's loss depends on
    its own log-probabilities alone (KTO's KL estimate has no gradient). The logged losses are those
    of rows that weigh the same.
    """

    pretokenised = True

    def weighted_loss(
        self, plain: Loss, model: Any, inputs: Inputs, carried: Carried, return_outputs: bool
    ) -> Any:
        def scale(outputs: Any) -> None:
            values = getattr(outputs, "log_probs", None)
            if values is None:
                values = outputs.logits
            step_rows.scale_gradient(values, carried[WEIGHT])

        return plain(step_rows.changed(model, scale), inputs, return_outputs=return_outputs)


class OverStep(PreferenceTrainer):
    """The likelihood term as a mean over the tokens of a step."""

    # tokens of the likelihood term for each pair: of the optimizer step, and of the held-out rows
    step_tokens = 0.0
    held_out_tokens = 0.0

    def likelihood_mask(self, batch: Inputs) -> Tensor:
        """[B, L] bool: the chosen tokens whose likelihood is part of the loss."""
        raise NotImplementedError

    def _tokens(self, batch: Inputs) -> tuple[float, float]:
        """Tokens of the likelihood term in a micro-batch, of which none predicts the first, and its
        pairs.
        """
        mask = self.likelihood_mask(batch)
        return float(mask[:, 1:].sum()), float(len(mask))

    def _per_pair(self, micro_batches: Any) -> float:
        """Tokens for each pair of these micro-batches, over all ranks. A collective."""
        counts = [self._tokens(batch) for batch in micro_batches]
        tokens, pairs = distributed.all_sum([sum(part) for part in zip(*counts, strict=True)])
        return tokens / pairs

    def begin_optimizer_step(self, micro_batches: Sequence[Inputs]) -> None:
        self.step_tokens = self._per_pair(micro_batches)

    def begin_evaluation(self, micro_batches: Any) -> None:
        """Count the held-out tokens, the first time."""
        if not self.held_out_tokens:
            self.held_out_tokens = self._per_pair(micro_batches)

    def share(self, batch: Inputs) -> float:
        """What a mean over this micro-batch's tokens is multiplied by: with its pairs' share of the
        step, which multiplies its whole loss, it then is the share of its tokens.
        """
        tokens, pairs = self._tokens(batch)
        mean = self.step_tokens if self.model.training else self.held_out_tokens
        # outside of steps and evaluations a micro-batch is by itself
        return tokens / pairs / mean if mean else 1.0


class DPO(OverStep, DPOTrainer):
    """DPO and the losses of its family; ``sft`` among them is the likelihood term."""

    loss_weights: list[float]

    def likelihood_mask(self, batch: Inputs) -> Tensor:
        chosen: Tensor = batch["completion_mask"].chunk(2)[0] == 1
        return chosen

    def compute_loss(self, model: Any, inputs: Inputs, *args: Any, **kwargs: Any) -> Any:
        given, name = self.loss_weights, PreferenceLoss.sft.value
        if name in self.loss_types:
            share = self.share(inputs)
            factors = [share if loss == name else 1.0 for loss in self.loss_types]
            self.loss_weights = [w * f for w, f in zip(given, factors, strict=True)]
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.loss_weights = given


class WithLikelihood(OverStep):
    """What CPO and ORPO share. Also logs ``num_tokens`` as TRL's other trainers do, the tokens
    trained on so far over all ranks.
    """

    tokens_seen = 0

    def concatenated_forward(self, model: Any, batch: Inputs) -> tuple[Any, ...]:
        """TRL's outputs, of which the fifth is the likelihood term."""
        model = seeing(model, self.processing_class, batch)
        outputs = list(super().concatenated_forward(model, batch))
        outputs[4] = outputs[4] * self.share(batch)
        return tuple(outputs)

    def restore_token_count(self, tokens: float) -> None:
        self.tokens_seen = int(tokens)

    def get_batch_loss_metrics(
        self, model: Any, batch: dict[str, Any], train_eval: str = "train"
    ) -> Any:
        if train_eval == "train":
            masks = [mask for key, mask in batch.items() if key.endswith("_attention_mask")]
            counted = sum(mask.sum() for mask in masks)
            self.tokens_seen += int(self.accelerator.gather_for_metrics(counted).sum())
        return super().get_batch_loss_metrics(model, batch, train_eval=train_eval)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["num_tokens"] = float(self.tokens_seen)
        super().log(logs, start_time)


class CPO(WithLikelihood, CPOTrainer):
    """CPO and SimPO, which need no reference. The likelihood is that of the answer."""

    def likelihood_mask(self, batch: Inputs) -> Tensor:
        mask: Tensor = batch["chosen_labels"] != IGNORED
        return mask


class ORPO(WithLikelihood, ORPOTrainer):
    """ORPO, which needs no reference. The likelihood is that of prompt and answer, as in TRL."""

    def likelihood_mask(self, batch: Inputs) -> Tensor:
        mask: Tensor = batch["chosen_attention_mask"] == 1
        return mask
