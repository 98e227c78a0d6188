"""Losses of preference pairs, for pairs that the policy wrote itself (stage=online_dpo). P pairs;
every function is per pair, so a sum over pairs does not depend on the micro-batch split. stage=dpo
trains with TRL's own code.
"""

import math
from collections.abc import Sequence
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


def preference_loss(
    pairs: PairLogprobs, loss: PreferenceLoss, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """Loss of each pair, [P]. With u, v the log ratios of policy to reference of the chosen and the
    rejected response, d = u - v, s = log sigmoid:

        sigmoid        -s(beta d)                                              DPO, Rafailov et al.
        2023, arXiv:2305.18290
        sigmoid_norm   -s(beta (u / |chosen| - v / |rejected|))                 the same on means
        per token
        hinge          max(0, 1 - beta d)                                      SLiC, Zhao et al.
        2023, arXiv:2305.10425
        ipo            (u / |chosen| - v / |rejected| - 1 / (2 beta))^2         Azar et al. 2023,
        arXiv:2310.12036, per token as its authors advise
        robust         (-(1 - e) s(beta d) + e s(-beta d)) / (1 - 2 e)          Chowdhury et al.
        2024, arXiv:2403.00409, e = label_smoothing
        exo_pair       KL of (sigmoid(beta d), sigmoid(-beta d)) from (1-e, e)   Ji et al. 2024,
        arXiv:2402.00856, equation 16
        nca_pair       -s(beta u) - s(-beta u)/2 - s(-beta v)/2                 Chen et al. 2024,
        arXiv:2402.05369
        bco_pair       -s(beta u) - s(-beta v)                                 Jung et al. 2024,
        arXiv:2404.04656, without its running baseline
        sppo_hard      (u - 1/(2 beta))^2 + (v + 1/(2 beta))^2                  Wu et al. 2024,
        arXiv:2405.00675
        apo_zero       1 - sigmoid(beta u) + sigmoid(beta v)                    D'Oosterlinck et al.
        2024, arXiv:2408.06266, equation 7
        apo_down       sigmoid(beta u) + 1 - sigmoid(beta d)                    the same, equation 8
        discopop       -s(x)(1 - m) + exp(-x) m, x = beta d, m = sigmoid(x/0.05)  Lu et al. 2024,
        arXiv:2406.08414, equation 5
        sft            -log pi(chosen) / |chosen|                              likelihood of the
        chosen response, per token

    Raises ValueError for aot and aot_unpaired, which no single pair defines, and for exo_pair
    without label_smoothing.
    """
    chosen, rejected = (
        pairs.chosen - pairs.ref_chosen.detach(),
        pairs.rejected - pairs.ref_rejected.detach(),
    )
    scaled = beta * (chosen - rejected)
    mean_difference = chosen / pairs.chosen_lengths - rejected / pairs.rejected_lengths
    match loss:
        case PreferenceLoss.sigmoid:
            return -F.logsigmoid(scaled)
        case PreferenceLoss.sigmoid_norm:
            return -F.logsigmoid(beta * mean_difference)
        case PreferenceLoss.hinge:
            return torch.relu(1.0 - scaled)
        case PreferenceLoss.ipo:
            return (mean_difference - 1.0 / (2.0 * beta)).square()
        case PreferenceLoss.robust:
            kept = (1.0 - label_smoothing) * F.logsigmoid(scaled) - label_smoothing * F.logsigmoid(
                -scaled
            )
            return -kept / (1.0 - 2.0 * label_smoothing)
        case PreferenceLoss.exo_pair:
            if not label_smoothing > 0:
                raise ValueError(f"exo_pair needs label_smoothing above 0, found {label_smoothing}")
            right = torch.sigmoid(scaled) * (F.logsigmoid(scaled) - math.log1p(-label_smoothing))
            return right + torch.sigmoid(-scaled) * (
                F.logsigmoid(-scaled) - math.log(label_smoothing)
            )
        case PreferenceLoss.nca_pair:
            return (
                -F.logsigmoid(beta * chosen)
                - 0.5 * F.logsigmoid(-beta * chosen)
                - 0.5 * F.logsigmoid(-beta * rejected)
            )
        case PreferenceLoss.bco_pair:
            return -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected)
        case PreferenceLoss.sppo_hard:
            return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()
        case PreferenceLoss.apo_zero:
            return 1.0 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)
        case PreferenceLoss.apo_down:
            return torch.sigmoid(beta * chosen) + 1.0 - torch.sigmoid(scaled)
        case PreferenceLoss.discopop:
            modulation = torch.sigmoid(scaled / _DISCOPOP_TAU)
            return -F.logsigmoid(scaled) * (1.0 - modulation) + torch.exp(-scaled) * modulation
        case PreferenceLoss.sft:
            return -pairs.chosen / pairs.chosen_lengths
    raise ValueError(f"{loss.value} is defined over a whole batch, not over a pair")


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
    factors = [1.0] * len(losses) if weights is None else weights
    parts = [
        w * preference_loss(pairs, loss, beta=beta, label_smoothing=label_smoothing)
        for loss, w in zip(losses, factors, strict=True)
    ]
    return torch.stack(parts).sum(dim=0)
