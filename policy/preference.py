"""Losses of preference pairs that the policy wrote itself (stage=online_dpo), as pure functions of
log ratios. P pairs.

Every loss is one value per pair, so a sum over pairs does not depend on the split into
micro-batches. A new loss is one function here, one line in `LOSSES` and one name in
`conf.choices.PreferenceLoss`. (stage=dpo trains with TRL's own losses.)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from conf.choices import PreferenceLoss

_DISCOPOP_TAU = 0.05  # Lu et al. 2024, arXiv:2406.08414, section 4


@dataclass(frozen=True, slots=True)
class PairLogprobs:
    """Sums over each response's tokens, all [P] nats; lengths in tokens."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor


@dataclass(frozen=True, slots=True)
class PairRatios:
    """Log ratios of policy to reference, all [P] nats; the policy's side has a gradient."""

    chosen: Tensor  # u = log pi(chosen) - log pi_ref(chosen)
    rejected: Tensor  # v, the same of the rejected response
    difference: Tensor  # u - v
    mean_difference: Tensor  # u / |chosen| - v / |rejected|, nats per token
    chosen_mean: Tensor  # log pi(chosen) / |chosen|, without the reference

    @staticmethod
    def of(pairs: PairLogprobs) -> "PairRatios":
        chosen = pairs.chosen - pairs.ref_chosen.detach()
        rejected = pairs.rejected - pairs.ref_rejected.detach()
        return PairRatios(
            chosen=chosen,
            rejected=rejected,
            difference=chosen - rejected,
            mean_difference=chosen / pairs.chosen_lengths - rejected / pairs.rejected_lengths,
            chosen_mean=pairs.chosen / pairs.chosen_lengths,
        )


def sigmoid(ratios: PairRatios, beta: float, smoothing: float) -> Tensor:
    """-log sigmoid(beta (u - v)): DPO (Rafailov et al. 2023, arXiv:2305.18290, equation 7)."""
    return -F.logsigmoid(beta * ratios.difference)


def sigmoid_norm(ratios: PairRatios, beta: float, smoothing: float) -> Tensor:
    """DPO on means per token: -log sigmoid(beta (u / |chosen| - v / |rejected|))."""
    return -F.logsigmoid(beta * ratios.mean_difference)


def hinge(ratios: PairRatios, beta: float, smoothing: float) -> Tensor:
    """max(0, 1 - beta (u - v)): SLiC (Zhao et al. 2023, arXiv:2305.10425)."""
    return torch.relu(1.0 - beta * ratios.difference)


def ipo(ratios: PairRatios, beta: float, smoothing: float) -> Tensor:
    """(u / |chosen| - v / |rejected| - 1 / (2 beta))^2: IPO (Azar et al. 2023, arXiv:2310.12036),
    per token as its authors advise.
    """
    return (ratios.mean_difference - 1.0 / (2.0 * beta)).square()


def robust(ratios: PairRatios, beta: float, smoothing: float) -> Tensor:
    """(-(1 - e) log sigmoid(beta (u - v)) + e log sigmoid(-beta (u - v))) / (1 - 2 e), where e =
    `smoothing` is the share of swapped labels (Chowdhury et al. 2024, arXiv:2403.00409).
    """
    scaled = beta * ratios.difference
    kept = (1.0 - smoothing) * F.logsigmoid(scaled) - smoothing * F.logsigmoid(-scaled)
    return -kept / (1.0 - 2.0 * smoothing)


def exo_pair(ratios: PairRatios, beta: float, smoothing: float) -> Tensor:
    """KL of (sigmoid(beta (u - v)), sigmoid(-beta (u - v))) from (1 - e, e), e = `smoothing` (Ji et
    al. 2024, arXiv:2402.00856, equation 16). Raises ValueError for e = 0.
    """
    if not smoothing > 0:
        raise ValueError(f"exo_pair needs label_smoothing above 0, found {smoothing}")
    scaled = beta * ratios.difference
    right = torch.sigmoid(scaled) * (F.logsigmoid(scaled) - math.log1p(-smoothing))
    return right + torch.sigmoid(-scaled) * (F.logsigmoid(-scaled) - math.log(smoothing))


def nca_pair(ratios: PairRatios, beta: float, smoothing: float) -> Tensor:
    """-s(beta u) - s(-beta u) / 2 - s(-beta v) / 2 with s = log sigmoid (Chen et al. 2024,
    arXiv:2402.05369).
    """
    raised = F.logsigmoid(beta * ratios.chosen)
    chosen_kept = 0.5 * F.logsigmoid(-beta * ratios.chosen)
    rejected_lowered = 0.5 * F.logsigmoid(-beta * ratios.rejected)
    return -raised - chosen_kept - rejected_lowered


def bco_pair(ratios: PairRatios, beta: float, smoothing: float) -> Tensor:
    """-log sigmoid(beta u) - log sigmoid(-beta v) (Jung et al. 2024, arXiv:2404.04656, without its
    running baseline).
    """
    return -F.logsigmoid(beta * ratios.chosen) - F.logsigmoid(-beta * ratios.rejected)


def sppo_hard(ratios: PairRatios, beta: float, smoothing: float) -> Tensor:
    """(u - 1 / (2 beta))^2 + (v + 1 / (2 beta))^2 (Wu et al. 2024, arXiv:2405.00675)."""
    return (ratios.chosen - 0.5 / beta).square() + (ratios.rejected + 0.5 / beta).square()


def apo_zero(ratios: PairRatios, beta: float, smoothing: float) -> Tensor:
    """1 - sigmoid(beta u) + sigmoid(beta v) (D'Oosterlinck et al. 2024, arXiv:2408.06266,
    equation 7).
    """
    return 1.0 - torch.sigmoid(beta * ratios.chosen) + torch.sigmoid(beta * ratios.rejected)


def apo_down(ratios: PairRatios, beta: float, smoothing: float) -> Tensor:
    """sigmoid(beta u) + 1 - sigmoid(beta (u - v)) (D'Oosterlinck et al. 2024, equation 8)."""
    return torch.sigmoid(beta * ratios.chosen) + 1.0 - torch.sigmoid(beta * ratios.difference)


def discopop(ratios: PairRatios, beta: float, smoothing: float) -> Tensor:
    """-log sigmoid(x) (1 - m) + exp(-x) m with x = beta (u - v) and m = sigmoid(x / 0.05) (Lu et
    al. 2024, arXiv:2406.08414, equation 5).
    """
    scaled = beta * ratios.difference
    modulation = torch.sigmoid(scaled / _DISCOPOP_TAU)
    return -F.logsigmoid(scaled) * (1.0 - modulation) + torch.exp(-scaled) * modulation


def sft(ratios: PairRatios, beta: float, smoothing: float) -> Tensor:
    """-log pi(chosen) / |chosen|: the likelihood of the chosen response, per token."""
    return -ratios.chosen_mean


# aot and aot_unpaired are missing: they sort a whole batch, which no single pair knows.
LOSSES: dict[PreferenceLoss, Callable[[PairRatios, float, float], Tensor]] = {
    PreferenceLoss.sigmoid: sigmoid,
    PreferenceLoss.sigmoid_norm: sigmoid_norm,
    PreferenceLoss.hinge: hinge,
    PreferenceLoss.ipo: ipo,
    PreferenceLoss.robust: robust,
    PreferenceLoss.exo_pair: exo_pair,
    PreferenceLoss.nca_pair: nca_pair,
    PreferenceLoss.bco_pair: bco_pair,
    PreferenceLoss.sppo_hard: sppo_hard,
    PreferenceLoss.apo_zero: apo_zero,
    PreferenceLoss.apo_down: apo_down,
    PreferenceLoss.discopop: discopop,
    PreferenceLoss.sft: sft,
}


def preference_loss(
    pairs: PairLogprobs, loss: PreferenceLoss, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """One of `LOSSES`, [P]. Raises ValueError for a loss that no single pair defines (aot,
    aot_unpaired), and for exo_pair without `label_smoothing`.
    """
    if loss not in LOSSES:
        raise ValueError(f"{loss.value} is defined over a whole batch, not over a pair")
    return LOSSES[loss](PairRatios.of(pairs), beta, label_smoothing)


def combined_loss(
    pairs: PairLogprobs,
    losses: Sequence[PreferenceLoss],
    weights: Sequence[float] | None,
    *,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """Weighted sum of several losses, [P]; `weights` None: 1 each (as in Wang et al. 2024, "MPO",
    arXiv:2411.10442).
    """
    if weights is None:
        weights = [1.0] * len(losses)
    parts = []
    for loss, weight in zip(losses, weights, strict=True):
        value = preference_loss(pairs, loss, beta=beta, label_smoothing=label_smoothing)
        parts.append(weight * value)
    return torch.stack(parts).sum(dim=0)
