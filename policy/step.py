"""One optimizer step: micro-batches of rows or pairs through the policy and the critic, their
losses, and the figures of the whole step over all ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from conf.choices import KLEstimator, KLPlace, PolicyLoss
from conf.stages import OnlineStage
from policy.batching import masked_sum
from policy.engines.base import Brake, GradientNoise, NonFinite
from policy.forward import (
    SPARE,
    Models,
    Packs,
    Pair,
    PolicyPass,
    plan_passes,
    reference_pass,
    rows_of,
    run_policy,
    take_rows,
    write_rows,
)
from policy.kl import kl_per_token
from policy.losses import (
    aggregation_units,
    aggregation_weights,
    entropy_bonus,
    kl_loss,
    policy_loss,
    value_loss,
)
from policy.model import clip_scale, tending_of
from policy.preference import PairLogprobs, combined_loss
from policy.prepare import TrainBatch, correction
from rlhf.process import distributed

# Sums over the tokens (or pairs) of one optimizer step.
_NAMES = (
    "policy",
    "kl",
    "value",
    "entropy",
    "clipped",
    "value_clipped",
    "approxkl",
    "ratio",
    "weight",
    "correct",
    "margin",
)


class _Sums:
    """Named sums, reduced over ranks at the end of each optimizer step."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def add(self, **values: Tensor) -> None:
        """Add scalars in float64 where they are: a copy to the host would wait for the device.

        Their names stand in `_NAMES`: every rank reduces the same sums.
        """
        for name, value in values.items():
            if name not in _NAMES:
                raise KeyError(f"the sum {name!r} is not in _NAMES of policy/step.py")
            exact = value.detach().double()
            self.values[name] = self.values[name] + exact if name in self.values else exact

    def reduced(self) -> dict[str, float]:
        """Over all ranks. Collective, and the one copy to the host."""
        own = dict.fromkeys(_NAMES, 0.0)
        if self.values:
            own.update(
                zip(self.values, torch.stack(list(self.values.values())).tolist(), strict=True)
            )
        return dict(zip(_NAMES, distributed.all_sum(list(own.values())), strict=True))


@dataclass(slots=True)
class OptimizerStep:
    """One optimizer step over items: rows, or pairs of rows."""

    batch: TrainBatch
    models: Models
    stage: OnlineStage
    kl_coef: float
    constant_length: int
    train_policy: bool  # False: the critic alone trains
    # no pass ran before the update, so the logprobs before it are those of this pass
    only_pass: bool
    brake: Brake
    noise: GradientNoise | None = None  # of the policy's gradient
    sums: _Sums = field(default_factory=_Sums)
    # what the losses are divided by: counts over all micro-batches and ranks
    tokens: float = 0.0
    units: float = 0.0  # of policy.losses.aggregation_units
    pairs: float = 0.0

    @property
    def pairwise(self) -> bool:
        return self.stage.policy_loss is PolicyLoss.dpo

    def run(self, items: Sequence[Any]) -> dict[str, float] | None:
        """Figures over all ranks; None where no rank has anything to train. Collective."""
        batch = self.batch
        pairs: list[Pair] = []
        rows = list(items)
        if self.pairwise:
            pairs = list(items)
            rows = [row for pair in pairs for row in pair]
        own = batch.train_mask[rows]
        units = aggregation_units(own, self.stage.aggregation, self.constant_length)
        self.tokens, self.units, self.pairs = distributed.all_sum(
            [float(own.sum()), units, float(len(pairs))]
        )
        trained = self.pairs if self.pairwise else self.tokens
        if trained == 0:
            return None
        for engine in self._engines().values():
            tending_of(engine.module.model).clear()
        if self.noise is not None:
            self.noise.begin()
        micro_batches = plan_passes(batch.tokens, batch.groups, rows, self.models.layout, pairs)
        for number, packs in enumerate(micro_batches):
            self._micro_batch(packs, pairs, last=number == len(micro_batches) - 1)
        figures = self._checked_figures()
        figures |= {"policy/lr": self.models.policy.rate, "policy/grad_norm": 0.0}
        return figures | self._optimise()

    def _checked_figures(self) -> dict[str, float]:
        """The step's figures over all ranks. Raises NonFinite for a loss that is no finite number,
        or a spike. Collective.
        """
        total = self.sums.reduced()
        if not all(torch.isfinite(torch.tensor(list(total.values())))):
            raise NonFinite(
                f"loss/policy={total['policy']}, loss/value={total['value']}, "
                f"entropy={total['entropy']}"
            )
        figures = self._figures(total)
        losses = [name for name in ("loss/policy", "loss/value") if name in figures]
        self.brake.check("loss", {name: figures[name] for name in losses})
        return figures

    def _optimise(self) -> dict[str, float]:
        """The optimizers' steps and the norms of their gradients. No step is taken where an engine
        can tell before it that the gradient is bad. Raises NonFinite.
        """
        engines = self._engines()
        clipped = {name: engine.clip() for name, engine in engines.items()}
        known = {name: norm for name, norm in clipped.items() if norm is not None}
        self.brake.check("grad_norm", known)
        norms = {name: engine.step() for name, engine in engines.items()}
        unchecked = {name: norm for name, norm in norms.items() if name not in known}
        self.brake.check("grad_norm", unchecked)
        for name, engine in engines.items():
            scale = clip_scale(norms[name], engine.optim.max_grad_norm)
            tending_of(engine.module.model).after_step(engine.steps, engine.write, scale)
        if self.noise is not None and self.train_policy:
            self.noise.end(norms["policy/grad_norm"])
        return norms

    def _engines(self) -> dict[str, Any]:
        """Those that train, by the name of their gradient's norm."""
        engines = {"policy/grad_norm": self.models.policy} if self.train_policy else {}
        if self.models.critic is not None:
            engines["value/grad_norm"] = self.models.critic
        return engines

    def _with_penalty(self, loss: Tensor, engine: Any, *, last: bool) -> Tensor:
        """`loss` with the penalty of the model's method, once a step: in the last micro-batch, and
        in equal parts over the ranks, whose losses are added.
        """
        if not last:
            return loss
        penalty: Tensor = tending_of(engine.module.model).penalty()
        return loss + penalty / distributed.world_size()

    def _micro_batch(self, packs: Packs, pairs: Sequence[Pair], *, last: bool) -> None:
        """Forward and backward of one micro-batch; an empty one runs a row at weight 0, for the
        ranks that have rows.
        """
        spare = not packs
        packs = packs or SPARE
        if self.train_policy:
            self._policy(packs, pairs, spare=spare, last=last)
        if self.models.critic is not None:
            self._critic(rows_of(packs), spare=spare, last=last)

    def _policy(self, packs: Packs, pairs: Sequence[Pair], *, spare: bool, last: bool) -> None:
        batch, models = self.batch, self.models
        if self.only_pass and models.reference is not None:
            before = reference_pass(models, batch.tokens, packs)
            assert batch.ref_logprobs is not None
            write_rows(batch.ref_logprobs, before.rows, before.logprobs, before.batch.response_mask)
        done = run_policy(models.policy, batch.tokens, packs, models.layout)
        if self.only_pass and not spare:
            self._keep_measured(done)
        mask = self._train_mask(done.rows, done.batch.response_mask, spare=spare)
        if self.pairwise:
            own = [] if spare else pairs
            loss = self._pair_loss(done.rows, own, mask, done.logprobs)
        else:
            loss = self._token_loss(done.rows, mask, done.logprobs)
        bonus = entropy_bonus(done.entropy, mask, denominator=self.tokens)
        self.sums.add(entropy=bonus.detach())
        if self.stage.entropy_coef:
            loss = loss - self.stage.entropy_coef * bonus
        models.policy.backward(self._with_penalty(loss, models.policy, last=last), last=last)
        if self.noise is not None:
            units = len(done.rows) // 2 if self.pairwise else len(done.rows)
            self.noise.part(0 if spare else units)

    def _keep_measured(self, done: PolicyPass) -> None:
        """The logprobs of the only pass are those before the update."""
        batch, mask = self.batch, done.batch.response_mask
        assert batch.old_logprobs is not None and batch.entropy is not None
        write_rows(batch.old_logprobs, done.rows, done.logprobs.detach(), mask)
        write_rows(batch.entropy, done.rows, done.entropy.detach(), mask)

    def _train_mask(self, rows: list[int], response_mask: Tensor, *, spare: bool) -> Tensor:
        """[b, t] bool: the tokens of these rows that get a gradient; none in a spare pass."""
        if spare:
            return torch.zeros_like(response_mask)
        return response_mask & self.batch.keep[rows][:, None]

    def _token_loss(self, rows: list[int], mask: Tensor, logprobs: Tensor) -> Tensor:
        stage, batch, width = self.stage, self.batch, logprobs.shape[1]
        old = take_rows(batch.old_logprobs, rows, width)
        weights = aggregation_weights(mask, stage.aggregation)
        loss, stats = policy_loss(
            logprobs,
            old,
            take_rows(batch.advantages, rows, width),
            mask,
            kind=stage.policy_loss,
            cliprange=stage.cliprange,
            cliprange_high=stage.cliprange_high,
            dual_clip=stage.dual_clip,
            weights=self._importance_corrected(weights, rows, old, mask),
            denominator=self.units,
        )
        self.sums.add(
            policy=loss.detach(), clipped=stats.clipped, approxkl=stats.approxkl, ratio=stats.ratio
        )
        if stage.kl_place is KLPlace.reward or self.kl_coef <= 0:
            return loss
        kl = kl_loss(
            logprobs,
            take_rows(batch.ref_logprobs, rows, width),
            old,
            mask,
            estimator=stage.kl_loss_estimator,
            weights=weights,
            denominator=self.units,
        )
        self.sums.add(kl=kl.detach())
        return loss + self.kl_coef * kl

    def _importance_corrected(
        self, weights: Tensor, rows: list[int], old: Tensor, mask: Tensor
    ) -> Tensor:
        """The token weights [b, t], times the importance weights where the stage corrects."""
        sampled = take_rows(self.batch.rollout_logprobs, rows, old.shape[1])
        importance = correction(self.stage, old, sampled, mask)
        if importance is None:
            return weights
        self.sums.add(weight=torch.where(mask, importance, 0.0).sum())
        return weights * importance

    def _pair_loss(
        self, rows: list[int], pairs: Sequence[Pair], mask: Tensor, logprobs: Tensor
    ) -> Tensor:
        """Sum over this micro-batch's whole pairs, divided by the pairs of the step; 0 in a spare
        pass, which has none.
        """
        stage, width = self.stage, logprobs.shape[1]
        position = {row: i for i, row in enumerate(rows)}
        own = [(position[a], position[b]) for a, b in pairs if a in position]
        better, worse = [a for a, _ in own], [b for _, b in own]
        ref_logprobs = take_rows(self.batch.ref_logprobs, rows, width)
        sums = torch.where(mask, logprobs, 0.0).sum(dim=1)
        ref = torch.where(mask, ref_logprobs, 0.0).sum(dim=1)
        lengths = mask.sum(dim=1).float()
        loss = combined_loss(
            PairLogprobs(
                chosen=sums[better],
                rejected=sums[worse],
                ref_chosen=ref[better],
                ref_rejected=ref[worse],
                chosen_lengths=lengths[better],
                rejected_lengths=lengths[worse],
            ),
            stage.dpo_losses,
            stage.dpo_weights,
            beta=stage.dpo_beta,
            label_smoothing=stage.label_smoothing,
        )
        loss = loss.sum() / self.pairs
        ratios = (sums[better] - ref[better]) - (sums[worse] - ref[worse])
        margins = stage.dpo_beta * ratios.detach()
        old = take_rows(self.batch.old_logprobs, rows, width)
        approxkl = masked_sum(kl_per_token(old, logprobs.detach(), KLEstimator.k3), mask)
        self.sums.add(
            policy=loss.detach(),
            margin=margins.sum(),
            correct=(margins > 0).sum(),
            approxkl=approxkl,
        )
        return loss

    def _critic(self, rows: list[int], *, spare: bool, last: bool) -> None:
        critic, batch, stage = self.models.critic, self.batch, self.stage
        part = batch.tokens.select(rows)
        mask = self._train_mask(rows, part.response_mask, spare=spare)
        values = critic(part.input_ids, part.positions, **part.seen())
        width = values.shape[1]
        loss, clipped = value_loss(
            values,
            take_rows(batch.values, rows, width),
            take_rows(batch.returns, rows, width),
            mask,
            cliprange_value=stage.cliprange_value,
            denominator=self.tokens,
        )
        weighed = self._with_penalty(stage.vf_coef * loss, critic, last=last)
        critic.backward(weighed, last=last)
        self.sums.add(value=loss.detach(), value_clipped=clipped)

    def _figures(self, total: dict[str, float]) -> dict[str, float]:
        """Means from the sums of the step over all ranks."""
        stage, tokens = self.stage, max(self.tokens, 1.0)
        figures = {
            "loss/policy": total["policy"],
            "loss/entropy": total["entropy"],
            "policy/approxkl": total["approxkl"] / tokens,
        }
        if self.pairwise:
            figures["policy/pairs"] = self.pairs
            figures["policy/pair_margin"] = total["margin"] / self.pairs
            figures["policy/pair_accuracy"] = total["correct"] / self.pairs
        else:
            figures["policy/clipfrac"] = total["clipped"] / tokens
            figures["policy/ratio"] = total["ratio"] / tokens if self.train_policy else 1.0
        if stage.kl_place is not KLPlace.reward:
            figures["loss/kl"] = total["kl"]
        if stage.correction_cap is not None:
            figures["policy/importance_weight"] = total["weight"] / tokens
        if self.models.critic is not None:
            figures["loss/value"] = total["value"]
            figures["value/clipfrac"] = total["value_clipped"] / tokens
        return figures
