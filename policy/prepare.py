"""From rollouts and scores to what an update needs: logprobs, KL, per-token rewards, advantages and
returns.
"""

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from conf.choices import Advantage, KLPlace
from conf.reward import TurnCredit
from conf.stages import OnlineStage
from policy.advantages import (
    discounted_over_turns,
    gae,
    group_moments,
    group_turn_advantages,
    leave_one_out_advantages,
    masked_moments,
    of_turns,
    rewards_to_go,
    scaled,
    token_rewards,
    turn_gamma,
    turn_returns,
    whiten,
)
from policy.batching import Batch
from policy.forward import Models, Pair, critic_values, policy_logprobs, reference_logprobs
from policy.kl import kl_per_token
from policy.losses import importance_weights
from rlhf.process import distributed


@dataclass(slots=True)
class TrainBatch:
    """This rank's responses of one step; all tensors [B, T] float32 over response tokens, 0 where
    masked. None: not known, or not needed.
    """

    tokens: Batch
    keep: Tensor  # [B] bool: rows that train
    groups: Tensor  # [B] long: the prompt of each row
    pairs: list[Pair]  # policy_loss=dpo
    rollout_logprobs: Tensor  # nats, by the sampler
    # versions that the weights which train are ahead of those that wrote the token; None: no token
    # is stale
    staleness: Tensor | None = None
    # long: the turn of each token, from 0; None: responses of one turn
    turns: Tensor | None = None
    # Parts of the scores that stand at the ends of turns; None: scores stand at the last token.
    turn_rewards: Tensor | None = None
    # `prepare` fills in what follows.
    # Nats, by the trainer before the update. None until the update's only pass measures them.
    old_logprobs: Tensor | None = None
    entropy: Tensor | None = None  # nats, of the policy before the update; None as above
    ref_logprobs: Tensor | None = None  # nats, by the reference; None as above
    values: Tensor | None = None  # units of the score
    # Units of the score: the score at the last token, less the KL penalty of each token.
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


def needs_old_logprobs(stage: OnlineStage) -> bool:
    """Whether the update needs the policy's logprobs before its first optimizer step, and not just
    during it.

    With one optimizer step per rollout the logprobs of that step are those before the update, so a
    pass is saved; not where the rewards hold a KL penalty, nor where a step trains the critic
    alone.
    """
    several_steps = stage.epochs * stage.minibatches > 1
    critic_alone = stage.advantage is Advantage.gae and stage.critic_warmup > 0
    return several_steps or critic_alone or _penalises(stage)


def _penalises(stage: OnlineStage) -> bool:
    """Whether the KL penalty is part of the reward."""
    return stage.reference and stage.kl_coef > 0 and stage.kl_place is not KLPlace.loss


def prepare(
    batch: TrainBatch,
    scores: Tensor,
    baselines: Tensor | None,
    models: Models,
    stage: OnlineStage,
    *,
    kl_coef: float,
    passes: bool,
) -> TrainBatch:
    """`batch` with everything that the update needs. Collective.

    `scores` [B] are final (clipped, normalised, penalised); `baselines` [B] are the scores of
    greedy responses to the same prompts, for advantage=greedy. `passes` False: the update measures
    logprobs itself.
    """
    tokens, mask = batch.tokens, batch.mask
    rows = batch.keep.nonzero().flatten().tolist()
    if passes:
        batch = _with_logprobs(batch, _measured(batch, rows, stage), models)
    if models.critic is not None:
        batch = replace(batch, values=critic_values(models.critic, tokens, models.layout.budget))
    kl = _penalised_kl(batch, stage)
    rewards = token_rewards(scores, kl, mask, kl_coef, batch.turn_rewards)
    if stage.whiten_rewards:
        mean, std, _ = masked_moments(rewards, mask, distributed.all_sum)
        rewards = whiten(rewards, mask, mean, std, shift=False)
        # scores and baselines in the units of the rewards that they are compared with
        scores = scaled(scores, std)
        baselines = None if baselines is None else scaled(baselines, std)
    returns = None
    if stage.advantage is Advantage.gae:
        assert batch.values is not None, "advantage=gae has a critic"
        gamma = turn_gamma(stage.gamma, stage.turn_discount, batch.turns, mask)
        advantages, returns = gae(
            rewards, batch.values, mask, gamma=gamma, gae_lambda=stage.gae_lambda
        )
    elif not rows:  # the spare row of a rank without rows has no group
        advantages = torch.zeros_like(rewards)
    else:
        advantages = advantages_without_critic(
            rewards, scores, batch.groups, baselines, mask, stage, batch.turns
        )
    if stage.whiten_advantages and stage.advantage is not Advantage.none:
        advantages = _whitened(advantages, batch)
    return replace(batch, rewards=rewards, advantages=advantages, returns=returns)


def _measured(batch: TrainBatch, rows: list[int], stage: OnlineStage) -> list[int]:
    """The rows whose logprobs are needed: `rows`, which train; with a KL penalty in the reward all
    responses that they are compared with, such as those that stage.mask_truncated leaves out.
    """
    if rows and _penalises(stage):
        return list(range(len(batch.keep)))
    return rows


def _with_logprobs(batch: TrainBatch, rows: list[int], models: Models) -> TrainBatch:
    """`batch` with the logprobs of `rows` by the policy and the reference. Collective."""
    tokens, groups = batch.tokens, batch.groups
    old, entropy = policy_logprobs(models.policy, tokens, groups, rows, models.layout)
    ref = None
    if models.reference is not None:
        ref = reference_logprobs(models, tokens, groups, rows)
    return replace(batch, old_logprobs=old, entropy=entropy, ref_logprobs=ref)


def _penalised_kl(batch: TrainBatch, stage: OnlineStage) -> Tensor:
    """The KL of each token [B, T] nats that lowers its reward; 0 where the penalty is in the loss,
    or no reference is known.
    """
    old, ref = batch.old_logprobs, batch.ref_logprobs
    if old is None or ref is None or stage.kl_place is KLPlace.loss:
        return torch.zeros(batch.mask.shape, dtype=torch.float32, device=batch.mask.device)
    return torch.where(batch.mask, kl_per_token(old, ref, stage.kl_estimator), 0.0)


def _whitened(advantages: Tensor, batch: TrainBatch) -> Tensor:
    """Advantages [B, T] of mean 0 and standard deviation 1 over the tokens of all ranks that train;
    unchanged where no token does. Collective.
    """
    mask = batch.train_mask
    if distributed.all_sum([float(mask.sum())])[0] == 0:
        return advantages
    mean, std, _ = masked_moments(advantages, mask, distributed.all_sum)
    return whiten(advantages, batch.mask, mean, std, shift=True)


def correction(
    stage: OnlineStage, old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor
) -> Tensor | None:
    """The importance weights of tokens [B, T] by which a stage corrects for the difference of
    sampler and trainer; None where it doesn't.

    The ratios to the new policy start from the trainer's own logprobs before the update, and these
    weights lead from the sampler to there: the decoupled objective of Hilton et al. 2022
    (arXiv:2110.00641) and of AReaL (Fu et al. 2025, arXiv:2505.24298).
    """
    if stage.correction_cap is None:
        return None
    return importance_weights(
        old_logprobs,
        rollout_logprobs,
        stage.correction_cap,
        floor=stage.importance_floor,
        mode=stage.importance_mode,
        level=stage.importance_level,
        response_mask=mask,
    )


def advantages_without_critic(
    rewards: Tensor,
    scores: Tensor,
    groups: Tensor,
    baselines: Tensor | None,
    mask: Tensor,
    stage: OnlineStage,
    turns: Tensor | None = None,
) -> Tensor:
    """Advantages [B, T], 0 outside the mask, of every estimator that needs no critic.

    `rewards` [B, T] hold the KL penalty where it belongs in the reward, so a group is compared by
    its penalised scores. `scores`, `groups`, `baselines`: [B]; scores and baselines in the units
    of the rewards. `turns` [B, T]: the turn of each token; None: responses of one turn.
    """
    totals = rewards.sum(dim=1)
    gamma = turn_gamma(stage.gamma, stage.turn_discount, turns, mask)
    match stage.advantage:
        case Advantage.group | Advantage.leave_one_out:
            return _against_group(rewards, groups, mask, stage, turns)
        case Advantage.none:
            return torch.where(mask, torch.ones_like(rewards), 0.0)
        case Advantage.reinforce_pp:
            baseline = torch.zeros_like(totals)
            if stage.group_baseline:
                baseline = group_moments(scores, groups)[0].float()
            return _above(baseline, rewards, mask, gamma)
        case Advantage.greedy:
            assert baselines is not None, "advantage=greedy scores greedy responses"
            return _above(baselines, rewards, mask, gamma)
    raise ValueError(f"{stage.advantage} needs a critic")


def _against_group(
    rewards: Tensor, groups: Tensor, mask: Tensor, stage: OnlineStage, turns: Tensor | None
) -> Tensor:
    """Advantages [B, T] of responses that are compared with their group as wholes, or turn by turn
    where `stage.turn_credit` says so.
    """
    if turns is not None and stage.turn_credit is TurnCredit.turn:
        returns = turn_returns(rewards, turns, mask, stage.turn_discount)
        per_turn = _compared(returns, groups, stage)
        return of_turns(per_turn.to(rewards.dtype), turns, mask)
    per_row = _compared(rewards.sum(dim=1, keepdim=True), groups, stage)[:, 0].to(rewards.dtype)
    if turns is not None:
        return discounted_over_turns(per_row, turns, mask, stage.turn_discount)
    return torch.where(mask, per_row[:, None], 0.0)


def _compared(returns: Tensor, groups: Tensor, stage: OnlineStage) -> Tensor:
    """Each column of `returns` [B, K] against its rows' groups."""
    if stage.advantage is Advantage.group:
        return group_turn_advantages(returns, groups, std=stage.advantage_std)
    columns = [leave_one_out_advantages(column, groups) for column in returns.unbind(dim=1)]
    return torch.stack(columns, dim=1)


def _above(baseline: Tensor, rewards: Tensor, mask: Tensor, gamma: float | Tensor) -> Tensor:
    """Rewards to go [B, T] less each row's `baseline` [B], a score, which is discounted from the
    last token as the row's own score is; 0 outside the mask.
    """
    to_go = rewards_to_go(rewards, mask, gamma=gamma)
    alone = token_rewards(baseline, torch.zeros_like(rewards), mask, 0.0)
    return to_go - rewards_to_go(alone, mask, gamma=gamma)
