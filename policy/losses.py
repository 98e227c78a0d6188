"""The losses of one micro-batch. Shapes: B responses, T response tokens; `response_mask` is boolean
[B, T].

A new loss of single responses is a function beside `clipped_surrogate` and a case in `policy_loss`;
losses of pairs are in policy/preference.py.

Every loss is a sum over this micro-batch's tokens divided by `denominator`, the tokens (or
responses) of the whole optimizer step over all micro-batches and ranks. Gradients that are summed
over micro-batches and ranks then do not depend on the split. (An engine that averages over ranks
multiplies by their number.)

NaN outside the mask reaches neither a loss nor a gradient: sums select, and so does every input
that a gradient passes through or is multiplied by, because 0 (the gradient that a masked sum hands
back) times NaN would be NaN. Log ratios are cut where their exponential would overflow
(`policy.kl.bounded`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from conf.choices import Aggregation, ImportanceMode, KLEstimator, Level, PolicyLoss
from policy.batching import check_mask, masked_sum, same_shape
from policy.kl import bounded, kl_per_token


@dataclass(frozen=True, slots=True)
class PolicyStats:
    """Sums over the tokens under the mask, detached scalars; divide by `tokens` for means."""

    clipped: Tensor  # tokens at which a clip bound holds, so that they give no gradient
    approxkl: Tensor  # nats, k3 estimate of KL(old || new)
    ratio: Tensor  # new / old probability
    tokens: Tensor


def _check_denominator(denominator: float) -> None:
    if not denominator > 0:
        raise ValueError(
            f"expected the token count of the optimizer step, above 0, found {denominator}"
        )


def aggregation_weights(response_mask: Tensor, aggregation: Aggregation) -> Tensor:
    """What each token counts in the loss, [B, T] float32, 0 outside the mask; the weighted sum is
    divided by `aggregation_units` of the whole optimizer step.

    token: 1, so the loss is a mean over all tokens (Yu et al. 2025, arXiv:2503.14476, equation 8).
    sequence: 1 / response length, a mean over responses of their means (Shao et al. 2024,
    arXiv:2402.03300, equation 3). constant: 1, divided by a fixed number, so that length brings no
    bias (Liu et al. 2025, arXiv:2503.20783, section 3.1).
    """
    check_mask(response_mask)
    weights = response_mask.float()
    if aggregation is Aggregation.sequence:
        return weights / response_mask.sum(dim=1, keepdim=True).clamp(min=1)
    return weights


def aggregation_units(
    response_mask: Tensor, aggregation: Aggregation, constant_length: int
) -> float:
    """The sum over these rows of what the step's loss is divided by: tokens, responses, or
    responses x `constant_length`.

    Rows without a token under the mask do not count.
    """
    check_mask(response_mask)
    rows = float(response_mask.any(dim=1).sum())
    match aggregation:
        case Aggregation.token:
            return float(response_mask.sum())
        case Aggregation.sequence:
            return rows
        case Aggregation.constant:
            return rows * constant_length
    raise ValueError(f"unknown aggregation {aggregation!r}")


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    cliprange: float,
    denominator: float,
    kind: PolicyLoss = PolicyLoss.clip,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    """-1 / denominator * sum_t weights_t * surrogate_t, a scalar, and its statistics.

    The surrogates are `clipped_surrogate` (clip; gspo with one ratio per response),
    `cispo_surrogate` and, for nll, A_t logprobs_t (imitation where A_t is 1). `cliprange_high`
    None: as `cliprange`. `weights` are constants: `aggregation_weights`, `importance_weights` or
    their product. All tensors [B, T]; only `logprobs` gets a gradient.
    """
    same_shape(
        2,
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        response_mask=response_mask,
    )
    check_mask(response_mask)
    _check_denominator(denominator)
    new = torch.where(response_mask, logprobs, 0.0)
    old = torch.where(response_mask, old_logprobs, 0.0).detach()
    advantages = torch.where(response_mask, advantages, 0.0).detach()
    log_ratio = new - old
    if kind is PolicyLoss.gspo:
        log_ratio = sequence_log_ratio(log_ratio, response_mask)
    ratio = torch.exp(bounded(log_ratio))
    high = cliprange if cliprange_high is None else cliprange_high
    match kind:
        case PolicyLoss.clip | PolicyLoss.gspo:
            surrogate, bound = clipped_surrogate(ratio, advantages, cliprange, high, dual_clip)
        case PolicyLoss.cispo:
            surrogate, bound = cispo_surrogate(ratio, advantages, new, high)
        case PolicyLoss.nll:
            surrogate, bound = advantages * new, torch.zeros_like(response_mask)
        case PolicyLoss.dpo:
            raise ValueError(f"{kind.value} is a loss of pairs: use preference_loss")
        case _:
            raise NotImplementedError(f"stage.policy_loss={kind.value} has no surrogate here")
    if weights is not None:
        surrogate = _selected_weights(weights, response_mask) * surrogate
    stats = PolicyStats(
        clipped=masked_sum(bound.float(), response_mask),
        approxkl=masked_sum(kl_per_token(old, new.detach(), KLEstimator.k3), response_mask),
        ratio=masked_sum(ratio.detach(), response_mask),
        tokens=response_mask.sum(),
    )
    return -masked_sum(surrogate, response_mask) / denominator, stats


def _selected_weights(weights: Tensor, response_mask: Tensor) -> Tensor:
    """`weights` [B, T] as constants, 0 outside the mask."""
    same_shape(2, weights=weights, response_mask=response_mask)
    return torch.where(response_mask, weights, 0.0).detach()


def sequence_log_ratio(log_ratio: Tensor, response_mask: Tensor) -> Tensor:
    """The mean log ratio of each response at each of its tokens, [B, T] nats: GSPO's one ratio per
    response (Zheng et al. 2025, arXiv:2507.18071, equation 7). `log_ratio` [B, T] is 0 outside the
    mask.
    """
    lengths = response_mask.sum(dim=1, keepdim=True).clamp(min=1)
    return (log_ratio.sum(dim=1, keepdim=True) / lengths).expand_as(log_ratio)


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, low: float, high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """min(rho_t A_t, clip(rho_t, 1 - low, 1 + high) A_t), and where a bound holds; both [B, T].

    PPO (Schulman et al. 2017, arXiv:1707.06347, equation 7); with `high` above `low` DAPO's
    clip-higher (Yu et al. 2025, arXiv:2503.14476, section 3.1). With `dual_clip` c > 1 the terms
    are at least c A_t where A_t < 0, which bounds the loss of an unlucky ratio (Ye et al. 2020,
    arXiv:1912.09729, equation 5). Raises ValueError for c <= 1.
    """
    unclipped = ratio * advantages
    clipped = ratio.clamp(1.0 - low, 1.0 + high) * advantages
    surrogate = torch.minimum(unclipped, clipped)
    bound = clipped < unclipped
    if dual_clip is None:
        return surrogate, bound
    if dual_clip <= 1.0:
        raise ValueError(f"expected dual_clip above 1, found {dual_clip}")
    lowest = dual_clip * advantages
    too_low = (advantages < 0) & (surrogate < lowest)
    return torch.where(too_low, lowest, surrogate), bound | too_low


def cispo_surrogate(
    ratio: Tensor, advantages: Tensor, logprobs: Tensor, high: float
) -> tuple[Tensor, Tensor]:
    """min(rho_t, 1 + high) A_t logprobs_t with the ratio as a constant, and where the bound holds;
    both [B, T] (CISPO, MiniMax 2025, arXiv:2506.13585, equation 4; it has no lower bound).
    """
    surrogate = ratio.detach().clamp(max=1.0 + high) * advantages * logprobs
    return surrogate, ratio > 1.0 + high


def kl_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    old_logprobs: Tensor,
    response_mask: Tensor,
    *,
    estimator: KLEstimator,
    denominator: float,
    weights: Tensor | None = None,
) -> Tensor:
    """1 / denominator * sum_t weights_t * KL_t, a scalar in nats; times the coefficient it is added
    to the loss.

    k2, k3: `kl_per_token` at the new policy's logprobs. The gradient of k2 is that of the
    divergence as long as policy and sampler agree. k3_weighted: rho_t k3_t with rho_t =
    exp(logprobs_t - old_logprobs_t), whose value and gradient stay unbiased after the policy has
    moved (DeepSeek-AI 2025, "DeepSeek-V3.2", section 3.1).

    All tensors [B, T]; only `logprobs` gets a gradient. Raises ValueError for k1, whose gradient
    has zero mean.
    """
    same_shape(
        2,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        old_logprobs=old_logprobs,
        response_mask=response_mask,
    )
    check_mask(response_mask)
    _check_denominator(denominator)
    if estimator is KLEstimator.k1:
        raise ValueError("k1 has a gradient of zero mean and penalises nothing in a loss")
    new = torch.where(response_mask, logprobs, 0.0)
    ref = torch.where(response_mask, ref_logprobs, 0.0).detach()
    if estimator is KLEstimator.k3_weighted:
        old = torch.where(response_mask, old_logprobs, 0.0).detach()
        kl = torch.exp(bounded(new - old)) * kl_per_token(new, ref, KLEstimator.k3)
    else:
        kl = kl_per_token(new, ref, estimator)
    if weights is not None:
        kl = _selected_weights(weights, response_mask) * kl
    return masked_sum(kl, response_mask) / denominator


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    *,
    cliprange_value: float,
    denominator: float,
) -> tuple[Tensor, Tensor]:
    """Clipped value loss of PPO's first implementation (Dhariwal et al. 2017, OpenAI Baselines
    ppo2), a scalar, and the number of tokens whose clipped error is the larger one.

        L = 1 / denominator * sum_t 1/2 max((V_t - R_t)^2, (V_clip_t - R_t)^2)
        V_clip_t = clip(V_t, V_old_t - c, V_old_t + c),    c = cliprange_value

    All tensors [B, T] in units of the score; only `values` gets a gradient.
    """
    same_shape(
        2, values=values, old_values=old_values, returns=returns, response_mask=response_mask
    )
    check_mask(response_mask)
    _check_denominator(denominator)
    values = torch.where(response_mask, values, 0.0)
    old, returns = old_values.detach(), returns.detach()
    clipped_values = torch.clamp(values, old - cliprange_value, old + cliprange_value)
    error = (values - returns).square()
    clipped_error = (clipped_values - returns).square()
    loss = 0.5 * masked_sum(torch.maximum(error, clipped_error), response_mask) / denominator
    return loss, masked_sum((clipped_error > error).float(), response_mask).detach()


def entropy_bonus(entropy: Tensor, response_mask: Tensor, *, denominator: float) -> Tensor:
    """sum_t H_t / denominator, a scalar in nats per token; subtract it from the loss, times its
    coefficient. `entropy` [B, T].
    """
    same_shape(2, entropy=entropy, response_mask=response_mask)
    check_mask(response_mask)
    _check_denominator(denominator)
    return masked_sum(entropy, response_mask) / denominator


@torch.no_grad()
def importance_ratios(
    old_logprobs: Tensor, rollout_logprobs: Tensor, level: Level, response_mask: Tensor | None
) -> Tensor:
    """The trainer's probability over the sampler's, of each token or (level sequence) of its whole
    response, exp(sum_t log ratio_t); [B, T]. A response's needs `response_mask`.
    """
    same_shape(2, old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs)
    log_ratio = old_logprobs - rollout_logprobs
    if level is Level.token:
        return torch.exp(log_ratio)
    if response_mask is None:
        raise ValueError("the ratio of a whole response needs its response_mask")
    same_shape(2, old_logprobs=old_logprobs, response_mask=response_mask)
    of_response = torch.where(response_mask, log_ratio, 0.0).sum(dim=1, keepdim=True)
    return torch.exp(of_response.expand_as(old_logprobs))


@torch.no_grad()
def importance_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    cap: float,
    *,
    floor: float | None = None,
    mode: ImportanceMode = ImportanceMode.truncate,
    level: Level = Level.token,
    response_mask: Tensor | None = None,
) -> Tensor:
    """Importance ratios, trainer's probability over sampler's, as constants [B, T].

    They correct for tokens that the sampler drew from a slightly different (stale, or
    lower-precision) policy than the trainer's. Mode truncate: min(ratio, cap) (Ionides 2008,
    "Truncated importance sampling"). Mode mask: the ratio where it is from `floor` (None: 1 / cap)
    to `cap`, else 0, so that the token (or response) gives no gradient (the Ling team's IcePop, as
    in "INTELLECT-3" 2025, arXiv:2512.16144, equation 1). Level and `response_mask`:
    `importance_ratios`.
    """
    if not cap > 0:
        raise ValueError(f"expected a cap above 0, found {cap}")
    ratio = importance_ratios(old_logprobs, rollout_logprobs, level, response_mask)
    if mode is ImportanceMode.mask:
        lowest = 1.0 / cap if floor is None else floor
        return torch.where((ratio >= lowest) & (ratio <= cap), ratio, 0.0)
    return ratio.clamp(max=cap)
