"""The losses of one micro-batch. Shapes: B responses, T response tokens; `response_mask` is boolean [B, T].

Every loss is a sum over this micro-batch's tokens divided by `denominator`, the token count of the whole optimizer step over all micro-batches
and ranks. Gradients that are summed over micro-batches and ranks then do not depend on the split. (An engine that averages over ranks multiplies by
their number.) NaN outside the mask reaches neither a loss nor a gradient: sums select, and so does the one input with a gradient, because 0 (the
gradient that a masked sum hands back) times a NaN derivative would be NaN.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from conf.schema import KLEstimator
from policy.kl import kl_per_token
from policy.shapes import check_mask, masked_sum, same_shape


@dataclass(frozen=True, slots=True)
class PolicyStats:
    """Sums over the tokens under the mask, detached scalars; divide by `tokens` for means."""

    clipped: Tensor  # tokens at which a clip bound holds, so that they give no gradient
    approxkl: Tensor  # nats, k3 estimate of KL(old || new)
    ratio: Tensor  # new / old probability
    tokens: Tensor


def _check_denominator(denominator: float) -> None:
    if not denominator > 0:
        raise ValueError(f"expected the token count of the optimizer step, above 0, found {denominator}")


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    cliprange: float,
    denominator: float,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    """Clipped surrogate of PPO (Schulman et al. 2017, arXiv:1707.06347, equation 7), negated -> (loss scalar, stats).

        rho_t = exp(logprobs_t - old_logprobs_t)
        L = -1/denominator * sum_t w_t * min(rho_t * A_t, clip(rho_t, 1 - cliprange, 1 + cliprange) * A_t)

    With `dual_clip` c > 1 the inner term is max(that, c * A_t) where A_t < 0, which bounds the loss of an unlucky ratio (Ye et al. 2020,
    arXiv:1912.09729, equation 5). `weights` w are constants, such as `importance_weights`. All tensors [B, T]; only `logprobs` gets a gradient.
    """
    same_shape(2, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, response_mask=response_mask)
    check_mask(response_mask)
    _check_denominator(denominator)
    new, old, advantages = torch.where(response_mask, logprobs, 0.0), old_logprobs.detach(), advantages.detach()
    ratio = torch.exp(new - old)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1.0 - cliprange, 1.0 + cliprange) * advantages
    surrogate = torch.minimum(unclipped, clipped)
    bound = clipped < unclipped
    if dual_clip is not None:
        if dual_clip <= 1.0:
            raise ValueError(f"expected dual_clip above 1, found {dual_clip}")
        lowest = dual_clip * advantages
        too_low = (advantages < 0) & (surrogate < lowest)
        surrogate = torch.where(too_low, lowest, surrogate)
        bound = bound | too_low
    if weights is not None:
        same_shape(2, weights=weights, response_mask=response_mask)
        surrogate = weights.detach() * surrogate
    stats = PolicyStats(
        clipped=masked_sum(bound.float(), response_mask),
        approxkl=masked_sum(kl_per_token(old, new.detach(), KLEstimator.k3), response_mask),
        ratio=masked_sum(ratio.detach(), response_mask),
        tokens=response_mask.sum(),
    )
    return -masked_sum(surrogate, response_mask) / denominator, stats


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor, *, cliprange_value: float, denominator: float
) -> tuple[Tensor, Tensor]:
    """Clipped value loss of PPO's first implementation (Dhariwal et al. 2017, OpenAI Baselines ppo2) -> (loss scalar, clipped-token count).

        L = 1/denominator * sum_t 1/2 * max((V_t - R_t)^2, (clip(V_t, V_old_t - c, V_old_t + c) - R_t)^2),    c = cliprange_value

    All tensors [B, T] in units of the score; only `values` gets a gradient. Counted are tokens whose clipped error is the larger one.
    """
    same_shape(2, values=values, old_values=old_values, returns=returns, response_mask=response_mask)
    check_mask(response_mask)
    _check_denominator(denominator)
    values, old, returns = torch.where(response_mask, values, 0.0), old_values.detach(), returns.detach()
    error = (values - returns).square()
    clipped_error = (torch.clamp(values, old - cliprange_value, old + cliprange_value) - returns).square()
    loss = 0.5 * masked_sum(torch.maximum(error, clipped_error), response_mask) / denominator
    return loss, masked_sum((clipped_error > error).float(), response_mask).detach()


def entropy_bonus(entropy: Tensor, response_mask: Tensor, *, denominator: float) -> Tensor:
    """sum_t H_t / denominator, a scalar in nats per token; subtract it from the loss, times its coefficient. `entropy` [B, T]."""
    same_shape(2, entropy=entropy, response_mask=response_mask)
    check_mask(response_mask)
    _check_denominator(denominator)
    return masked_sum(entropy, response_mask) / denominator


@torch.no_grad()
def importance_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> Tensor:
    """Truncated importance ratios min(trainer / sampler probability, cap), constants, [B, T] (Ionides 2008, "Truncated importance sampling").

    They correct for tokens that the sampler drew from a slightly different (stale, or lower-precision) policy than the trainer's.
    """
    same_shape(2, old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs)
    if not cap > 0:
        raise ValueError(f"expected a cap above 0, found {cap}")
    return torch.exp(old_logprobs - rollout_logprobs).clamp(max=cap)
