"""Kullback-Leibler divergence from samples, and the controllers of its coefficient."""

import math

import torch
from torch import Tensor

from conf.choices import KLController, KLEstimator
from conf.online import OnlineStage
from policy.batching import same_shape
from rlhf.types import UserError

_ERROR_CLIP = 0.2  # Ziegler et al. 2019, section 2.2
# Nats. Beyond it exp(log r) overflows in float32 (at 88), and its gradient is 0 times infinity:
# NaN. As verl and OpenRLHF bound it.
MAX_LOG_RATIO = 20.0


def bounded(log_ratio: Tensor) -> Tensor:
    """A log ratio whose exponential stays finite: cut to +-MAX_LOG_RATIO, without a gradient where
    it is cut. NaN stays NaN.
    """
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def kl_per_token(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimate KL(pi || ref) at every token, for tokens sampled from pi. All [B, T], nats.

    With log r = ref_logprobs - logprobs (Schulman 2020, "Approximating KL divergence",
    http://joschu.net/blog/kl-approx.html):

        k1 = -log r
        k2 = (log r)^2 / 2
        k3 = (r - 1) - log r

    k1 is unbiased and may be negative; its gradient has zero mean, so it belongs in a reward, not
    in a loss. k2 is biased, of low variance, never negative. k3 is unbiased, of low variance, never
    negative up to rounding; its log r is `bounded`.

    Differentiable in both arguments. There is no mask: positions outside the response hold whatever
    the inputs there give.
    """
    same_shape(2, logprobs=logprobs, ref_logprobs=ref_logprobs)
    log_r = ref_logprobs - logprobs
    match estimator:
        case KLEstimator.k1:
            return -log_r
        case KLEstimator.k2:
            return 0.5 * log_r.square()
        case KLEstimator.k3:
            log_r = bounded(log_r)
            # expm1: near r = 1, exp(log_r) - 1 would leave rounding noise only
            return torch.expm1(log_r) - log_r
        case KLEstimator.k3_weighted:
            raise ValueError(
                "k3_weighted needs the ratio of new to old probability: it is a loss "
                "(policy.losses.kl_loss)"
            )
    raise ValueError(f"unknown KL estimator {estimator!r}")


def _check_measurement(kl_per_response: float, responses: int) -> None:
    if not math.isfinite(kl_per_response):
        raise ValueError(f"expected a finite KL per response, found {kl_per_response}")
    if responses < 0:
        raise ValueError(f"expected a number of responses of at least 0, found {responses}")


class FixedKL:
    """The coefficient stays as it was set."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl_per_response: float, responses: int) -> None:
        """Same signature and same errors as `AdaptiveKL.update`; changes nothing."""
        _check_measurement(kl_per_response, responses)

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = float(state["coef"])


class AdaptiveKL:
    """Proportional control of the coefficient in log space (Ziegler et al. 2019, arXiv:1909.08593,
    section 2.2).

        error = clip((KL - target) / target, -0.2, 0.2)
        coef <- coef * (1 + error * responses / horizon)

    `target` is in nats per response (summed over its tokens), `horizon` in responses.
    """

    def __init__(self, coef: float, target: float, horizon: int) -> None:
        if coef <= 0 or target <= 0 or horizon < 1:
            raise ValueError(
                f"expected coef > 0, target > 0 and horizon >= 1, found {coef=}, {target=}, "
                f"{horizon=}"
            )
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, kl_per_response: float, responses: int) -> None:
        """Move the coefficient after a step that saw `responses` responses (over all ranks) with
        this mean KL in nats.

        Raises ValueError for a KL that isn't finite and UserError where the horizon is so short
        that one step could turn the coefficient negative.
        """
        _check_measurement(kl_per_response, responses)
        if _ERROR_CLIP * responses >= self.horizon:
            raise UserError(
                f"stage.kl_horizon={self.horizon}: one step of {responses} responses could bring "
                "the KL coefficient to 0 or below; "
                f"expected more than {_ERROR_CLIP} x {responses} = {_ERROR_CLIP * responses:g} "
                "responses."
            )
        error = min(max(kl_per_response / self.target - 1.0, -_ERROR_CLIP), _ERROR_CLIP)
        self.coef *= 1.0 + error * responses / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take over the coefficient; target and horizon come from the configuration."""
        self.coef = float(state["coef"])


def kl_controller(stage: OnlineStage) -> FixedKL | AdaptiveKL:
    """The controller that the stage's options name."""
    if stage.kl_controller is KLController.adaptive:
        return AdaptiveKL(stage.kl_coef, stage.kl_target, stage.kl_horizon)
    return FixedKL(stage.kl_coef)
