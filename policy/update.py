"""The update: epochs x minibatches x micro-batches over one step's rollouts. The gradient of an
optimizer step is the same however it is split into micro-batches and over ranks.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from conf.choices import OnNonFinite, PolicyLoss
from conf.stages import OnlineStage
from policy.engines.base import Brake, GradientNoise, NonFinite
from policy.forward import Models
from policy.prepare import TrainBatch
from policy.step import OptimizerStep

LOG = logging.getLogger("policy.update")


def update(
    batch: TrainBatch,
    models: Models,
    stage: OnlineStage,
    *,
    kl_coef: float,
    constant_length: int,
    seed: int,
    train_policy: bool = True,
    brake: Brake | None = None,
    noise: GradientNoise | None = None,
) -> dict[str, float]:
    """Take the step's optimizer steps. Returns means over all of them (policy/clipfrac,
    policy/approxkl, loss/policy, ...). Collective.

    `constant_length` (tokens) is the divisor of aggregation=constant. `seed` draws the minibatches;
    every rank makes as many. Where `batch` has no logprobs yet, the one pass of this update
    measures old, entropy and reference logprobs on its way and leaves them in `batch`. A minibatch
    in which no rank has a token takes no step. `brake` looks for spikes, `noise` at gradients.
    Raises NonFinite before a bad update; policy/skipped counts those that on_nonfinite=skip left.
    """
    _training_mode(models)
    brake = brake or Brake(None, None, 1)
    only_pass = batch.old_logprobs is None
    if only_pass:
        _make_room(batch, reference=models.reference is not None)
    history: list[dict[str, float]] = []
    stopped = skipped = 0.0
    for chosen in minibatches(_items(batch, stage), stage.epochs, stage.minibatches, seed):
        step = OptimizerStep(
            batch=batch,
            models=models,
            stage=stage,
            kl_coef=kl_coef,
            constant_length=constant_length,
            train_policy=train_policy,
            only_pass=only_pass,
            brake=brake,
            noise=noise,
        )
        try:
            figures = step.run(chosen)
        except NonFinite as error:
            _discard_gradients(models)
            if stage.on_nonfinite is not OnNonFinite.skip:
                raise
            LOG.warning("an update was left out (stage.on_nonfinite=skip): %s", error)
            skipped += 1
            continue
        history += [] if figures is None else [figures]
        if figures is None or stage.stop_kl is None:
            continue
        if figures["policy/approxkl"] > stage.stop_kl:
            stopped = 1.0
            break
    return _means(history) | {
        "policy/updates": float(len(history)),
        "policy/stopped_early": stopped,
        "policy/skipped": skipped,
    }


def _items(batch: TrainBatch, stage: OnlineStage) -> list[Any]:
    """What the minibatches are drawn from: pairs of rows for policy_loss=dpo, else rows."""
    if stage.policy_loss is PolicyLoss.dpo:
        return list(batch.pairs)
    rows: list[int] = batch.keep.nonzero().flatten().tolist()
    return rows


def minibatches(items: Sequence[Any], epochs: int, count: int, seed: int) -> Iterator[list[Any]]:
    """`count` minibatches of each of `epochs` shuffled passes over `items`; their sizes differ by
    at most one.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(items), generator=generator).tolist()
        for i in range(count):
            start, end = len(order) * i // count, len(order) * (i + 1) // count
            yield [items[number] for number in order[start:end]]


def _make_room(batch: TrainBatch, *, reference: bool) -> None:
    """Zeros for the logprobs that the update's only pass measures."""
    batch.old_logprobs = torch.zeros_like(batch.rollout_logprobs)
    batch.entropy = torch.zeros_like(batch.rollout_logprobs)
    if reference:
        batch.ref_logprobs = torch.zeros_like(batch.rollout_logprobs)


def _training_mode(models: Models) -> None:
    models.policy.module.train()
    if models.critic is not None:
        models.critic.module.train()


def _discard_gradients(models: Models) -> None:
    models.policy.discard()
    if models.critic is not None:
        models.critic.discard()


def _means(history: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure over the optimizer steps."""
    means = {}
    for name in history[0] if history else ():
        means[name] = sum(figures[name] for figures in history) / len(history)
    return means
