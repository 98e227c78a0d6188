"""Over-optimisation: how a judge's score rises and falls with the distance d = sqrt(KL) that the
policy has gone for a proxy, by the laws of Gao, Schulman and Hilton 2022 (arXiv:2210.10760). Pure
functions.

    best of n               R(d) = R0 + d (alpha - beta d)
    reinforcement learning  R(d) = R0 + d (alpha - beta log d)

R0 is the score at d = 0. Both are linear in R0, alpha and beta: least squares, no starting point.
The score is highest at d = alpha / (2 beta) and at d = exp(alpha / beta - 1).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from eval.statistics import Interval

Array = NDArray[np.float64]


class Law(Enum):
    """How the policy went away from where it started."""

    best_of_n = "best of n"
    reinforcement = "reinforcement learning"


@dataclass(frozen=True, slots=True)
class Fit:
    """A law fitted to a curve; intervals are 95 %."""

    law: Law
    start: float  # R0
    alpha: Interval
    beta: Interval
    explained: float  # share of the variance; nan where the score doesn't vary
    peak_kl: float | None  # nats; None where the curve has no highest point

    def at(self, kl: float) -> float:
        """The score after `kl` nats."""
        d = math.sqrt(kl)
        slope, bend = _terms(self.law, np.array([d]))[0]
        return self.start + self.alpha.estimate * slope + self.beta.estimate * bend


def _terms(law: Law, d: Array) -> Array:
    """[N, 2]: what alpha and beta are multiplied by."""
    if law is Law.best_of_n:
        bend = -(d**2)
    else:
        positive = np.where(d > 0, d, 1.0)  # d log d is 0 at 0
        bend = -d * np.log(positive)
    return np.stack([d, bend], axis=1)


def _design(law: Law, kl: Sequence[float]) -> Array:
    nats = np.asarray(kl, dtype=np.float64)
    if len(nats) and nats.min() < 0:
        raise ValueError(f"expected KL of at least 0, found {nats.min():g}")
    d = np.sqrt(nats)
    ones = np.ones((len(d), 1))
    return np.concatenate([ones, _terms(law, d)], axis=1)


def fit_points(law: Law, kl: Sequence[float], score: Sequence[float]) -> Fit | None:
    """The law fitted to points [N]; intervals by Student's t from the points' scatter, which holds
    for points with independent noise. None with fewer than four different distances. Raises
    ValueError for a negative KL.
    """
    from scipy.stats import t as student

    terms = _design(law, kl)
    if not _is_determined(kl, terms):
        return None
    values = np.asarray(score, dtype=np.float64)
    found = np.linalg.lstsq(terms, values, rcond=None)[0]
    rest = values - terms @ found
    free = len(values) - 3
    scatter = float(rest @ rest) / free
    covariance = scatter * np.linalg.inv(terms.T @ terms)
    width = float(student.ppf(0.975, free))
    intervals = []
    for i in (1, 2):
        middle = float(found[i])
        half = width * math.sqrt(covariance[i, i])
        intervals.append(Interval(middle, middle - half, middle + half))
    alpha, beta = intervals
    return _fit(law, float(found[0]), alpha, beta, values, rest)


def _is_determined(kl: Sequence[float], terms: Array) -> bool:
    """Whether the points say R0, alpha and beta, and leave a scatter."""
    if len(set(kl)) < 4:
        return False
    return bool(np.linalg.matrix_rank(terms) == 3)


def fit_draws(law: Law, kl: Sequence[float], scores: Array) -> Fit | None:
    """The law fitted to the first row of `scores` [1 + R, N], with intervals by the fits of the
    others, which are resamples. None with fewer than four different distances.
    """
    terms = _design(law, kl)
    if not _is_determined(kl, terms):
        return None
    found = scores @ np.linalg.pinv(terms).T  # [1 + R, 3]
    intervals = []
    for column in (1, 2):
        middle = float(found[0, column])
        low, high = np.quantile(found[1:, column], [0.025, 0.975])
        intervals.append(Interval(middle, float(low), float(high)))
    alpha, beta = intervals
    values = scores[0]
    rest = values - terms @ found[0]
    return _fit(law, float(found[0, 0]), alpha, beta, values, rest)


def _fit(
    law: Law, start: float, alpha: Interval, beta: Interval, values: Array, rest: Array
) -> Fit:
    deviations = values - values.mean()
    spread = float(deviations @ deviations)
    explained = math.nan
    if spread > 0:
        explained = 1 - float(rest @ rest) / spread
    peak = _peak(law, alpha.estimate, beta.estimate)
    return Fit(law, start, alpha, beta, explained, peak)


def _peak(law: Law, alpha: float, beta: float) -> float | None:
    """KL of the highest score; None where beta is not above 0 or the score falls from the start."""
    if beta <= 0:
        return None
    if law is Law.best_of_n:
        if alpha <= 0:
            return None
        distance = alpha / (2 * beta)
        return distance**2
    power = 2 * (alpha / beta - 1)
    if power >= 700:  # exp would overflow
        return None
    return math.exp(power)
