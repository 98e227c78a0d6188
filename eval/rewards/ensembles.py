"""Several reward models on the same pairs: how far they agree, and whether their mean is better.
Pure functions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from eval.rewards.accuracy import correct

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two models agree."""

    models: tuple[str, str]
    same: float  # share of pairs in which both prefer the same answer; a tie of either is half
    tau: float  # Kendall's tau-b of the margins; nan where one of them has the same for all
    both_wrong: float  # share of pairs


@dataclass(frozen=True, slots=True)
class Ensemble:
    """All models together, with each one's scores in its own standard deviations."""

    agreements: tuple[Agreement, ...]
    spread: float  # mean over answers of the standard deviation over models, in such units
    unanimous: float  # share of pairs in which all models prefer the same answer
    # accuracy of the mean of the models' scores there, in the other pairs (None for no such pair),
    # and in all
    right_if_unanimous: float | None
    right_otherwise: float | None
    mean_accuracy: float


def ensemble(
    chosen: Mapping[str, Sequence[float]], rejected: Mapping[str, Sequence[float]]
) -> Ensemble:
    """`chosen`, `rejected`: scores [N] of both answers by model, two models or more. Raises
    ValueError for fewer.
    """
    names = list(chosen)
    if len(names) < 2:
        raise ValueError(f"expected at least two models, found {names}")
    scores = np.array([[chosen[name], rejected[name]] for name in names], dtype=np.float64)
    scaled = np.array([_standard(one) for one in scores])  # [M, 2, N]
    spread = scaled.std(axis=0, ddof=1)
    margins = scores[:, 0] - scores[:, 1]
    of_model = dict(zip(names, margins, strict=True))
    agreements = []
    for one, other in combinations(names, 2):
        agreements.append(_agreement((one, other), of_model[one], of_model[other]))
    signs = np.sign(margins)
    same = np.abs(signs.sum(axis=0)) == len(names)
    mean = scaled.mean(axis=0)
    together = mean[0] - mean[1]
    right = np.array([correct(margin) for margin in together])
    return Ensemble(
        tuple(agreements),
        spread=float(spread.mean()),
        unanimous=float(same.mean()),
        right_if_unanimous=_mean(right[same]),
        right_otherwise=_mean(right[~same]),
        mean_accuracy=float(right.mean()),
    )


def _standard(values: Array) -> Array:
    deviation = float(values.std())
    if deviation == 0:
        deviation = 1.0
    return (values - values.mean()) / deviation


def _mean(values: Array) -> float | None:
    if not len(values):
        return None
    return float(values.mean())


def _agreement(models: tuple[str, str], mine: Array, theirs: Array) -> Agreement:
    from scipy.stats import kendalltau

    signs = np.sign(mine) * np.sign(theirs)
    same = (signs + 1) / 2
    both_wrong = (mine < 0) & (theirs < 0)
    tau = float(kendalltau(mine, theirs).statistic)
    return Agreement(models, float(same.mean()), tau, float(both_wrong.mean()))
