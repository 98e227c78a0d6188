"""From rollouts and scores to what an update needs: logprobs, KL, per-token rewards, advantages and
returns.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from conf.choices import Advantage, KLPlace
from conf.stages import OnlineStage
from policy.advantages import (
    gae,
    group_advantages,
    group_moments,
    leave_one_out_advantages,
    masked_moments,
    rewards_to_go,
    token_rewards,
    whiten,
)
from policy.batching import Batch, plan_micro_batches
from policy.kl import kl_per_token
from policy.packing import pack, pack_groups, pack_length
from rlhf.process import distributed

Packs = list[list[int]]  # rows of one micro-batch, those of a pack side by side


@dataclass(frozen=True, slots=True)
class Layout:
    """How rows become the model's input."""

    budget: int  # tokens per micro-batch, padding included
    shared: bool = False  # a prompt is computed once for all of its responses (policy.packing)
    hidden_size: int = 1  # of the model, for the cost of packing


@dataclass(slots=True)
class TrainBatch:
    """This rank's responses of one step; all tensors [B, T] float32 over response tokens, 0 where
    masked. None: not known, or not needed.
    """

    tokens: Batch
    keep: Tensor  # [B] bool: rows that train
    groups: Tensor  # [B] long: the prompt of each row
    pairs: list[tuple[int, int]]  # rows (better, worse), policy_loss=dpo
    rollout_logprobs: Tensor  # nats, by the sampler
    # what `prepare` fills in
    # nats, by the trainer before the update; None until the update's only pass fills it in
    old_logprobs: Tensor | None = None
    entropy: Tensor | None = None  # nats, of the policy before the update; None as above
    ref_logprobs: Tensor | None = None  # nats, by the reference
    values: Tensor | None = None  # units of the score
    # score at the last token less the KL penalty
    rewards: Tensor = field(default_factory=lambda: torch.zeros(0))
    advantages: Tensor = field(default_factory=lambda: torch.zeros(0))
    returns: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        return self.tokens.response_mask

    @property
    def train_mask(self) -> Tensor:
        """[B, T] bool: tokens that get a gradient."""
        return self.tokens.response_mask & self.keep[:, None]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, for a dump."""
        out = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return out | {
            "input_ids": self.tokens.input_ids,
            "response_mask": self.tokens.response_mask,
        }


def aligned_micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Micro-batches of at most `budget` tokens, as many on every rank: ZeRO's collectives need the
    same number of passes.

    A rank with fewer gets empty ones, for which the caller runs a row at weight 0.
    """
    own = plan_micro_batches(lengths, budget)
    most = int(distributed.all_max([len(own)])[0])
    return own if most == len(own) else plan_micro_batches(lengths, budget, at_least=most)


def plan(
    batch: Batch,
    groups: Tensor,
    rows: Sequence[int],
    layout: Layout,
    pairs: Sequence[tuple[int, int]] = (),
) -> list[Packs]:
    """Micro-batches of `rows`, or of whole `pairs` where they are given; as many on every rank,
    some of them empty. Collective.
    """
    lengths = batch.lengths.tolist()
    responses = batch.response_mask.sum(dim=1).tolist()
    prompts = [length - response for length, response in zip(lengths, responses, strict=True)]
    if layout.shared:
        if pairs:
            packs = [list(pair) for pair in pairs]
        else:
            chosen = list(rows)
            numbers = groups.tolist()
            local = pack_groups(
                [numbers[r] for r in chosen],
                [prompts[r] for r in chosen],
                [responses[r] for r in chosen],
                hidden_size=layout.hidden_size,
            )
            packs = [[chosen[i] for i in part] for part in local]
        sizes = [pack_length(part, prompts, responses) for part in packs]
        return [[packs[i] for i in part] for part in aligned_micro_batches(sizes, layout.budget)]
    if pairs:
        sizes = [max(lengths[row] for row in pair) for pair in pairs]
        return [
            [[row] for i in part for row in pairs[i]]
            for part in aligned_micro_batches(sizes, max(1, layout.budget // 2))
        ]
    return [
        [[rows[i]] for i in part]
        for part in aligned_micro_batches([lengths[row] for row in rows], layout.budget)
    ]


def run_policy(
    engine: Any, batch: Batch, packs: Packs, layout: Layout
) -> tuple[list[int], Batch, Tensor, Tensor]:
    """(rows, their batch, logprobs [b, t], entropy [b, t]) of one micro-batch."""
    rows = [row for part in packs for row in part]
    part = batch.select(rows)
    plain = (part.response_ids, part.response_mask)
    if not layout.shared:
        logprobs, entropy = engine(part.input_ids, part.positions, *plain)
        return rows, part, logprobs, entropy
    counted, local = 0, []
    for pack_rows in packs:
        local.append(list(range(counted, counted + len(pack_rows))))
        counted += len(pack_rows)
    packed = pack(part, local)
    logprobs, entropy = engine(
        packed.input_ids,
        packed.positions,
        *plain,
        packed.owner,
        packed.position_ids,
        packed.attention_mask,
    )
    return rows, part, logprobs, entropy


def policy_logprobs(
    engine: Any,
    batch: Batch,
    groups: Tensor,
    rows: Sequence[int],
    layout: Layout,
    *,
    adapter_off: bool = False,
) -> tuple[Tensor, Tensor]:
    """Logprobs and entropy [B, T] of `rows` by the trainer, 0 elsewhere; `adapter_off`: by the
    frozen weights under the adapter. Collective.
    """
    getattr(engine, "module", engine).eval()
    out = [
        torch.zeros(batch.response_mask.shape, dtype=torch.float32, device=batch.input_ids.device)
        for _ in range(2)
    ]
    with torch.no_grad(), adapter_disabled(engine) if adapter_off else nullcontext():
        for packs in plan(batch, groups, rows, layout):
            done, part, logprobs, entropy = run_policy(engine, batch, packs or [[0]], layout)
            if packs:
                for whole, piece in zip(out, (logprobs, entropy), strict=True):
                    whole[done, : piece.shape[1]] = torch.where(part.response_mask, piece, 0.0)
    return out[0], out[1]


def adapter_disabled(engine: Any) -> Any:
    """A context in which the policy is the frozen model under its adapter."""
    return getattr(engine, "module", engine).model.disable_adapter()


def critic_values(engine: Any, batch: Batch, budget: int) -> Tensor:
    """Values [B, T] of the state before each response token, 0 where masked. Collective."""
    engine.module.eval()
    out = torch.zeros(batch.response_mask.shape, dtype=torch.float32, device=batch.input_ids.device)
    with torch.no_grad():
        for rows in aligned_micro_batches(batch.lengths.tolist(), budget):
            part = batch.select(rows or [0])
            values = engine(part.input_ids, part.positions)
            if rows:
                out[rows, : values.shape[1]] = torch.where(part.response_mask, values, 0.0)
    return out


def needs_old_logprobs(stage: OnlineStage) -> bool:
    """Whether the update needs the policy's logprobs before its first optimizer step, and not just
    during it.

    With one optimizer step per rollout the logprobs of that step are those before the update, so a
    pass is saved; not where the rewards hold a KL penalty, nor where a step trains the critic
    alone.
    """
    several = stage.epochs * stage.minibatches > 1
    critic_alone = stage.advantage is Advantage.gae and stage.critic_warmup > 0
    return (
        several
        or critic_alone
        or (stage.reference and stage.kl_coef > 0 and stage.kl_place is not KLPlace.loss)
    )


def prepare(
    batch: TrainBatch,
    scores: Tensor,
    baselines: Tensor | None,
    *,
    policy: Any,
    reference: Any,
    critic: Any,
    stage: OnlineStage,
    kl_coef: float,
    layout: Layout,
    passes: bool,
) -> TrainBatch:
    """Fill in what the update needs. `scores` [B] are final (clipped, normalised, penalised);
    `baselines` [B]: scores of greedy responses.

    `reference`: a frozen module, "adapter" (the policy with its adapter off), or None. `passes`
    False: the update measures logprobs itself. Collective.
    """
    tokens, mask = batch.tokens, batch.mask
    rows = batch.keep.nonzero().flatten().tolist()
    old_logprobs = entropy = ref_logprobs = values = returns = None
    if passes:
        old_logprobs, entropy = policy_logprobs(policy, tokens, batch.groups, rows, layout)
        if reference is not None:
            ref_logprobs = reference_logprobs(policy, reference, tokens, batch.groups, rows, layout)
    if critic is not None:
        values = critic_values(critic, tokens, layout.budget)
    kl = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    if old_logprobs is not None and ref_logprobs is not None and stage.kl_place is not KLPlace.loss:
        kl = torch.where(mask, kl_per_token(old_logprobs, ref_logprobs, stage.kl_estimator), 0.0)
    rewards = token_rewards(scores, kl, mask, kl_coef)
    if stage.whiten_rewards:
        mean, std, _ = masked_moments(rewards, mask, distributed.all_sum)
        rewards = whiten(rewards, mask, mean, std, shift=False)
    if stage.advantage is Advantage.gae:
        assert values is not None, "advantage=gae has a critic"
        advantages, returns = gae(
            rewards, values, mask, gamma=stage.gamma, gae_lambda=stage.gae_lambda
        )
    elif not rows:  # a rank's spare row has no group
        advantages = torch.zeros_like(rewards)
    else:
        advantages = advantages_without_critic(
            rewards, scores, batch.groups, baselines, mask, stage
        )
    if (
        stage.whiten_advantages
        and stage.advantage is not Advantage.none
        and distributed.all_sum([float(batch.train_mask.sum())])[0] > 0
    ):
        mean, std, _ = masked_moments(advantages, batch.train_mask, distributed.all_sum)
        advantages = whiten(advantages, mask, mean, std, shift=True)
    return replace(
        batch,
        old_logprobs=old_logprobs,
        entropy=entropy,
        ref_logprobs=ref_logprobs,
        values=values,
        rewards=rewards,
        advantages=advantages,
        returns=returns,
    )


def reference_logprobs(
    policy: Any, reference: Any, tokens: Batch, groups: Tensor, rows: Sequence[int], layout: Layout
) -> Tensor:
    """Logprobs [B, T] of `rows` by the reference, 0 elsewhere. Collective."""
    if reference == "adapter":
        return policy_logprobs(policy, tokens, groups, rows, layout, adapter_off=True)[0]
    return policy_logprobs(reference, tokens, groups, rows, layout)[0]


def advantages_without_critic(
    rewards: Tensor,
    scores: Tensor,
    groups: Tensor,
    baselines: Tensor | None,
    mask: Tensor,
    stage: OnlineStage,
) -> Tensor:
    """Advantages [B, T], 0 outside the mask, of every estimator that needs no critic.

    `rewards` [B, T] hold the KL penalty where it belongs in the reward, so a group is compared by
    its penalised scores.
    """
    totals = rewards.sum(dim=1)
    match stage.advantage:
        case Advantage.group:
            per_row = group_advantages(totals, groups, std=stage.advantage_std)
        case Advantage.leave_one_out:
            per_row = leave_one_out_advantages(totals, groups)
        case Advantage.none:
            per_row = torch.ones_like(totals)
        case Advantage.reinforce_pp:
            to_go = rewards_to_go(rewards, mask, gamma=stage.gamma)
            baseline = (
                group_moments(scores, groups)[0].float()
                if stage.group_baseline
                else torch.zeros_like(totals)
            )
            return torch.where(mask, to_go - baseline[:, None], 0.0)
        case Advantage.greedy:
            assert baselines is not None, "advantage=greedy scores greedy responses"
            return torch.where(
                mask, rewards_to_go(rewards, mask, gamma=stage.gamma) - baselines[:, None], 0.0
            )
        case _:
            raise ValueError(f"{stage.advantage} needs a critic")
    return torch.where(mask, per_row[:, None].to(rewards.dtype), 0.0)
