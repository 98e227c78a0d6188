"""From scores per response to advantages per token, and to the responses that train: those of
groups whose scores differ, the best of each group, or its best and worst as a pair. Shapes: B
responses, T response tokens; `response_mask` is boolean [B, T].
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conf.choices import Selection
from policy.batching import check_mask, masked_sum, rows_by_group, same_shape
from rlhf.process.distributed import SumOverRanks, moments, sample_std


def token_rewards(
    scores: Tensor,
    kl: Tensor,
    response_mask: Tensor,
    kl_coef: float,
    placed: Tensor | None = None,
) -> Tensor:
    """Rewards per token, [B, T] in units of the score, 0 outside the mask (Ziegler et al. 2019,
    arXiv:1909.08593, equation 2).

        rewards_t = -kl_coef * kl_t + placed_t + [t is the last response token] * rest
        rest = score - sum_t placed_t

    `scores` [B]; `kl` [B, T] nats; `placed` [B, T]: the parts of the scores that stand at tokens of
    their own, such as the ends of an episode's turns, 0 elsewhere; None: the whole score stands at
    the last token. Raises ValueError where a row has no response token, because its score would
    vanish.
    """
    same_shape(2, kl=kl, response_mask=response_mask)
    if scores.shape != response_mask.shape[:1]:
        raise ValueError(
            f"expected one score per row, found scores {tuple(scores.shape)} for a mask "
            f"{tuple(response_mask.shape)}"
        )
    check_mask(response_mask)
    empty = (~response_mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"rows {empty[:8]} have no response token that their score could land on")
    columns = torch.arange(response_mask.shape[1], device=kl.device)
    last = torch.where(response_mask, columns, -1).amax(dim=1, keepdim=True)  # [B, 1]
    rewards = torch.where(response_mask, -kl_coef * kl, 0.0)
    if placed is not None:
        same_shape(2, kl=kl, placed=placed)
        placed = torch.where(response_mask, placed, 0.0)
        rewards, scores = rewards + placed, scores - placed.sum(dim=1)
    return rewards.scatter_add(1, last, scores.to(rewards.dtype)[:, None])


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    gamma: float | Tensor,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, equation 16) ->
    (advantages, returns), both [B, T].

        delta_t = r_t + gamma * V_next(t) - V_t
        A_t     = delta_t + gamma * lambda * A_next(t)
        R_t     = A_t + V_t

    next(t) is the next token under the mask, so tokens that the policy did not write neither act
    nor discount; after the last one V and A are 0 (a response is a whole episode, also when it was
    cut off). Rewards and values outside the mask are not read; the results there are 0. `gamma`:
    one for all tokens, or [B, T] from each token to the next (`turn_gamma`).
    """
    same_shape(2, rewards=rewards, values=values, response_mask=response_mask)
    check_mask(response_mask)
    next_value = values.new_zeros(values.shape[0])  # [B]
    next_advantage = torch.zeros_like(next_value)
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        written = response_mask[:, t]
        discount = gamma[:, t] if isinstance(gamma, Tensor) else gamma
        delta = rewards[:, t] + discount * next_value - values[:, t]
        advantage = delta + discount * gae_lambda * next_advantage
        advantages[:, t] = torch.where(written, advantage, 0.0)
        next_value = torch.where(written, values[:, t], next_value)
        next_advantage = torch.where(written, advantage, next_advantage)
    returns = torch.where(response_mask, advantages + values, 0.0)
    return advantages, returns


@torch.no_grad()
def rewards_to_go(rewards: Tensor, response_mask: Tensor, *, gamma: float | Tensor) -> Tensor:
    """Discounted sum of the rewards from each token to the response's end, [B, T]; 0 outside the
    mask.

        G_t = r_t + gamma * G_next(t)

    GAE with lambda 1 and values 0; next(t) is the next token under the mask. Rewards outside it are
    not read. `gamma` as in `gae`.
    """
    advantages, _ = gae(
        rewards, torch.zeros_like(rewards), response_mask, gamma=gamma, gae_lambda=1.0
    )
    return advantages


# ---- turns of an episode; `turns` [B, T] long: the turn of each token under the mask, from 0 ----


def turn_gamma(
    gamma: float, turn_discount: float, turns: Tensor | None, response_mask: Tensor
) -> float | Tensor:
    """What a reward is discounted by from each token to the next: `gamma`, and where a turn ends
    `gamma * turn_discount` ([B, T]). `turns` None: responses of one turn.
    """
    if turns is None or turn_discount == 1.0:
        return gamma
    same_shape(2, turns=turns, response_mask=response_mask)
    check_mask(response_mask)
    follows = response_mask[:, 1:] & (turns[:, 1:] == turns[:, :-1])  # in the same turn
    ends = response_mask.clone()
    ends[:, :-1] &= ~follows
    steps = torch.full(turns.shape, gamma, dtype=torch.float32, device=turns.device)
    return torch.where(ends, gamma * turn_discount, steps)


def last_turn(turns: Tensor, response_mask: Tensor) -> Tensor:
    """[B] long: the number of each row's last turn."""
    return torch.where(response_mask, turns, 0).amax(dim=1)


@torch.no_grad()
def turn_returns(
    rewards: Tensor, turns: Tensor, response_mask: Tensor, turn_discount: float
) -> Tensor:
    """The discounted rewards from each turn to the episode's end, [B, K] in units of the score; K
    turns in the longest episode.

        G_k = sum of turn k's rewards + turn_discount * G_{k+1}

    Behind a row's last turn its last G is repeated: there an episode that has ended is compared by
    how it ended. `rewards` [B, T].
    """
    same_shape(2, rewards=rewards, turns=turns, response_mask=response_mask)
    check_mask(response_mask)
    last = last_turn(turns, response_mask)
    count = int(last.max()) + 1
    own = torch.where(response_mask, rewards, 0.0)
    index = torch.where(response_mask, turns, 0)
    out = rewards.new_zeros(len(rewards), count).scatter_add(1, index, own)
    for k in reversed(range(count - 1)):
        out[:, k] += turn_discount * out[:, k + 1]
    columns = torch.arange(count, device=out.device).expand_as(out)
    return out.gather(1, torch.minimum(columns, last[:, None]))


def of_turns(values: Tensor, turns: Tensor, response_mask: Tensor) -> Tensor:
    """The value of its turn at each token, [B, T], 0 outside the mask; `values` [B, K]."""
    index = torch.where(response_mask, turns, 0)
    return torch.where(response_mask, values.gather(1, index), 0.0)


def discounted_over_turns(
    advantages: Tensor, turns: Tensor, response_mask: Tensor, turn_discount: float
) -> Tensor:
    """An episode's advantage [B] at each of its tokens, [B, T]: times turn_discount for each turn
    that comes after the token's; 0 outside the mask.
    """
    after = last_turn(turns, response_mask)[:, None] - turns
    at_tokens = advantages[:, None] * turn_discount ** after.to(advantages.dtype)
    return torch.where(response_mask, at_tokens, 0.0)


def group_index(keys: Sequence[Hashable], device: torch.device | str | None = None) -> Tensor:
    """[B] long: the number of each row's group, groups counted by first appearance."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor(
        [numbers.setdefault(key, len(numbers)) for key in keys], dtype=torch.long, device=device
    )


@torch.no_grad()
def group_moments(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, sample standard deviation, size) of each row's own group, all [B] float64.

    `values`, `groups` [B]. Two passes, the standard deviation divides by size - 1. Groups may
    differ in size. Raises ValueError for a group of one: a response alone has nothing to be
    compared with, and its raw score would train.
    """
    if values.dim() != 1 or values.shape != groups.shape:
        raise ValueError(
            f"expected values and groups of one shape [B], found {tuple(values.shape)} and "
            f"{tuple(groups.shape)}"
        )
    exact = values.double()
    count = int(groups.max()) + 1 if len(groups) else 0
    size = torch.bincount(groups, minlength=count).double()
    if bool((size < 2).any()):
        alone = (size < 2).nonzero().flatten().tolist()
        raise ValueError(
            f"expected at least two responses per group, found groups {alone[:8]} of one"
        )
    mean = exact.new_zeros(count).index_add(0, groups, exact) / size
    squares = exact.new_zeros(count).index_add(0, groups, (exact - mean[groups]).square())
    return mean[groups], (squares / (size - 1)).sqrt()[groups], size[groups]


@torch.no_grad()
def group_advantages(scores: Tensor, groups: Tensor, *, std: bool, floor: float = 1e-6) -> Tensor:
    """Scores against their own group, [B] float32 (Shao et al. 2024, arXiv:2402.03300, section
    4.1.2).

        A_i = (s_i - mean_g) / max(std_g, floor)

    `std` False: without the division (Liu et al. 2025, arXiv:2503.20783). A group of equal scores
    gets exactly 0. `scores`, `groups` [B]; `floor` in units of the score. Raises ValueError for a
    group of one.
    """
    return group_turn_advantages(scores[:, None], groups, std=std, floor=floor)[:, 0]


def _centred(scores: Tensor, mean: Tensor) -> Tensor:
    """Scores less their mean, without what rounding the mean leaves of equal scores."""
    centred = scores.double() - mean
    return torch.where(centred.abs() <= 1e-9 * mean.abs(), 0.0, centred)


@torch.no_grad()
def group_turn_advantages(
    returns: Tensor, groups: Tensor, *, std: bool, floor: float = 1e-6
) -> Tensor:
    """Each turn's return against those of its group from the same turn, [B, K] float32; `returns`
    [B, K] by `turn_returns`, `groups` [B].

        A_ik = (G_ik - mean_gk) / max(max over k of std_gk, floor)

    One standard deviation for all turns of a group keeps their sizes apart: what is discounted
    stays smaller. `std` False: without the division. Raises ValueError for a group of one.
    """
    centred, deviations = [], []
    for k in range(returns.shape[1]):
        mean, deviation, _ = group_moments(returns[:, k], groups)
        centred.append(_centred(returns[:, k], mean))
        deviations.append(deviation)
    out = torch.stack(centred, dim=1)
    if std:
        largest = torch.stack(deviations, dim=1).amax(dim=1, keepdim=True)
        out = out / largest.clamp(min=floor)
    return out.float()


@torch.no_grad()
def leave_one_out_advantages(scores: Tensor, groups: Tensor) -> Tensor:
    """Scores against the mean of the others in their group, [B] float32 (Kool et al. 2019; Ahmadian
    et al. 2024, arXiv:2402.14740, equation 8).

        A_i = s_i - 1/(k-1) sum_{j != i} s_j = k/(k-1) (s_i - mean_g)

    Raises ValueError for a group of one.
    """
    mean, _, size = group_moments(scores, groups)
    return ((scores.double() - mean) * size / (size - 1)).float()


@torch.no_grad()
def masked_moments(
    values: Tensor, mask: Tensor, sum_over_ranks: SumOverRanks | None = None
) -> tuple[float, float, int]:
    """(mean, sample standard deviation, count) of `values` [...] where `mask` [...] is True, over
    all ranks.

    The standard deviation divides by count - 1 and is 0 for a single value. Two passes in float64:
    the one-pass E[x^2] - E[x]^2 cancels when the mean is large. With `sum_over_ranks` it is a
    collective, and a rank with an empty mask takes part. Raises ValueError, on every rank, where
    there is no value at all or one that isn't finite.
    """
    same_shape(values.dim(), values=values, mask=mask)
    check_mask(mask)
    exact = values.double()
    count, mean, m2 = moments(
        int(mask.sum()),
        float(masked_sum(exact, mask)),
        lambda about: float(masked_sum((exact - about).square(), mask)),
        sum_over_ranks,
    )
    return mean, sample_std(m2, count), count


def whiten(
    values: Tensor, mask: Tensor, mean: float, std: float, *, shift: bool, floor: float = 1e-5
) -> Tensor:
    """Scale `values` [...] to unit standard deviation under `mask`; 0 outside it.

        shift=True:   (values - mean) / max(std, floor)
        shift=False:  values / max(std, floor)

    Advantages are shifted, to mean 0. Rewards are not: a positive scale leaves the optimal policy
    as it is. `shift=False` does not add an unscaled mean back, as (values - mean) / std + mean
    would: that is a constant bonus per token and pays for length. The floor, in units of `values`,
    keeps float32 rounding of equal values from becoming a signal of size 1.
    """
    same_shape(values.dim(), values=values, mask=mask)
    check_mask(mask)
    centre = mean if shift else 0.0
    return torch.where(mask, scaled(values - centre, std, floor), 0.0)


def scaled(values: Tensor, std: float, floor: float = 1e-5) -> Tensor:
    """`values` [...] in units of `std`, as `whiten` scales them."""
    return values / max(std, floor)


@dataclass(frozen=True, slots=True)
class Selected:
    """Row numbers. `pairs` hold (better, worse) and are empty unless the selection makes pairs;
    every row of a pair is in `rows`.
    """

    rows: list[int]
    pairs: list[tuple[int, int]]


def all_equal(scores: Sequence[float], rows: Sequence[int]) -> bool:
    """Whether these rows' scores are all the same, so that comparing them says nothing."""
    return max(scores[row] for row in rows) == min(scores[row] for row in rows)


def unequal_groups(scores: Sequence[float], groups: Sequence[int]) -> list[list[int]]:
    """Row numbers of the groups whose scores are not all equal, groups by first appearance."""
    return [rows for rows in rows_by_group(groups) if not all_equal(scores, rows)]


def _best(scores: Sequence[float], rows: Sequence[int]) -> int:
    return max(rows, key=lambda row: (scores[row], -row))


def _worst(scores: Sequence[float], rows: Sequence[int]) -> int:
    return min(rows, key=lambda row: (scores[row], row))


def select(scores: Sequence[float], groups: Sequence[int], selection: Selection) -> Selected:
    """The rows that train. `scores`, `groups`: [B]. Ties go to the first row.

    all: every row. unequal: the rows of groups whose scores are not all equal (Yu et al. 2025,
    arXiv:2503.14476, section 3.2). best: the best row of every group (Dong et al. 2023,
    arXiv:2304.06767). best_worst: the best and the worst row of every group whose scores are not
    all equal (Guo et al. 2024, arXiv:2402.04792).
    """
    match selection:
        case Selection.all:
            return Selected(list(range(len(scores))), [])
        case Selection.unequal:
            return Selected([row for rows in unequal_groups(scores, groups) for row in rows], [])
        case Selection.best:
            return Selected([_best(scores, rows) for rows in rows_by_group(groups)], [])
        case Selection.best_worst:
            pairs = [
                (_best(scores, rows), _worst(scores, rows))
                for rows in unequal_groups(scores, groups)
            ]
            return Selected([row for pair in pairs for row in pair], pairs)
    raise ValueError(f"unknown selection {selection!r}")
