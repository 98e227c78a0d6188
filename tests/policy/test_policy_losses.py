"""Policy, value and entropy terms: hand-computed numbers, a float64 reference, clip boundaries, and
that no split changes a gradient.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conf.choices import ImportanceMode, KLEstimator, PolicyLoss
from policy.batching import Batch, collate, plan_micro_batches
from policy.losses import (
    PolicyStats,
    entropy_bonus,
    importance_weights,
    kl_loss,
    policy_loss,
    value_loss,
)
from policy.model import PolicyModule

NAN = float("nan")
ALL = torch.ones(1, 1, dtype=torch.bool)


def one(value: float) -> Tensor:
    return torch.tensor([[value]])


def loss_and_slope(ratio: float, advantage: float, **options: float) -> tuple[float, float, float]:
    """Loss of one token at new/old probability `ratio`, its derivative by the logprob, and the
    clipped count.
    """
    old = one(-1.0)
    new = (old + math.log(ratio)).requires_grad_()
    loss, stats = policy_loss(
        new, old, one(advantage), ALL, cliprange=0.2, denominator=1.0, **options
    )
    loss.backward()
    assert new.grad is not None
    return loss.item(), new.grad.item(), stats.clipped.item()


def random_case(seed: int, rows: int = 5, width: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, width, generator=generator) * 3
    mask = torch.rand(rows, width, generator=generator) < 0.7
    mask[0, 0] = True
    return {
        "logprobs": old + 0.3 * torch.randn(rows, width, generator=generator),
        "old_logprobs": old,
        "advantages": torch.randn(rows, width, generator=generator),
        "response_mask": mask,
        "weights": torch.rand(rows, width, generator=generator) + 0.5,
    }


def reference_policy_loss(
    case: dict[str, Tensor], cliprange: float, denominator: float, dual_clip: float | None
) -> tuple[float, float]:
    """float64, token by token, by cases instead of minima -> (loss, clipped tokens)."""
    total, bound = 0.0, 0
    for new, old, advantage, written, weight in zip(
        *(t.flatten().tolist() for t in case.values()), strict=True
    ):
        if not written:
            continue
        ratio = math.exp(new - old)
        used = min(ratio, 1 + cliprange) if advantage >= 0 else max(ratio, 1 - cliprange)
        if dual_clip is not None and advantage < 0:
            used = min(used, dual_clip)
        bound += used != ratio
        total -= weight * used * advantage
    return total / denominator, bound


# --- policy_loss ---


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, 0),  # ratio 1: the policy gradient -A * grad logp
        (1.0, -2.0, 2.0, 2.0, 0),
        (1.1, 2.0, -2.2, -2.2, 0),  # inside: slope -A * ratio
        (1.5, 2.0, -2.4, 0.0, 1),  # gained enough: no gradient
        (0.5, 2.0, -1.0, -1.0, 0),  # a good token that lost probability is pulled back
        (0.5, -2.0, 1.6, 0.0, 1),  # lost enough: no gradient
        (1.5, -2.0, 3.0, 3.0, 0),  # a bad token that gained is pushed down
        (1.5, 0.0, 0.0, 0.0, 0),
    ],
)
def test_hand_computed(
    ratio: float, advantage: float, loss: float, slope: float, clipped: int
) -> None:
    assert loss_and_slope(ratio, advantage) == pytest.approx((loss, slope, clipped), abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        (5.0, -2.0, 6.0, 0.0, 1),  # bounded at 3 * 2
        (2.0, -2.0, 4.0, 4.0, 0),  # below the bound: as without
        (5.0, 2.0, -2.4, 0.0, 1),  # positive advantages: as without
    ],
)
def test_dual_clip_hand_computed(
    ratio: float, advantage: float, loss: float, slope: float, clipped: int
) -> None:
    assert loss_and_slope(ratio, advantage, dual_clip=3.0) == pytest.approx(
        (loss, slope, clipped), abs=1e-5
    )


@pytest.mark.parametrize(
    ("inside", "outside", "advantage"), [(1.1999, 1.2001, 1.0), (0.8001, 0.7999, -1.0)]
)
def test_the_gradient_stops_at_the_clip_boundary(
    inside: float, outside: float, advantage: float
) -> None:
    assert loss_and_slope(inside, advantage)[1] == pytest.approx(-advantage * inside, rel=1e-5)
    assert loss_and_slope(outside, advantage)[1] == 0.0


@pytest.mark.parametrize("dual_clip", [None, 1.3])
def test_float64_reference(dual_clip: float | None) -> None:
    for seed in range(5):
        case = random_case(seed)
        loss, stats = policy_loss(**case, cliprange=0.2, denominator=17.0, dual_clip=dual_clip)
        expected, clipped = reference_policy_loss(case, 0.2, 17.0, dual_clip)
        assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert stats.clipped.item() == clipped
        assert clipped > 0


def test_stats_are_sums_over_the_mask_and_detached() -> None:
    old, new = (
        torch.tensor([[-1.0, -2.0, NAN]]),
        torch.tensor([[-1.0, -1.5, NAN]], requires_grad=True),
    )
    _, stats = policy_loss(
        new,
        old,
        torch.tensor([[1.0, 1.0, NAN]]),
        torch.tensor([[True, True, False]]),
        cliprange=0.2,
        denominator=2.0,
    )
    assert isinstance(stats, PolicyStats)
    assert stats.tokens.item() == 2
    assert stats.clipped.item() == 1
    assert stats.ratio.item() == pytest.approx(1.0 + math.exp(0.5))
    # k3 of KL(old || new): r = new / old
    assert stats.approxkl.item() == pytest.approx(math.exp(0.5) - 1 - 0.5)
    assert not any(
        t.requires_grad for t in (stats.clipped, stats.approxkl, stats.ratio, stats.tokens)
    )


def test_at_ratio_1_the_gradient_is_the_weighted_policy_gradient() -> None:
    case = random_case(1)
    new = case["old_logprobs"].clone().requires_grad_()
    loss, _ = policy_loss(**{**case, "logprobs": new}, cliprange=0.2, denominator=4.0)
    loss.backward()
    expected = torch.where(case["response_mask"], -case["weights"] * case["advantages"], 0.0) / 4.0
    torch.testing.assert_close(new.grad, expected)


def test_only_logprobs_get_a_gradient() -> None:
    case = {
        k: v.requires_grad_() if v.is_floating_point() else v for k, v in random_case(2).items()
    }
    policy_loss(**case, cliprange=0.2, denominator=1.0, dual_clip=3.0)[0].backward()
    assert [k for k, v in case.items() if v.grad is not None] == ["logprobs"]


# --- value_loss and entropy_bonus ---


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "slope", "clipped"),
    [
        (1.1, 1.0, 2.0, 0.405, -0.9, 0),  # inside the range: half the squared error
        # moved enough towards the return: the clipped error (2 - 1.2) counts, without gradient
        (1.5, 1.0, 2.0, 0.32, 0.0, 1),
        (0.5, 1.0, 2.0, 1.125, -1.5, 0),  # moved away: the plain error is larger
    ],
)
def test_value_loss_hand_computed(
    value: float, old: float, target: float, loss: float, slope: float, clipped: int
) -> None:
    values = one(value).requires_grad_()
    result, count = value_loss(
        values, one(old), one(target), ALL, cliprange_value=0.2, denominator=1.0
    )
    result.backward()
    assert values.grad is not None
    assert (result.item(), values.grad.item(), count.item()) == pytest.approx(
        (loss, slope, clipped), abs=1e-6
    )


def test_value_loss_float64_reference() -> None:
    rng = np.random.default_rng(0)
    values, old, returns = rng.normal(size=(3, 4, 5))
    mask = rng.random((4, 5)) < 0.6
    clipped = np.clip(values, old - 0.2, old + 0.2)
    expected = 0.5 * np.maximum((values - returns) ** 2, (clipped - returns) ** 2)[mask].sum() / 9.0
    tensors = [torch.tensor(a, dtype=torch.float32) for a in (values, old, returns)]
    loss, count = value_loss(*tensors, torch.tensor(mask), cliprange_value=0.2, denominator=9.0)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert count.item() == ((clipped - returns) ** 2 > (values - returns) ** 2)[mask].sum()


def test_value_loss_with_a_wide_range_is_half_the_squared_error() -> None:
    values, old, returns = torch.randn(3, 4, 5)
    loss, count = value_loss(
        values,
        old,
        returns,
        torch.ones(4, 5, dtype=torch.bool),
        cliprange_value=1e6,
        denominator=20.0,
    )
    torch.testing.assert_close(loss, 0.5 * nn.functional.mse_loss(values, returns))
    assert count.item() == 0


def test_only_values_get_a_gradient() -> None:
    values, old, returns = (torch.randn(2, 3).requires_grad_() for _ in range(3))
    value_loss(
        values,
        old,
        returns,
        torch.ones(2, 3, dtype=torch.bool),
        cliprange_value=0.2,
        denominator=1.0,
    )[0].backward()
    assert values.grad is not None
    assert old.grad is None
    assert returns.grad is None


def test_entropy_bonus_hand_computed() -> None:
    entropy = torch.tensor([[1.0, 2.0], [4.0, NAN]])
    assert entropy_bonus(
        entropy, torch.tensor([[True, False], [True, False]]), denominator=10.0
    ).item() == pytest.approx(0.5)


# --- importance_weights ---


def test_importance_weights_hand_computed() -> None:
    old, rollout = (
        torch.tensor([[0.5, 0.5, 0.5, 1.0]]).log().requires_grad_(),
        torch.tensor([[0.5, 0.25, 0.1, 1e-45]]).log(),
    )
    weights = importance_weights(old, rollout, cap=3.0)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 2.0, 3.0, 3.0]]))
    assert weights.max() <= 3.0
    assert not weights.requires_grad


def test_importance_weights_correct_the_sampler() -> None:
    """Uncapped, they turn an expectation under the sampler into one under the trainer's policy."""
    sampler, trainer = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.2, 0.6]])
    weights = importance_weights(trainer.log(), sampler.log(), cap=100.0)
    torch.testing.assert_close(
        (sampler * weights * torch.arange(3)).sum(), (trainer * torch.arange(3)).sum()
    )


# --- what no loss may depend on ---

Loss = Callable[[Tensor, dict[str, Tensor]], Tensor]
LOSSES: dict[str, Loss] = {
    "policy": lambda x, c: policy_loss(
        x,
        c["old"],
        c["other"],
        c["mask"],
        cliprange=0.2,
        denominator=11.0,
        dual_clip=2.0,
        weights=c["weights"],
    )[0],
    "value": lambda x, c: value_loss(
        x, c["old"], c["other"], c["mask"], cliprange_value=0.2, denominator=11.0
    )[0],
    "entropy": lambda x, c: entropy_bonus(x, c["mask"], denominator=11.0),
}


def loss_case(seed: int) -> dict[str, Tensor]:
    names = ("x", "old", "other", "mask", "weights")
    return dict(zip(names, random_case(seed).values(), strict=True))


def gradient(loss: Loss, case: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    x = case["x"].clone().requires_grad_()
    value = loss(x, case)
    value.backward()
    assert x.grad is not None
    return value.detach(), x.grad


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("garbage", [NAN, math.inf, -math.inf, 1e30])
def test_garbage_outside_the_mask_reaches_neither_loss_nor_gradient(
    name: str, garbage: float
) -> None:
    case = loss_case(3)
    dirty = {
        k: v if k == "mask" else torch.where(case["mask"], v, garbage) for k, v in case.items()
    }
    for clean, ours in zip(
        gradient(LOSSES[name], case), gradient(LOSSES[name], dirty), strict=True
    ):
        assert torch.equal(clean, ours)
    assert not gradient(LOSSES[name], dirty)[1][~case["mask"]].any()


@pytest.mark.parametrize("name", LOSSES)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), order=st.permutations(range(5)), cut=st.integers(0, 5))
def test_row_order_and_split_change_nothing(
    name: str, seed: int, order: list[int], cut: int
) -> None:
    """Rows shuffled, and computed in two parts (either may be empty) as micro-batches or ranks
    would.
    """
    case = loss_case(seed)
    value, grad = gradient(LOSSES[name], case)
    parts = [
        gradient(LOSSES[name], {k: v[rows] for k, v in case.items()})
        for rows in (order[:cut], order[cut:])
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], value, rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.cat([parts[0][1], parts[1][1]]), grad[order])


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_mask_gives_zero_and_not_nan(name: str) -> None:
    case = {**loss_case(4), "mask": torch.zeros(5, 7, dtype=torch.bool)}
    value, grad = gradient(LOSSES[name], case)
    assert value.item() == 0.0
    assert not grad.any()


@pytest.mark.parametrize("bad", [0.0, -1.0, NAN])
def test_a_denominator_must_be_positive(bad: float) -> None:
    with pytest.raises(ValueError, match="token count"):
        entropy_bonus(one(1.0), ALL, denominator=bad)
    with pytest.raises(ValueError, match="token count"):
        policy_loss(one(1.0), one(1.0), one(1.0), ALL, cliprange=0.2, denominator=bad)
    with pytest.raises(ValueError, match="token count"):
        value_loss(one(1.0), one(1.0), one(1.0), ALL, cliprange_value=0.2, denominator=bad)


def test_shapes_masks_and_bounds_are_checked() -> None:
    # a [B] advantage would broadcast along the wrong axis
    with pytest.raises(ValueError, match="one shape"):
        policy_loss(
            torch.zeros(3, 3),
            torch.zeros(3, 3),
            torch.zeros(3),
            torch.ones(3, 3, dtype=torch.bool),
            cliprange=0.2,
            denominator=1.0,
        )
    with pytest.raises(ValueError, match="boolean"):
        value_loss(one(1.0), one(1.0), one(1.0), one(1.0), cliprange_value=0.2, denominator=1.0)
    with pytest.raises(ValueError, match="dual_clip above 1"):
        loss_and_slope(1.0, 1.0, dual_clip=1.0)
    with pytest.raises(ValueError, match="cap above 0"):
        importance_weights(one(0.0), one(0.0), cap=0.0)


# --- a real model ---


@pytest.fixture(scope="module")
def llama() -> PolicyModule:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    return PolicyModule(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=61, max_position_embeddings=64, tie_word_embeddings=True, **shape
            )
        ),
        chunk=7,
    )


PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6, 5, 3], [5], [8, 9, 7, 9, 3, 2]]
RESPONSES = [[3, 8, 4], [6, 2, 6, 4, 3, 3], [8], [3, 2, 7, 9, 5], [0, 2]]


def model_gradients(
    llama: PolicyModule, pad_id: int, plan: list[list[int]], ranks: int = 1
) -> list[Tensor]:
    """Gradients of policy loss and entropy over `plan`'s micro-batches, dealt out to `ranks` whose
    gradients are summed.
    """
    whole = collate(PROMPTS, RESPONSES, pad_id)
    shape = whole.response_ids.shape
    generator = torch.Generator().manual_seed(1)
    advantages, noise = (
        torch.randn(shape, generator=generator),
        0.2 * torch.randn(shape, generator=generator),
    )
    with torch.no_grad():
        old = llama(*inputs(whole))[0] + noise
    tokens = float(whole.response_mask.sum())
    totals = [torch.zeros_like(p) for p in llama.parameters()]
    for rank in range(ranks):
        llama.zero_grad()
        for rows in plan[rank::ranks]:
            part = whole.select(rows)
            width = part.response_ids.shape[1]
            logprobs, entropy = llama(*inputs(part))
            loss, _ = policy_loss(
                logprobs,
                old[rows, :width],
                advantages[rows, :width],
                part.response_mask,
                cliprange=0.2,
                denominator=tokens,
                dual_clip=3.0,
            )
            (loss - 0.1 * entropy_bonus(entropy, part.response_mask, denominator=tokens)).backward()
        totals = [
            total + param.grad for total, param in zip(totals, llama.parameters(), strict=True)
        ]
    return totals


def inputs(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return batch.input_ids, batch.positions, batch.response_ids, batch.response_mask


@pytest.mark.parametrize(
    ("plan", "ranks", "pad_id"),
    [
        (
            plan_micro_batches(
                [len(p) + len(r) for p, r in zip(PROMPTS, RESPONSES, strict=True)], 16
            ),
            1,
            0,
        ),
        ([[4], [3], [2], [1], [0]], 1, 0),
        ([[4, 0], [3], [2, 1]], 3, 0),
        ([[0, 1, 2, 3, 4]], 1, 60),  # other padding
    ],
    ids=["token budget", "single rows", "three ranks", "padding"],
)
def test_micro_batches_ranks_and_padding_do_not_change_a_models_gradient(
    llama: PolicyModule, plan: list[list[int]], ranks: int, pad_id: int
) -> None:
    expected = model_gradients(llama, 0, [[0, 1, 2, 3, 4]])
    assert sum(float(g.abs().sum()) for g in expected) > 1.0
    for ours, whole in zip(model_gradients(llama, pad_id, plan, ranks), expected, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", PolicyLoss)
def test_every_policy_loss_has_its_surrogate(kind: PolicyLoss) -> None:
    one = torch.ones(1, 2)
    mask = torch.ones(1, 2, dtype=torch.bool)

    def loss() -> Tensor:
        return policy_loss(-one, -one, one, mask, cliprange=0.2, denominator=2.0, kind=kind)[0]

    if kind is PolicyLoss.dpo:
        with pytest.raises(ValueError, match="preference_loss"):
            loss()
    else:
        assert torch.isfinite(loss())


@pytest.mark.parametrize("kind", [PolicyLoss.clip, PolicyLoss.gspo, PolicyLoss.cispo])
def test_nan_outside_the_mask_reaches_no_gradient_of_its_row(kind: PolicyLoss) -> None:
    mask = torch.tensor([[True, True, False]])
    new = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0, NAN]])
    weights = torch.tensor([[1.0, 0.5, NAN]])
    loss, _ = policy_loss(
        new,
        torch.tensor([[-1.0, -2.0, NAN]]),
        advantages,
        mask,
        cliprange=0.2,
        denominator=1.0,
        kind=kind,
        weights=weights,
    )
    loss.backward()
    assert new.grad is not None and bool(new.grad.isfinite().all())
    assert new.grad[0, 2] == 0 and bool((new.grad[0, :2] != 0).all())


@pytest.mark.parametrize("kind", [PolicyLoss.clip, PolicyLoss.gspo, PolicyLoss.cispo])
def test_tokens_of_an_environment_change_nothing(kind: PolicyLoss) -> None:
    """A row with holes has the loss and the gradient of the row without its holes."""
    written = [0, 1, 4, 5]  # two turns; the environment wrote what is between them
    old, weights = torch.tensor([[-1.0, -2.0, -0.5, -1.5]]), torch.tensor([[1.0, 0.5, 2.0, 1.0]])
    advantages = torch.tensor([[1.0, 1.0, -0.5, -0.5]])
    new = torch.tensor([[-0.9, -2.2, -0.6, -1.2]], requires_grad=True)
    options: dict[str, Any] = {"cliprange": 0.5, "denominator": 4.0, "kind": kind}
    alone, found = policy_loss(
        new, old, advantages, torch.ones(1, 4, dtype=torch.bool), weights=weights, **options
    )
    alone.backward()

    def spread(row: Tensor, between: float) -> Tensor:
        out = torch.full((1, 6), between)
        out[:, written] = row
        return out

    holed = spread(new.detach(), -7.0).requires_grad_()
    mask = spread(torch.ones(1, 4), 0.0).bool()
    episode, told = policy_loss(
        holed,
        spread(old, 3.0),
        spread(advantages, 9.0),
        mask,
        weights=spread(weights, 5.0),
        **options,
    )
    episode.backward()
    assert new.grad is not None and holed.grad is not None
    torch.testing.assert_close(episode, alone)
    torch.testing.assert_close(holed.grad, spread(new.grad, 0.0))
    torch.testing.assert_close(told.approxkl, found.approxkl)
    torch.testing.assert_close(told.ratio, found.ratio)


@pytest.mark.parametrize("kind", [PolicyLoss.clip, PolicyLoss.gspo, PolicyLoss.cispo])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_log_ratio_beyond_float32_is_bounded(kind: PolicyLoss, advantage: float) -> None:
    """exp(99) overflows: its gradient was 0 times infinity, and the statistics were infinite."""
    new = torch.tensor([[-0.1, -1.0]], requires_grad=True)
    old = torch.tensor([[-200.0, -1.0]])
    loss, stats = policy_loss(
        new,
        old,
        torch.full((1, 2), advantage),
        torch.ones(1, 2, dtype=torch.bool),
        cliprange=0.2,
        denominator=2.0,
        kind=kind,
    )
    loss.backward()
    assert new.grad is not None and bool(new.grad.isfinite().all())
    assert all(bool(x.isfinite()) for x in (loss, stats.approxkl, stats.ratio))


@pytest.mark.parametrize("estimator", [KLEstimator.k3, KLEstimator.k3_weighted])
def test_a_kl_loss_far_from_its_reference_is_bounded(estimator: KLEstimator) -> None:
    new = torch.tensor([[-120.0, -1.0]], requires_grad=True)
    loss = kl_loss(
        new,
        torch.tensor([[-1.0, -1.1]]),
        new.detach(),
        torch.ones(1, 2, dtype=torch.bool),
        estimator=estimator,
        denominator=2.0,
    )
    loss.backward()
    assert bool(loss.isfinite())
    assert new.grad is not None and bool(new.grad.isfinite().all())


def test_masked_importance_leaves_out_what_is_too_small_too() -> None:
    old = torch.log(torch.tensor([[0.1, 0.4, 0.6, 1.0, 1.9, 2.1]]))
    ratios = importance_weights(old, torch.zeros(1, 6), 2.0, mode=ImportanceMode.mask)
    torch.testing.assert_close(ratios, torch.tensor([[0.0, 0.0, 0.6, 1.0, 1.9, 0.0]]))
    lower = importance_weights(old, torch.zeros(1, 6), 2.0, mode=ImportanceMode.mask, floor=0.2)
    torch.testing.assert_close(lower, torch.tensor([[0.0, 0.4, 0.6, 1.0, 1.9, 0.0]]))
