"""PPO's update: epochs x minibatches x micro-batches over one step's rollouts, the same gradient however it is split."""

from typing import Any

import torch
from torch import Tensor

from conf.schema import OnlineStage
from policy.engine import NonFinite
from policy.losses import entropy_bonus, policy_loss, value_loss
from policy.prepare import TrainBatch, aligned_micro_batches
from rlhf import distributed


class _Sums:
    """Named sums over tokens, reduced over ranks at the end of each optimizer step."""

    names = ("policy", "value", "entropy", "clipped", "value_clipped", "approxkl", "ratio", "tokens")

    def __init__(self) -> None:
        self.values = dict.fromkeys(self.names, 0.0)

    def add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            self.values[name] += float(value)

    def reduced(self) -> dict[str, float]:
        return dict(zip(self.names, distributed.all_sum([self.values[n] for n in self.names]), strict=True))


def update(batch: TrainBatch, *, policy: Any, critic: Any, stage: OnlineStage, budget: int, seed: int, train_policy: bool = True) -> dict[str, float]:
    """Take the step's optimizer steps. Returns means over all of them (policy/clipfrac, policy/approxkl, loss/policy, ...).

    `seed` draws the minibatches; every rank holds as many rows. Raises NonFinite: a bad loss is never applied.
    """
    rows = batch.mask.shape[0]
    size = rows // stage.minibatches
    generator = torch.Generator().manual_seed(seed)
    policy.module.train()
    critic.module.train()
    history: list[dict[str, float]] = []
    stopped = 0.0
    for _ in range(stage.epochs):
        order = torch.randperm(rows, generator=generator).tolist()
        for start in range(0, rows, size):
            figures = _optimizer_step(batch, order[start : start + size], policy, critic, stage, budget, train_policy)
            history.append(figures)
            if stage.stop_kl is not None and figures["policy/approxkl"] > stage.stop_kl:
                stopped = 1.0
                break
        if stopped:
            break
    means = {name: sum(h[name] for h in history) / len(history) for name in history[0]}
    return means | {"policy/updates": float(len(history)), "policy/stopped_early": stopped}


def _optimizer_step(
    batch: TrainBatch, rows: list[int], policy: Any, critic: Any, stage: OnlineStage, budget: int, train_policy: bool
) -> dict[str, float]:
    lengths = batch.tokens.lengths.tolist()
    tokens = distributed.all_sum([float(batch.mask[rows].sum())])[0]
    micro_batches = [[rows[i] for i in part] for part in aligned_micro_batches([lengths[i] for i in rows], budget)]
    sums = _Sums()
    for number, part in enumerate(micro_batches):
        last = number == len(micro_batches) - 1
        chosen = part or rows[:1]
        tokens_part = batch.tokens.select(chosen)
        width = tokens_part.response_mask.shape[1]
        mask = tokens_part.response_mask if part else torch.zeros_like(tokens_part.response_mask)

        def cut(tensor: Tensor, chosen: list[int] = chosen, width: int = width) -> Tensor:
            return tensor[chosen, :width]

        if train_policy:
            logprobs, entropy = policy(tokens_part.input_ids, tokens_part.positions, tokens_part.response_ids, tokens_part.response_mask)
            loss, stats = policy_loss(
                logprobs,
                cut(batch.old_logprobs),
                cut(batch.advantages),
                mask,
                cliprange=stage.cliprange,
                dual_clip=stage.dual_clip,
                weights=None if batch.weights is None else cut(batch.weights),
                denominator=tokens,
            )
            bonus = entropy_bonus(entropy, mask, denominator=tokens)
            policy.backward(loss - stage.entropy_coef * bonus, last=last)
            sums.add(
                policy=loss.detach(), entropy=bonus.detach(), clipped=stats.clipped, approxkl=stats.approxkl, ratio=stats.ratio, tokens=stats.tokens
            )
        values = critic(tokens_part.input_ids, tokens_part.positions)
        v_loss, v_clipped = value_loss(values, cut(batch.values), cut(batch.returns), mask, cliprange_value=stage.cliprange_value, denominator=tokens)
        critic.backward(stage.vf_coef * v_loss, last=last)
        sums.add(value=v_loss.detach(), value_clipped=v_clipped)
    total = sums.reduced()
    if not all(torch.isfinite(torch.tensor(list(total.values())))):
        raise NonFinite(f"loss/policy={total['policy']}, loss/value={total['value']}, entropy={total['entropy']}")
    norms = {"policy/lr": policy.rate, "policy/grad_norm": policy.step() if train_policy else 0.0, "value/grad_norm": critic.step()}
    count = max(total["tokens"], 1.0)
    return {
        "loss/policy": total["policy"],
        "loss/value": total["value"],
        "loss/entropy": total["entropy"],
        "policy/clipfrac": total["clipped"] / count,
        "policy/approxkl": total["approxkl"] / count,
        "policy/ratio": total["ratio"] / count if train_policy else 1.0,
        "value/clipfrac": total["value_clipped"] / tokens,
        **norms,
    }
