"""The update: epochs x minibatches x micro-batches over one step's rollouts, the same gradient
however it is split.
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from conf.choices import KLEstimator, KLPlace, OnNonFinite, PolicyLoss
from conf.stages import OnlineStage
from policy.engines.base import NonFinite
from policy.engines.spikes import Brake
from policy.kl import kl_per_token
from policy.losses import (
    aggregation_units,
    aggregation_weights,
    entropy_bonus,
    importance_weights,
    kl_loss,
    policy_loss,
    value_loss,
)
from policy.preference import PairLogprobs, combined_loss
from policy.prepare import Layout, Packs, TrainBatch, adapter_disabled, plan, run_policy
from policy.shapes import masked_sum
from rlhf.process import distributed

LOG = logging.getLogger("policy.update")
Pair = tuple[int, int]
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
        self.values = dict.fromkeys(_NAMES, 0.0)

    def add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            self.values[name] += float(value)

    def reduced(self) -> dict[str, float]:
        return dict(zip(_NAMES, distributed.all_sum([self.values[n] for n in _NAMES]), strict=True))


def update(
    batch: TrainBatch,
    *,
    policy: Any,
    critic: Any,
    reference: Any,
    stage: OnlineStage,
    layout: Layout,
    kl_coef: float,
    constant_length: int,
    seed: int,
    train_policy: bool = True,
    brake: Brake | None = None,
) -> dict[str, float]:
    """Take the step's optimizer steps. Returns means over all of them (policy/clipfrac,
    policy/approxkl, loss/policy, ...).

    `seed` draws the minibatches; every rank holds as many. `reference` is used where `batch` has no
    reference logprobs yet: then the one pass of this update measures old, entropy and reference
    logprobs on its way and leaves them in `batch`. A minibatch in which no rank has a token to
    train takes no optimizer step. `brake` looks for spikes. Raises NonFinite: a bad loss or
    gradient is never applied; with stage.on_nonfinite=skip it is left out instead, and
    policy/skipped counts it.
    """
    brake = brake or Brake(None, None, 1)
    policy.module.train()
    if critic is not None:
        critic.module.train()
    if batch.old_logprobs is None:
        batch.old_logprobs, batch.entropy = (
            torch.zeros_like(batch.rollout_logprobs),
            torch.zeros_like(batch.rollout_logprobs),
        )
        batch.ref_logprobs = (
            torch.zeros_like(batch.rollout_logprobs) if reference is not None else None
        )
        measure = _Measure(batch, policy, reference)
    else:
        measure = None
    generator = torch.Generator().manual_seed(seed)
    items: list[Any] = (
        list(batch.pairs)
        if stage.policy_loss is PolicyLoss.dpo
        else batch.keep.nonzero().flatten().tolist()
    )
    history: list[dict[str, float]] = []
    stopped = skipped = 0.0
    for _ in range(stage.epochs):
        order = torch.randperm(len(items), generator=generator).tolist()
        for number in range(stage.minibatches):
            chosen = [
                items[i]
                for i in order[
                    len(order) * number // stage.minibatches : len(order)
                    * (number + 1)
                    // stage.minibatches
                ]
            ]
            step = _Step(
                batch,
                policy,
                critic,
                stage,
                layout,
                kl_coef,
                constant_length,
                train_policy,
                measure,
                brake,
            )
            try:
                figures = step.run(chosen)
            except NonFinite as error:
                for engine in (policy, critic):
                    if engine is not None:
                        engine.discard()
                if stage.on_nonfinite is not OnNonFinite.skip:
                    raise
                LOG.warning("an update was left out (stage.on_nonfinite=skip): %s", error)
                skipped += 1
                continue
            if figures is None:
                continue
            history.append(figures)
            if stage.stop_kl is not None and figures["policy/approxkl"] > stage.stop_kl:
                stopped = 1.0
                break
        if stopped:
            break
    means = (
        {name: sum(h[name] for h in history) / len(history) for name in history[0]}
        if history
        else {}
    )
    return means | {
        "policy/updates": float(len(history)),
        "policy/stopped_early": stopped,
        "policy/skipped": skipped,
    }


class _Measure:
    """Takes old, entropy and reference logprobs from the only pass that an update makes."""

    def __init__(self, batch: TrainBatch, policy: Any, reference: Any) -> None:
        self.batch, self.policy, self.reference = batch, policy, reference

    def reference_of(self, packs: Packs, layout: Layout) -> None:
        """Reference logprobs of one micro-batch: the policy's own weights with the adapter off, or
        the frozen copy.
        """
        if self.reference is None:
            return
        adapter = self.reference == "adapter"
        with torch.no_grad(), adapter_disabled(self.policy) if adapter else nullcontext():
            rows, part, logprobs, _ = run_policy(
                self.policy if adapter else self.reference, self.batch.tokens, packs, layout
            )
        assert self.batch.ref_logprobs is not None
        _put(self.batch.ref_logprobs, rows, torch.where(part.response_mask, logprobs, 0.0))

    def policy_of(
        self, rows: Sequence[int], mask: Tensor, logprobs: Tensor, entropy: Tensor
    ) -> None:
        assert self.batch.old_logprobs is not None and self.batch.entropy is not None
        _put(self.batch.old_logprobs, rows, torch.where(mask, logprobs.detach(), 0.0))
        _put(self.batch.entropy, rows, torch.where(mask, entropy.detach(), 0.0))


def _put(whole: Tensor, rows: Sequence[int], piece: Tensor) -> None:
    whole[list(rows), : piece.shape[1]] = piece


class _Step:
    """One optimizer step over `items`: rows, or pairs of rows."""

    def __init__(
        self,
        batch: TrainBatch,
        policy: Any,
        critic: Any,
        stage: OnlineStage,
        layout: Layout,
        kl_coef: float,
        constant_length: int,
        train_policy: bool,
        measure: _Measure | None,
        brake: Brake,
    ) -> None:
        self.brake = brake
        self.batch, self.policy, self.critic, self.stage, self.layout = (
            batch,
            policy,
            critic,
            stage,
            layout,
        )
        self.kl_coef, self.constant_length, self.train_policy, self.measure = (
            kl_coef,
            constant_length,
            train_policy,
            measure,
        )
        self.pairwise = stage.policy_loss is PolicyLoss.dpo
        self.sums = _Sums()
        self.tokens = self.units = self.pairs = 0.0

    def run(self, items: Sequence[Any]) -> dict[str, float] | None:
        """Figures over all ranks; None where no rank has anything to train. Collective."""
        batch, stage = self.batch, self.stage
        pairs: list[Pair] = list(items) if self.pairwise else []
        rows = [row for pair in pairs for row in pair] if self.pairwise else list(items)
        own = batch.train_mask[rows]
        counts = [
            float(own.sum()),
            aggregation_units(own, stage.aggregation, self.constant_length),
            float(len(pairs)),
        ]
        self.tokens, self.units, self.pairs = distributed.all_sum(counts)
        if (self.pairs if self.pairwise else self.tokens) == 0:
            return None
        micro_batches = plan(batch.tokens, batch.groups, rows, self.layout, pairs)
        for number, packs in enumerate(micro_batches):
            self._micro_batch(packs, pairs, last=number == len(micro_batches) - 1)
        total = self.sums.reduced()
        if not all(torch.isfinite(torch.tensor(list(total.values())))):
            raise NonFinite(
                f"loss/policy={total['policy']}, loss/value={total['value']}, "
                f"entropy={total['entropy']}"
            )
        figures = self._figures(total)
        self.brake.check(
            "loss",
            {name: figures[name] for name in ("loss/policy", "loss/value") if name in figures},
        )
        return figures | {"policy/lr": self.policy.rate, "policy/grad_norm": 0.0} | self._optimise()

    def _optimise(self) -> dict[str, float]:
        """The optimizers' steps and the norms of their gradients; neither is taken where an engine
        can tell that one of them must not be.
        """
        engines = {"policy/grad_norm": self.policy} if self.train_policy else {}
        if self.critic is not None:
            engines["value/grad_norm"] = self.critic
        known = {
            name: norm for name, engine in engines.items() if (norm := engine.clip()) is not None
        }
        self.brake.check("grad_norm", known)
        norms = {name: engine.step() for name, engine in engines.items()}
        self.brake.check(
            "grad_norm", {name: norm for name, norm in norms.items() if name not in known}
        )
        return norms

    def _micro_batch(self, packs: Packs, pairs: Sequence[Pair], *, last: bool) -> None:
        """Forward and backward of one micro-batch; an empty one runs a row at weight 0, for the
        ranks that have rows.
        """
        batch = self.batch
        spare = not packs
        packs = packs or [[0]]
        if self.train_policy:
            if self.measure is not None:
                self.measure.reference_of(packs, self.layout)
            rows, part, logprobs, entropy = run_policy(
                self.policy, batch.tokens, packs, self.layout
            )
            mask = (
                torch.zeros_like(part.response_mask)
                if spare
                else part.response_mask & batch.keep[rows][:, None]
            )
            if self.measure is not None and not spare:
                self.measure.policy_of(rows, part.response_mask, logprobs, entropy)
            loss = (
                self._pair_loss(rows, pairs, mask, logprobs)
                if self.pairwise
                else self._token_loss(rows, mask, logprobs)
            )
            bonus = entropy_bonus(entropy, mask, denominator=self.tokens)
            self.sums.add(entropy=bonus.detach())
            if self.stage.entropy_coef:
                loss = loss - self.stage.entropy_coef * bonus
            self.policy.backward(loss, last=last)
        if self.critic is not None:
            self._critic([row for part in packs for row in part], spare=spare, last=last)

    def _token_loss(self, rows: list[int], mask: Tensor, logprobs: Tensor) -> Tensor:
        stage, batch, width = self.stage, self.batch, logprobs.shape[1]
        old = _cut(batch.old_logprobs, rows, width)
        weights = aggregation_weights(mask, stage.aggregation)
        loss_weights = weights
        if stage.importance_cap is not None:
            importance = importance_weights(
                old,
                _cut(batch.rollout_logprobs, rows, width),
                stage.importance_cap,
                mode=stage.importance_mode,
                level=stage.importance_level,
                response_mask=mask,
            )
            loss_weights = weights * importance
            self.sums.add(weight=torch.where(mask, importance, 0.0).sum())
        loss, stats = policy_loss(
            logprobs,
            old,
            _cut(batch.advantages, rows, width),
            mask,
            kind=stage.policy_loss,
            cliprange=stage.cliprange,
            cliprange_high=stage.cliprange_high,
            dual_clip=stage.dual_clip,
            weights=loss_weights,
            denominator=self.units,
        )
        self.sums.add(
            policy=loss.detach(), clipped=stats.clipped, approxkl=stats.approxkl, ratio=stats.ratio
        )
        if stage.kl_place is not KLPlace.reward and self.kl_coef > 0:
            kl = kl_loss(
                logprobs,
                _cut(batch.ref_logprobs, rows, width),
                old,
                mask,
                estimator=stage.kl_loss_estimator,
                weights=weights,
                denominator=self.units,
            )
            self.sums.add(kl=kl.detach())
            loss = loss + self.kl_coef * kl
        return loss

    def _pair_loss(
        self, rows: list[int], pairs: Sequence[Pair], mask: Tensor, logprobs: Tensor
    ) -> Tensor:
        """Sum over this micro-batch's whole pairs, divided by the pairs of the step."""
        stage, place = self.stage, {row: i for i, row in enumerate(rows)}
        if not bool(mask.any()):  # a spare pass
            return logprobs.sum() * 0.0
        own = [(place[a], place[b]) for a, b in pairs if a in place]
        better, worse = [a for a, _ in own], [b for _, b in own]
        sums = torch.where(mask, logprobs, 0.0).sum(dim=1)
        ref = torch.where(mask, _cut(self.batch.ref_logprobs, rows, logprobs.shape[1]), 0.0).sum(
            dim=1
        )
        lengths = mask.sum(dim=1).float()
        logs = PairLogprobs(
            sums[better], sums[worse], ref[better], ref[worse], lengths[better], lengths[worse]
        )
        loss = combined_loss(
            logs,
            stage.dpo_losses,
            stage.dpo_weights,
            beta=stage.dpo_beta,
            label_smoothing=stage.label_smoothing,
        )
        margins = (
            stage.dpo_beta * ((sums[better] - ref[better]) - (sums[worse] - ref[worse])).detach()
        )
        loss = loss.sum() / self.pairs
        old = _cut(self.batch.old_logprobs, rows, logprobs.shape[1])
        approxkl = masked_sum(kl_per_token(old, logprobs.detach(), KLEstimator.k3), mask)
        self.sums.add(
            policy=loss.detach(),
            margin=margins.sum(),
            correct=(margins > 0).sum(),
            approxkl=approxkl,
        )
        return loss

    def _critic(self, rows: list[int], *, spare: bool, last: bool) -> None:
        batch, stage = self.batch, self.stage
        part = batch.tokens.select(rows)
        mask = (
            torch.zeros_like(part.response_mask)
            if spare
            else part.response_mask & batch.keep[rows][:, None]
        )
        values = self.critic(part.input_ids, part.positions)
        width = values.shape[1]
        loss, clipped = value_loss(
            values,
            _cut(batch.values, rows, width),
            _cut(batch.returns, rows, width),
            mask,
            cliprange_value=stage.cliprange_value,
            denominator=self.tokens,
        )
        self.critic.backward(stage.vf_coef * loss, last=last)
        self.sums.add(value=loss.detach(), value_clipped=clipped)

    def _figures(self, total: dict[str, float]) -> dict[str, float]:
        stage, tokens = self.stage, max(self.tokens, 1.0)
        figures = {"loss/policy": total["policy"], "loss/entropy": total["entropy"]}
        if self.pairwise:
            figures |= {
                "policy/pairs": self.pairs,
                "policy/pair_margin": total["margin"] / self.pairs,
            }
            figures |= {
                "policy/pair_accuracy": total["correct"] / self.pairs,
                "policy/approxkl": total["approxkl"] / tokens,
            }
        else:
            trained = self.train_policy
            figures |= {
                "policy/clipfrac": total["clipped"] / tokens,
                "policy/approxkl": total["approxkl"] / tokens,
            }
            figures |= {"policy/ratio": total["ratio"] / tokens if trained else 1.0}
        if stage.kl_place is not KLPlace.reward:
            figures["loss/kl"] = total["kl"]
        if stage.importance_cap is not None:
            figures["policy/importance_weight"] = total["weight"] / tokens
        if self.critic is not None:
            figures |= {
                "loss/value": total["value"],
                "value/clipfrac": total["value_clipped"] / tokens,
            }
        return figures


def _cut(tensor: Tensor | None, rows: Sequence[int], width: int) -> Tensor:
    """These rows of a [B, T] tensor, without the columns beyond `width`."""
    assert tensor is not None, "the batch lacks what its configuration needs"
    return tensor[list(rows), :width]
