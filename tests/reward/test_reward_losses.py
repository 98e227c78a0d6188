"""The pairwise loss: hand-computed numbers, a float64 reference, identities, and TRL's own
computation.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from reward.losses import pairwise_loss

LN2 = 0.6931471805599453


def test_hand_computed() -> None:
    # differences 0 and ln 3: sigmoid 1/2 and 3/4
    chosen, rejected = torch.tensor([1.0, math.log(3)]), torch.tensor([1.0, 0.0])
    assert pairwise_loss(chosen, rejected).item() == pytest.approx((LN2 + math.log(4 / 3)) / 2)


def test_a_margin_shifts_the_difference() -> None:
    chosen, rejected, margin = (
        torch.tensor([3.0, 2.0]),
        torch.tensor([1.0, 0.0]),
        torch.tensor([2.0, 2.0]),
    )
    assert pairwise_loss(chosen, rejected, margin).item() == pytest.approx(LN2)


def test_centring_hand_computed() -> None:
    chosen, rejected = torch.tensor([2.0, 1.0]), torch.tensor([2.0, 1.0])
    assert pairwise_loss(chosen, rejected, centering_coef=0.1).item() == pytest.approx(
        LN2 + 0.1 * (16 + 4) / 2
    )


def test_float64_reference() -> None:
    rng = np.random.default_rng(0)
    chosen, rejected, margin = rng.normal(size=(3, 50)) * 5
    expected = np.mean(np.log1p(np.exp(-(chosen - rejected - margin)))) + 0.02 * np.mean(
        (chosen + rejected) ** 2
    )
    ours = pairwise_loss(
        *(torch.tensor(a, dtype=torch.float32) for a in (chosen, rejected, margin)),
        centering_coef=0.02,
    )
    assert ours.item() == pytest.approx(expected, rel=1e-5)


def test_gradient_is_minus_the_probability_of_the_wrong_order() -> None:
    chosen, rejected = (
        torch.tensor([0.5, -1.0], requires_grad=True),
        torch.tensor([0.0, 1.0], requires_grad=True),
    )
    pairwise_loss(chosen, rejected).backward()
    wrong = torch.sigmoid(rejected - chosen).detach() / 2
    torch.testing.assert_close(chosen.grad, -wrong)
    torch.testing.assert_close(rejected.grad, wrong)


def test_only_differences_count_unless_centred() -> None:
    chosen, rejected = torch.tensor([0.5, -1.0]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(
        pairwise_loss(chosen + 7, rejected + 7), pairwise_loss(chosen, rejected)
    )
    assert (
        pairwise_loss(chosen + 7, rejected + 7, centering_coef=0.1)
        > pairwise_loss(chosen, rejected, centering_coef=0.1) + 1.0
    )


def test_swapped_probabilities_add_up_to_one() -> None:
    chosen, rejected = torch.tensor([0.3]), torch.tensor([-0.9])
    total = torch.exp(-pairwise_loss(chosen, rejected)) + torch.exp(
        -pairwise_loss(rejected, chosen)
    )
    assert total.item() == pytest.approx(1.0)


def test_soft_labels_hand_computed() -> None:
    # sigmoid(ln 3) = 3/4: with p = 1/4 the loss is 1/4 ln(4/3) + 3/4 ln 4; a tie of equal scores
    # costs ln 2
    chosen, rejected, soft = (
        torch.tensor([math.log(3), 5.0]),
        torch.tensor([0.0, 5.0]),
        torch.tensor([0.25, 0.5]),
    )
    expected = (math.log(4 / 3) / 4 + 3 * math.log(4) / 4 + LN2) / 2
    assert pairwise_loss(chosen, rejected, soft_label=soft).item() == pytest.approx(expected)


def test_soft_labels_float64_reference() -> None:
    rng = np.random.default_rng(1)
    chosen, rejected = rng.normal(size=(2, 50)) * 5
    soft = rng.uniform(size=50)
    likely = 1 / (1 + np.exp(-(chosen - rejected)))
    expected = np.mean(-soft * np.log(likely) - (1 - soft) * np.log(1 - likely)) + 0.02 * np.mean(
        (chosen + rejected) ** 2
    )
    tensors = [torch.tensor(a, dtype=torch.float32) for a in (chosen, rejected, soft)]
    assert pairwise_loss(tensors[0], tensors[1], None, 0.02, tensors[2]).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_a_certain_soft_label_is_the_plain_loss() -> None:
    chosen, rejected = torch.tensor([0.5, -1.0, 30.0]), torch.tensor([0.0, 1.0, -70.0])
    assert torch.equal(
        pairwise_loss(chosen, rejected, soft_label=torch.ones(3)), pairwise_loss(chosen, rejected)
    )
    assert torch.equal(
        pairwise_loss(chosen, rejected, soft_label=torch.zeros(3)), pairwise_loss(rejected, chosen)
    )


def test_soft_label_of_swapped_sides_is_the_complement() -> None:
    chosen, rejected, soft = (
        torch.tensor([0.5, -1.0]),
        torch.tensor([0.0, 1.0]),
        torch.tensor([0.9, 0.3]),
    )
    torch.testing.assert_close(
        pairwise_loss(chosen, rejected, soft_label=soft),
        pairwise_loss(rejected, chosen, soft_label=1 - soft),
    )


def test_gradient_of_soft_labels_is_how_far_the_probability_is_off() -> None:
    """d loss / d chosen = (sigmoid(chosen - rejected) - p) / B: none where the scores say what the
    label says.
    """
    chosen = torch.tensor([0.5, -1.0, math.log(3)], dtype=torch.float32, requires_grad=True)
    rejected, soft = (
        torch.tensor([0.0, 1.0, 0.0], requires_grad=True),
        torch.tensor([0.6, 0.5, 0.75]),
    )
    pairwise_loss(chosen, rejected, soft_label=soft).backward()
    off = (torch.sigmoid(chosen - rejected).detach() - soft) / 3
    torch.testing.assert_close(chosen.grad, off)
    torch.testing.assert_close(rejected.grad, -off)
    assert abs(float(chosen.grad[2])) < 1e-7


@pytest.mark.parametrize(
    "wrong",
    [torch.tensor([1.1, 0.5]), torch.tensor([-0.1, 0.5]), torch.tensor([float("nan"), 0.5])],
)
def test_soft_labels_that_are_no_probabilities(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match=r"soft labels in \[0, 1\]"):
        pairwise_loss(torch.zeros(2), torch.zeros(2), soft_label=wrong)
    with pytest.raises(ValueError, match="no margin beside them"):
        pairwise_loss(
            torch.zeros(2), torch.zeros(2), torch.zeros(2), soft_label=torch.full((2,), 0.5)
        )


@pytest.mark.parametrize("soft", [None, torch.tensor([0.9, 0.5, 0.1])])
@pytest.mark.parametrize("coef", [None, 0.1])
def test_what_trains_is_this_equation(soft: Tensor | None, coef: float | None) -> None:
    """rlhf.offline.step_rows.pair_loss: the same without weights and with equal ones; by any
    weights the weighted mean of single pairs.
    """
    from rlhf.offline.step_rows import pair_loss

    chosen, rejected, weights = (
        torch.tensor([0.5, -1.0, 2.0]),
        torch.tensor([0.0, 1.0, 2.5]),
        torch.tensor([0.5, 2.0, 0.0]),
    )
    whole = pairwise_loss(chosen, rejected, None, coef or 0.0, soft)
    torch.testing.assert_close(pair_loss(chosen, rejected, None, None, coef, soft), whole)
    torch.testing.assert_close(pair_loss(chosen, rejected, torch.ones(3), None, coef, soft), whole)
    single = [
        pairwise_loss(
            chosen[i : i + 1],
            rejected[i : i + 1],
            None,
            coef or 0.0,
            None if soft is None else soft[i : i + 1],
        )
        for i in range(3)
    ]
    expected = sum(w * loss for w, loss in zip(weights, single, strict=True)) / 3
    torch.testing.assert_close(pair_loss(chosen, rejected, weights, None, coef, soft), expected)


def test_large_differences_neither_overflow_nor_vanish() -> None:
    assert pairwise_loss(torch.tensor([0.0]), torch.tensor([500.0])).item() == pytest.approx(500.0)
    assert pairwise_loss(torch.tensor([500.0]), torch.tensor([0.0])).item() == 0.0


def test_half_precision_is_computed_in_float32() -> None:
    chosen, rejected = torch.tensor([1.0, 2.0]).bfloat16(), torch.tensor([0.5, -1.0]).bfloat16()
    loss = pairwise_loss(chosen, rejected)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, pairwise_loss(chosen.float(), rejected.float()))


@pytest.mark.parametrize(
    ("margin", "coef"),
    [
        (None, None),
        (torch.tensor([0.5, 0.0, 1.0]), None),
        (None, 0.01),
        (torch.tensor([0.5, 0.0, 1.0]), 0.01),
    ],
)
def test_trl_computes_the_same(margin: Tensor | None, coef: float | None) -> None:
    """RewardTrainer.compute_loss on a model that returns fixed scores: chosen rows first, then
    rejected ones.
    """
    from trl import RewardTrainer

    chosen, rejected = torch.tensor([1.0, -0.5, 2.0]), torch.tensor([0.2, 0.5, -1.0])
    same = SimpleNamespace(gather=lambda t: t, gather_for_metrics=lambda t: t)
    metrics = {"eval": _Lists()}
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=coef),
        accelerator=same,
        _metrics=metrics,
        _total_train_tokens=0,
    )
    inputs = {"attention_mask": torch.ones(6, 2)} | (
        {"margin": margin} if margin is not None else {}
    )
    scores = torch.cat([chosen, rejected])[:, None]
    theirs = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=scores), inputs)
    torch.testing.assert_close(pairwise_loss(chosen, rejected, margin, coef or 0.0), theirs)


class _Lists(dict):
    """A metrics store that starts a list for every name."""

    def __missing__(self, key: str) -> list:
        self[key] = []
        return self[key]


@pytest.mark.parametrize(
    ("chosen", "rejected", "margin"),
    [((3,), (2,), None), ((3, 1), (3, 1), None), ((0,), (0,), None), ((3,), (3,), (1,))],
)
def test_other_shapes_rise(
    chosen: tuple[int, ...], rejected: tuple[int, ...], margin: tuple[int, ...] | None
) -> None:
    with pytest.raises(ValueError, match=r"one shape \[B\]"):
        pairwise_loss(
            torch.zeros(chosen),
            torch.zeros(rejected),
            None if margin is None else torch.zeros(margin),
        )
