"""From rollouts and scores to what an update needs: logprobs, KL, per-token rewards, advantages and returns."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from conf.schema import OnlineStage
from policy.advantages import gae, masked_moments, token_rewards, whiten
from policy.batching import Batch, plan_micro_batches
from policy.kl import kl_per_token
from policy.losses import importance_weights
from rlhf import distributed


@dataclass(slots=True)
class TrainBatch:
    """This rank's responses of one step; all [B, T] float32 over response tokens, 0 where masked."""

    tokens: Batch
    rollout_logprobs: Tensor  # nats, by the sampler
    old_logprobs: Tensor  # nats, by the trainer before the update
    ref_logprobs: Tensor | None  # nats, by the reference
    entropy: Tensor  # nats, of the policy before the update
    values: Tensor  # units of the score
    kl: Tensor  # nats, policy against reference
    rewards: Tensor  # score at the last token less the KL penalty
    advantages: Tensor
    returns: Tensor
    weights: Tensor | None  # truncated importance ratios between sampler and trainer

    @property
    def mask(self) -> Tensor:
        return self.tokens.response_mask

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, for a dump."""
        out = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return out | {"input_ids": self.tokens.input_ids, "response_mask": self.tokens.response_mask}


def aligned_micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Micro-batches of at most `budget` tokens, as many on every rank: ZeRO's collectives need the same number of passes.

    A rank with fewer gets empty ones, for which the caller runs a row at weight 0.
    """
    own = plan_micro_batches(lengths, budget)
    most = int(distributed.all_max([len(own)])[0])
    return own if most == len(own) else plan_micro_batches(lengths, budget, at_least=most)


def run_in_micro_batches(function: Callable[[Batch], tuple[Tensor, ...]], batch: Batch, budget: int) -> tuple[Tensor, ...]:
    """Apply `function` (batch of b rows -> tensors [b, t]) to all rows without gradients; results [B, T], 0 where masked."""
    outputs: list[Tensor] | None = None
    lengths = batch.lengths.tolist()
    with torch.no_grad():
        for rows in aligned_micro_batches(lengths, budget):
            part = function(batch.select(rows or [0]))
            if outputs is None:
                shape = batch.response_mask.shape
                outputs = [torch.zeros(shape, dtype=t.dtype, device=t.device) for t in part]
            if rows:
                for whole, piece in zip(outputs, part, strict=True):
                    whole[rows, : piece.shape[1]] = piece
    assert outputs is not None, "a step needs at least one response on every rank"
    return tuple(torch.where(batch.response_mask, t, torch.zeros_like(t)) for t in outputs)


def policy_logprobs(engine: Any, batch: Batch, budget: int, *, adapter_off: bool = False) -> tuple[Tensor, Tensor]:
    """Logprobs and entropy [B, T] by the trainer; `adapter_off`: by the frozen weights under the adapter."""
    module = getattr(engine, "module", engine)
    module.eval()
    with module.model.disable_adapter() if adapter_off else nullcontext():
        out = run_in_micro_batches(lambda b: engine(b.input_ids, b.positions, b.response_ids, b.response_mask), batch, budget)
    return out[0], out[1]


def critic_values(engine: Any, batch: Batch, budget: int) -> Tensor:
    """Values [B, T] of the state before each response token."""
    engine.module.eval()
    return run_in_micro_batches(lambda b: (engine(b.input_ids, b.positions),), batch, budget)[0]


def prepare(
    tokens: Batch,
    rollout_logprobs: Tensor,
    scores: Tensor,
    *,
    policy: Any,
    reference: Any,
    critic: Any,
    stage: OnlineStage,
    kl_coef: float,
    budget: int,
) -> TrainBatch:
    """`scores` [B] are final (clipped, normalised, penalised). `reference`: a frozen module, "adapter" (the policy with its adapter off), or None."""
    old_logprobs, entropy = policy_logprobs(policy, tokens, budget)
    ref_logprobs = None
    if reference == "adapter":
        ref_logprobs, _ = policy_logprobs(policy, tokens, budget, adapter_off=True)
    elif reference is not None:
        ref_logprobs, _ = policy_logprobs(reference, tokens, budget)
    values = critic_values(critic, tokens, budget)
    mask = tokens.response_mask
    kl = torch.zeros_like(old_logprobs) if ref_logprobs is None else kl_per_token(old_logprobs, ref_logprobs, stage.kl_estimator)
    kl = torch.where(mask, kl, torch.zeros_like(kl))
    rewards = token_rewards(scores, kl, mask, kl_coef)
    if stage.whiten_rewards:
        mean, std, _ = masked_moments(rewards, mask, distributed.all_sum)
        rewards = whiten(rewards, mask, mean, std, shift=False)
    advantages, returns = gae(rewards, values, mask, gamma=stage.gamma, gae_lambda=stage.gae_lambda)
    if stage.whiten_advantages:
        mean, std, _ = masked_moments(advantages, mask, distributed.all_sum)
        advantages = whiten(advantages, mask, mean, std, shift=True)
    weights = None if stage.importance_cap is None else importance_weights(old_logprobs, rollout_logprobs, stage.importance_cap)
    return TrainBatch(
        tokens=tokens,
        rollout_logprobs=rollout_logprobs,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        entropy=entropy,
        values=values,
        kl=kl,
        rewards=rewards,
        advantages=advantages,
        returns=returns,
        weights=weights,
    )
