"""Rewards per token, GAE, whitening and running moments: hand-computed numbers, float64 references,
identities and invariances.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.advantages import (
    gae,
    group_advantages,
    group_index,
    leave_one_out_advantages,
    masked_moments,
    rewards_to_go,
    token_rewards,
    whiten,
)
from rlhf.process.distributed import RunningMoments, SumOverRanks, all_sum

NAN = float("nan")
T = TypeVar("T")


class Ranks:
    """`sum_over_ranks` of several ranks, played by threads that meet at every call."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = Barrier(size, timeout=10)
        self.posted: dict[int, Sequence[float]] = {}

    def run(self, work: Callable[[int, SumOverRanks], T]) -> list[T]:
        def sum_from(rank: int) -> SumOverRanks:
            def sum_over_ranks(values: Sequence[float]) -> list[float]:
                self.posted[rank] = values
                self.barrier.wait()
                total = [math.fsum(column) for column in zip(*self.posted.values(), strict=True)]
                self.barrier.wait()
                return total

            return sum_over_ranks

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(lambda rank: work(rank, sum_from(rank)), range(self.size)))


def random_case(
    seed: int, rows: int = 6, width: int = 9
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewards, values [rows, width] and a mask with holes; one row has no token at all."""
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, width)) < 0.7
    mask[-1] = False
    return rng.normal(size=(rows, width)), rng.normal(size=(rows, width)), mask


def reference_gae(
    rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, gamma: float, gae_lambda: float
) -> tuple[np.ndarray, np.ndarray]:
    """float64, from the definition A_t = sum_k (gamma lambda)^k delta_{t+k} over the tokens of one
    row that the policy wrote.
    """
    advantages, returns = np.zeros_like(rewards), np.zeros_like(rewards)
    for row in range(len(mask)):
        (own,) = np.nonzero(mask[row])
        r, v = rewards[row, own], values[row, own]
        delta = r + gamma * np.append(v[1:], 0.0) - v if len(own) else r
        for i, column in enumerate(own):
            advantages[row, column] = sum(
                (gamma * gae_lambda) ** k * d for k, d in enumerate(delta[i:])
            )
            returns[row, column] = advantages[row, column] + v[i]
    return advantages, returns


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.tensor(a, dtype=torch.bool if a.dtype == bool else torch.float32) for a in arrays]


# --- token_rewards ---


def test_token_rewards_hand_computed() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    kl = torch.tensor([[0.5, -1.0, NAN], [1.0, 2.0, 3.0], [4.0, NAN, NAN]])
    rewards = token_rewards(torch.tensor([1.0, -2.0, 3.0]), kl, mask, kl_coef=0.1)
    torch.testing.assert_close(
        rewards, torch.tensor([[-0.05, 1.1, 0.0], [-0.1, -0.2, -2.3], [2.6, 0.0, 0.0]])
    )


def test_the_score_lands_on_the_last_response_token_behind_a_hole() -> None:
    mask = torch.tensor([[True, False, True, False]])
    assert token_rewards(torch.tensor([7.0]), torch.zeros(1, 4), mask, 1.0).tolist() == [
        [0.0, 0.0, 7.0, 0.0]
    ]


def test_token_rewards_sum_to_score_minus_kl() -> None:
    _, kl, mask = random_case(1)
    mask[:, 4] = True
    scores = torch.arange(6.0)
    rewards = token_rewards(scores, *tensors(kl, mask), kl_coef=0.3)
    torch.testing.assert_close(
        rewards.sum(1), scores - 0.3 * torch.tensor((kl * mask).sum(1), dtype=torch.float32)
    )


def test_a_response_without_tokens_rises() -> None:
    with pytest.raises(ValueError, match=r"rows \[1\] have no response token"):
        token_rewards(
            torch.zeros(2), torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]), 0.1
        )


def test_token_rewards_refuses_other_shapes_and_number_masks() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="one score per row"):
        token_rewards(torch.zeros(2, 1), torch.zeros(2, 3), mask, 0.1)
    with pytest.raises(ValueError, match="one shape"):
        token_rewards(torch.zeros(2), torch.zeros(2, 1), mask, 0.1)
    with pytest.raises(ValueError, match="boolean"):
        token_rewards(torch.zeros(2), torch.zeros(2, 3), mask.long(), 0.1)


# --- gae ---


def test_gae_hand_computed() -> None:
    # gamma 0.9, lambda 0.5, all written: delta = [1 + 0.9*2 - 1, 0 + 0.9*3 - 2, 2 - 3] = [1.8, 0.7,
    # -1]
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = gae(
        torch.tensor([[1.0, 0.0, 2.0]]),
        torch.tensor([[1.0, 2.0, 3.0]]),
        mask,
        gamma=0.9,
        gae_lambda=0.5,
    )
    # 1.8 + 0.45*0.25, 0.7 - 0.45, -1
    torch.testing.assert_close(advantages, torch.tensor([[1.9125, 0.25, -1.0]]))
    torch.testing.assert_close(returns, torch.tensor([[2.9125, 2.25, 2.0]]))


def test_gae_passes_over_tokens_that_the_policy_did_not_write() -> None:
    # the same episode with a hole and padding, where nothing may be read
    mask = torch.tensor([[True, False, True, True, False]])
    rewards, values = (
        torch.tensor([[1.0, NAN, 0.0, 2.0, NAN]]),
        torch.tensor([[1.0, NAN, 2.0, 3.0, NAN]]),
    )
    advantages, returns = gae(rewards, values, mask, gamma=0.9, gae_lambda=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[1.9125, 0.0, 0.25, -1.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[2.9125, 0.0, 2.25, 2.0, 0.0]]))


@pytest.mark.parametrize(
    ("gamma", "gae_lambda"), [(1.0, 1.0), (0.99, 0.95), (0.5, 0.0), (1.0, 0.3)]
)
def test_gae_float64_reference(gamma: float, gae_lambda: float) -> None:
    for seed in range(5):
        case = random_case(seed)
        ours = gae(*tensors(*case), gamma=gamma, gae_lambda=gae_lambda)
        for mine, theirs in zip(ours, reference_gae(*case, gamma, gae_lambda), strict=True):
            np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-5, atol=1e-5)


def test_gae_with_lambda_1_and_gamma_1_is_the_return_minus_the_value() -> None:
    rewards, values, mask = tensors(*random_case(3))
    advantages, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    to_go = torch.where(mask, rewards, 0.0).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, torch.where(mask, to_go, 0.0))
    torch.testing.assert_close(advantages, torch.where(mask, to_go - values, 0.0))


def test_gae_with_lambda_0_is_the_td_error() -> None:
    rewards, values, _ = tensors(*random_case(4))
    advantages, _ = gae(
        rewards, values, torch.ones(6, 9, dtype=torch.bool), gamma=0.9, gae_lambda=0.0
    )
    following = torch.cat([values[:, 1:], torch.zeros(6, 1)], dim=1)
    torch.testing.assert_close(advantages, rewards + 0.9 * following - values)


def test_gae_of_a_perfect_critic_is_zero() -> None:
    rewards, _, mask = tensors(*random_case(5))
    _, returns = gae(rewards, torch.zeros_like(rewards), mask, gamma=0.9, gae_lambda=1.0)
    for gae_lambda in (0.0, 0.5, 1.0):
        advantages, _ = gae(rewards, returns, mask, gamma=0.9, gae_lambda=gae_lambda)
        torch.testing.assert_close(advantages, torch.zeros_like(advantages), atol=1e-6, rtol=0)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 4), st.permutations(range(6)))
def test_gae_ignores_padding_and_row_order(seed: int, padding: int, order: list[int]) -> None:
    rewards, values, mask = tensors(*random_case(seed))
    expected = gae(rewards, values, mask, gamma=0.98, gae_lambda=0.9)
    garbage = torch.full((6, padding), NAN)
    wide = [
        torch.cat([torch.where(mask, x, NAN), garbage], dim=1)[order] for x in (rewards, values)
    ]
    wide_mask = torch.cat([mask, torch.zeros(6, padding, dtype=torch.bool)], dim=1)[order]
    for ours, plain in zip(
        gae(*wide, wide_mask, gamma=0.98, gae_lambda=0.9), expected, strict=True
    ):
        assert torch.equal(ours[:, : mask.shape[1]], plain[order])
        assert not ours[:, mask.shape[1] :].any()


def test_gae_gives_no_gradient() -> None:
    values = torch.zeros(1, 2, requires_grad=True)
    advantages, returns = gae(
        torch.ones(1, 2), values, torch.ones(1, 2, dtype=torch.bool), gamma=1.0, gae_lambda=1.0
    )
    assert not advantages.requires_grad
    assert not returns.requires_grad


# --- moments and whitening ---


def test_moments_hand_computed() -> None:
    values, mask = (
        torch.tensor([[1.0, 2.0, NAN], [6.0, 100.0, NAN]]),
        torch.tensor([[True, True, False], [True, False, False]]),
    )
    mean, std, count = masked_moments(values, mask)
    assert (mean, count) == (3.0, 3)
    assert std == pytest.approx(math.sqrt(7))  # (4 + 1 + 9) / (3 - 1)


def test_moments_of_one_value_have_no_spread() -> None:
    assert masked_moments(torch.tensor([[5.0, NAN]]), torch.tensor([[True, False]])) == (
        5.0,
        0.0,
        1,
    )


def test_moments_do_not_cancel_at_a_large_mean() -> None:
    values = 1e6 + torch.tensor([[0.0, 0.5, 1.0, 1.5]])
    _, std, _ = masked_moments(values, torch.ones(1, 4, dtype=torch.bool))
    assert std == pytest.approx(np.std([0.0, 0.5, 1.0, 1.5], ddof=1), rel=1e-9)


def test_moments_do_not_depend_on_the_rank_split() -> None:
    _, values, mask = random_case(7)
    whole = masked_moments(*tensors(values, mask), all_sum)
    assert whole[1] == pytest.approx(np.std(values.astype(np.float32)[mask], ddof=1), rel=1e-6)
    parts = np.split(np.arange(6), [1, 5])  # uneven; the last rank's mask is empty
    split = Ranks(3).run(
        lambda rank, reduce: masked_moments(
            *tensors(values[parts[rank]], mask[parts[rank]]), reduce
        )
    )
    assert split[0] == split[1] == split[2]
    assert split[0] == pytest.approx(whole, rel=1e-12)


def test_moments_of_nothing_or_of_nan_rise_on_every_rank() -> None:
    def error(values: torch.Tensor, mask: torch.Tensor, reduce: SumOverRanks) -> str:
        with pytest.raises(ValueError, match="values") as caught:
            masked_moments(values, mask, reduce)
        return str(caught.value)

    none, one = torch.zeros(1, 2, dtype=torch.bool), torch.tensor([[True, False]])
    assert all(
        "mask is empty" in m
        for m in Ranks(2).run(lambda _, reduce: error(torch.zeros(1, 2), none, reduce))
    )
    values = [torch.zeros(1, 2), torch.full((1, 2), NAN)]
    assert all(
        "finite" in m for m in Ranks(2).run(lambda rank, reduce: error(values[rank], one, reduce))
    )


def test_whitening_hand_computed() -> None:
    values, mask = (
        torch.tensor([[1.0, 2.0, NAN], [6.0, 9.0, NAN]]),
        torch.tensor([[True, True, False], [True, False, False]]),
    )
    torch.testing.assert_close(
        whiten(values, mask, 3.0, 2.0, shift=True),
        torch.tensor([[-1.0, -0.5, 0.0], [1.5, 0.0, 0.0]]),
    )
    torch.testing.assert_close(
        whiten(values, mask, 3.0, 2.0, shift=False),
        torch.tensor([[0.5, 1.0, 0.0], [3.0, 0.0, 0.0]]),
    )


def test_whitened_values_have_mean_0_and_std_1() -> None:
    _, values, mask = tensors(*random_case(8))
    shifted = whiten(values, mask, *masked_moments(values, mask)[:2], shift=True)
    assert masked_moments(shifted, mask)[:2] == pytest.approx((0.0, 1.0), abs=1e-6)
    mean, std, _ = masked_moments(values, mask)
    assert masked_moments(whiten(values, mask, mean, std, shift=False), mask)[:2] == pytest.approx(
        (mean / std, 1.0), rel=1e-5
    )


def test_scaling_keeps_signs_and_shares() -> None:
    """shift=False multiplies by one positive number: it can't turn a reward of 0 into a bonus per
    token.
    """
    _, values, mask = tensors(*random_case(9))
    values[0, 0], mask[0, 0] = 0.0, True
    scaled = whiten(values, mask, *masked_moments(values, mask)[:2], shift=False)
    factors = (scaled / values)[mask & (values != 0)]
    torch.testing.assert_close(factors, factors[:1].expand_as(factors))
    assert scaled[0, 0] == 0.0


def test_the_floor_keeps_rounding_from_becoming_a_signal() -> None:
    values = 1.0 + 1e-7 * torch.tensor([[0.0, 1.0, -1.0, 1.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    mean, std, _ = masked_moments(values, mask)
    assert whiten(values, mask, mean, std, shift=True).abs().max() < 0.05
    assert whiten(values, mask, mean, 0.0, shift=True).isfinite().all()


# --- RunningMoments ---


batches = st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6), min_size=1, max_size=6)


@settings(deadline=None)
@given(batches)
def test_running_moments_equal_those_of_all_values(groups: list[list[float]]) -> None:
    running = RunningMoments()
    for group in groups:
        running.update(group)
    everything = np.array([x for group in groups for x in group])
    assert running.count == len(everything)
    assert running.mean == pytest.approx(everything.mean(), abs=1e-9)
    assert running.std == pytest.approx(
        everything.std(ddof=1) if len(everything) > 1 else 0.0, abs=1e-6
    )


def test_running_moments_hand_computed() -> None:
    running = RunningMoments()
    assert (running.count, running.mean, running.std) == (0, 0.0, 0.0)
    running.update([1.0])
    assert (running.mean, running.std) == (1.0, 0.0)
    running.update([2.0, 6.0])
    assert running.mean == pytest.approx(3.0)
    assert running.std == pytest.approx(math.sqrt(7))


def test_running_moments_do_not_depend_on_the_rank_split() -> None:
    steps = [[[1.0, 2.0, 3.5], []], [[0.5], [4.0, 5.0]]]  # [step][rank]

    def work(rank: int, reduce: SumOverRanks) -> RunningMoments:
        running = RunningMoments()
        for step in steps:
            running.update(step[rank], reduce)
        return running

    left, right = Ranks(2).run(work)
    assert left.state_dict() == right.state_dict()
    assert (left.count, left.mean) == (6, pytest.approx(np.mean([1, 2, 3.5, 0.5, 4, 5])))
    assert left.std == pytest.approx(np.std([1, 2, 3.5, 0.5, 4, 5], ddof=1))


def test_running_moments_resume() -> None:
    running, resumed = RunningMoments(), RunningMoments()
    running.update([1.0, 5.0, 2.0])
    resumed.load_state_dict(running.state_dict())
    for moments in (running, resumed):
        moments.update([7.0, 8.0])
    assert resumed.state_dict() == running.state_dict()


def test_running_moments_refuse_what_is_not_finite_and_stay_as_they_were() -> None:
    running = RunningMoments()
    running.update([1.0, 2.0])
    before = running.state_dict()
    for bad in ([NAN], [3.0, math.inf], []):
        with pytest.raises(ValueError, match="values"):
            running.update(bad)
    assert running.state_dict() == before


# --- groups ---


def test_group_advantages_hand_computed_with_groups_of_different_sizes() -> None:
    scores = torch.tensor([1.0, 10.0, 3.0, 10.0, 16.0])
    groups = group_index(["a", "b", "a", "b", "b"])
    assert groups.tolist() == [0, 1, 0, 1, 1]
    # a: mean 2, std sqrt(2); b: mean 12, std sqrt(12)
    torch.testing.assert_close(
        group_advantages(scores, groups, std=False), torch.tensor([-1.0, -2.0, 1.0, -2.0, 4.0])
    )
    expected = torch.tensor([-1 / 2**0.5, -2 / 12**0.5, 1 / 2**0.5, -2 / 12**0.5, 4 / 12**0.5])
    torch.testing.assert_close(group_advantages(scores, groups, std=True), expected)
    # leave one out: 1 - 3, 10 - 13, 3 - 1, 10 - 13, 16 - 10
    torch.testing.assert_close(
        leave_one_out_advantages(scores, groups), torch.tensor([-2.0, -3.0, 2.0, -3.0, 6.0])
    )


@pytest.mark.parametrize("value", [0.1, 1e6 + 1 / 3, -7.7e-5])
@pytest.mark.parametrize("std", [True, False])
def test_a_group_of_equal_scores_gets_exactly_nothing(value: float, std: bool) -> None:
    """One-pass variance of these numbers is rounding noise, and noise / noise would be a signal of
    size 1.
    """
    assert (
        group_advantages(
            torch.full((7,), value), torch.zeros(7, dtype=torch.long), std=std
        ).tolist()
        == [0.0] * 7
    )


def test_a_group_of_one_is_an_error() -> None:
    for function in (lambda s, g: group_advantages(s, g, std=True), leave_one_out_advantages):
        with pytest.raises(ValueError, match=r"groups \[1\] of one"):
            function(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1]))


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(-100, 100)), min_size=1, max_size=24),
    st.integers(0, 2**31),
)
def test_group_order_changes_nothing_and_every_group_sums_to_zero(
    drawn: list[tuple[int, int]], seed: int
) -> None:
    drawn = [*drawn, *drawn]  # no group of one
    order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed))
    scores, keys = torch.tensor([float(score) for _, score in drawn]), [key for key, _ in drawn]
    plain = group_advantages(scores, group_index(keys), std=True)
    shuffled = group_advantages(
        scores[order], group_index([keys[i] for i in order.tolist()]), std=True
    )
    torch.testing.assert_close(shuffled, plain[order], rtol=1e-5, atol=1e-6)
    for key in set(keys):
        rows = [i for i, k in enumerate(keys) if k == key]
        assert float(plain[rows].sum()) == pytest.approx(0.0, abs=1e-4)


@given(st.integers(0, 2**31))
def test_leave_one_out_equals_the_group_mean_scaled(seed: int) -> None:
    scores = torch.randn(12, generator=torch.Generator().manual_seed(seed))
    groups = torch.arange(12) % 3
    centred = group_advantages(scores, groups, std=False)
    torch.testing.assert_close(
        leave_one_out_advantages(scores, groups), centred * 4 / 3, rtol=1e-5, atol=1e-6
    )


def test_rewards_to_go_hand_computed() -> None:
    rewards = torch.tensor([[1.0, 9.0, 2.0, 4.0], [3.0, 5.0, 0.0, 0.0]])
    # a token that the policy did not write is skipped
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]])
    expected = torch.tensor([[1 + 0.5 * 4, 0.0, 2 + 0.5 * 4, 4.0], [3 + 0.5 * 5, 5.0, 0.0, 0.0]])
    torch.testing.assert_close(rewards_to_go(rewards, mask, gamma=0.5), expected)
