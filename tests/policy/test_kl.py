"""KL estimators against hand-computed numbers, closed forms and Schulman's identities; controllers
against Ziegler's update.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conf.choices import KLController, KLEstimator
from conf.stages import OnlineStage
from policy.kl import AdaptiveKL, FixedKL, kl_per_token
from rlhf.types import UserError

# k3_weighted is a loss: tests/policy/test_trl_agreement.py
ESTIMATORS = [KLEstimator.k1, KLEstimator.k2, KLEstimator.k3]


def reference(logprobs: np.ndarray, ref_logprobs: np.ndarray, estimator: KLEstimator) -> np.ndarray:
    """float64, written with probabilities instead of the difference of logprobs."""
    ratio = np.exp(ref_logprobs.astype(np.float64)) / np.exp(logprobs.astype(np.float64))
    return {
        KLEstimator.k1: -np.log(ratio),
        KLEstimator.k2: np.log(ratio) ** 2 / 2,
        KLEstimator.k3: ratio - 1 - np.log(ratio),
    }[estimator]


def expectations(policy: torch.Tensor, ref: torch.Tensor) -> dict[KLEstimator, float]:
    """Exact expectation of every estimator under `policy` [V], by enumerating the vocabulary."""
    return {
        e: float((policy * kl_per_token(policy.log()[None], ref.log()[None], e)[0]).sum())
        for e in ESTIMATORS
    }


def test_hand_computed() -> None:
    # policy 1/2, reference 1/4: r = 1/2
    new, ref = torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log()
    ln2 = 0.6931471805599453
    assert kl_per_token(new, ref, KLEstimator.k1).item() == pytest.approx(ln2)
    # ln2^2 / 2
    assert kl_per_token(new, ref, KLEstimator.k2).item() == pytest.approx(0.2402265069591007)
    # 1/2 - 1 + ln2
    assert kl_per_token(new, ref, KLEstimator.k3).item() == pytest.approx(0.1931471805599453)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_float64_reference(estimator: KLEstimator) -> None:
    rng = np.random.default_rng(0)
    new, ref = -rng.exponential(2.0, (5, 7)), -rng.exponential(2.0, (5, 7))
    ours = kl_per_token(
        torch.tensor(new, dtype=torch.float32), torch.tensor(ref, dtype=torch.float32), estimator
    )
    np.testing.assert_allclose(ours.numpy(), reference(new, ref, estimator), rtol=1e-5, atol=1e-6)


def test_k1_and_k3_are_unbiased_and_k2_is_not() -> None:
    policy, ref = (
        torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64),
        torch.tensor([0.4, 0.5, 0.1], dtype=torch.float64),
    )
    exact = float((policy * (policy / ref).log()).sum())
    means = expectations(policy, ref)
    assert means[KLEstimator.k1] == pytest.approx(exact, rel=1e-12)
    assert means[KLEstimator.k3] == pytest.approx(exact, rel=1e-12)
    assert abs(means[KLEstimator.k2] - exact) > 1e-3


def test_the_direction_is_from_policy_to_reference() -> None:
    policy, ref = (
        torch.tensor([0.9, 0.1], dtype=torch.float64),
        torch.tensor([0.5, 0.5], dtype=torch.float64),
    )
    forward, backward = (
        expectations(policy, ref)[KLEstimator.k1],
        expectations(ref, policy)[KLEstimator.k1],
    )
    assert forward == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    assert forward != pytest.approx(backward, rel=0.1)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_policies_have_none(estimator: KLEstimator) -> None:
    logprobs = -torch.rand(3, 4)
    assert torch.equal(kl_per_token(logprobs, logprobs.clone(), estimator), torch.zeros(3, 4))


@given(st.floats(-30, 0), st.floats(-30, 0))
def test_k2_and_k3_are_never_negative(new: float, ref: float) -> None:
    pair = torch.tensor([[new]], dtype=torch.float32), torch.tensor([[ref]], dtype=torch.float32)
    assert kl_per_token(*pair, KLEstimator.k2).item() >= 0.0
    log_r = abs(pair[0] - pair[1]).item()
    # one float32 rounding of expm1
    assert kl_per_token(*pair, KLEstimator.k3).item() >= -1.2e-7 * min(log_r, 1.0)


def test_k3_keeps_its_digits_near_equality() -> None:
    # 1e-3: exp(log_r) - 1 - log_r in float32 would be off by a tenth
    new = torch.zeros(1, 1)
    assert kl_per_token(new, new + 1e-3, KLEstimator.k3).item() == pytest.approx(
        5.0016671e-7, rel=1e-3
    )


def test_gradients_in_expectation() -> None:
    """Over samples of the policy: k2's gradient is that of the KL, k1's is zero (so k1 must not be
    a loss).
    """
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    logp = torch.log_softmax(logits, 0)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    p = logp.exp().detach()
    grads = {
        e: torch.autograd.grad(
            (p * kl_per_token(logp[None], ref[None], e)[0]).sum(), logits, retain_graph=True
        )[0]
        for e in ESTIMATORS
    }
    torch.testing.assert_close(grads[KLEstimator.k1], torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(grads[KLEstimator.k2], exact)


@pytest.mark.parametrize(("new", "ref"), [((2, 3), (2, 1)), ((3,), (3,)), ((2, 3), (3, 2))])
def test_no_broadcasting(new: tuple[int, ...], ref: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one shape"):
        kl_per_token(torch.zeros(new), torch.zeros(ref), KLEstimator.k1)


def test_fixed_controller_stays() -> None:
    control = FixedKL(0.05)
    control.update(100.0, 64)
    assert control.coef == 0.05


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1 + 0.1 * 64 / 10_000)),  # 10 % above
        (5.4, 0.1 * (1 - 0.1 * 64 / 10_000)),
        (60.0, 0.1 * (1 + 0.2 * 64 / 10_000)),  # the error is clipped to 20 %
        (-3.0, 0.1 * (1 - 0.2 * 64 / 10_000)),  # k1 may be negative
    ],
)
def test_adaptive_controller_hand_computed(kl: float, expected: float) -> None:
    control = AdaptiveKL(0.1, target=6.0, horizon=10_000)
    control.update(kl, 64)
    assert control.coef == pytest.approx(expected, rel=1e-12)


def test_adaptive_controller_steers_a_plant_to_its_target() -> None:
    """A policy whose KL falls with the coefficient, KL = 1 / coef, settles where KL = target."""
    control = AdaptiveKL(1.0, target=6.0, horizon=100)
    for _ in range(300):
        control.update(1.0 / control.coef, 20)
    assert 1.0 / control.coef == pytest.approx(6.0, rel=1e-3)


@pytest.mark.parametrize("make", [lambda: FixedKL(0.1), lambda: AdaptiveKL(0.1, 6.0, 1000)])
def test_controllers_resume(make: type) -> None:
    control, resumed = make(), make()
    control.update(20.0, 100)
    resumed.load_state_dict(control.state_dict())
    for c in (control, resumed):
        c.update(3.0, 100)
    assert resumed.coef == control.coef


@pytest.mark.parametrize("control", [FixedKL(0.1), AdaptiveKL(0.1, 6.0, 1000)])
@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_kl_that_is_not_finite_rises(control: FixedKL | AdaptiveKL, kl: float) -> None:
    with pytest.raises(ValueError, match="finite KL"):
        control.update(kl, 1)
    assert control.coef == 0.1


def test_a_horizon_that_could_make_the_coefficient_negative_rises() -> None:
    with pytest.raises(UserError, match=r"stage\.kl_horizon=10.*more than 0\.2 x 64 = 12\.8"):
        AdaptiveKL(0.1, target=6.0, horizon=10).update(0.0, 64)


@pytest.mark.parametrize(
    ("coef", "target", "horizon"), [(0.0, 6.0, 10), (0.1, 0.0, 10), (0.1, 6.0, 0)]
)
def test_adaptive_controller_wants_positive_settings(
    coef: float, target: float, horizon: int
) -> None:
    with pytest.raises(ValueError, match="expected coef > 0"):
        AdaptiveKL(coef, target, horizon)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_coef": 0.0}, r"stage\.kl_coef=0\.0 .*adaptive"),
        ({"kl_horizon": 12}, r"stage\.kl_horizon=12 .*a fifth of the 64 responses"),
    ],
)
def test_the_configuration_refuses_what_the_adaptive_controller_would(
    options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        OnlineStage(kl_controller=KLController.adaptive, **options)
    OnlineStage(kl_controller=KLController.fixed, **options)
    OnlineStage(kl_controller=KLController.adaptive, kl_horizon=13)
