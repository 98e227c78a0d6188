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
        return np.stack([d, -(d**2)], axis=1)
    logs = np.log(np.where(d > 0, d, 1.0))  # d log d is 0 at 0
    return np.stack([d, -d * logs], axis=1)


def _design(law: Law, kl: Sequence[float]) -> Array:
    nats = np.asarray(kl, dtype=np.float64)
    if len(nats) and nats.min() < 0:
        raise ValueError(f"expected KL of at least 0, found {nats.min():g}")
    d = np.sqrt(nats)
    return np.concatenate([np.ones((len(d), 1)), _terms(law, d)], axis=1)


def fit_points(law: Law, kl: Sequence[float], score: Sequence[float]) -> Fit | None:
    """The law fitted to points [N]; intervals by Student's t from the points' scatter, which holds
    for points with independent noise. None with fewer than four different distances. Raises
    ValueError for a negative KL.
    """
    from scipy.stats import t as student

    terms, values = _design(law, kl), np.asarray(score, dtype=np.float64)
    if len(set(kl)) < 4 or np.linalg.matrix_rank(terms) < 3:
        return None
    found = np.linalg.lstsq(terms, values, rcond=None)[0]
    rest = values - terms @ found
    free = len(values) - 3
    variance = float(rest @ rest) / free * np.linalg.inv(terms.T @ terms)
    half = float(student.ppf(0.975, free)) * np.sqrt(np.diag(variance))
    intervals = []
    for i in (1, 2):
        middle = float(found[i])
        intervals.append(Interval(middle, middle - float(half[i]), middle + float(half[i])))
    return _fit(law, float(found[0]), intervals[0], intervals[1], values, rest)


def fit_draws(law: Law, kl: Sequence[float], scores: Array) -> Fit | None:
    """The law fitted to the first row of `scores` [1 + R, N], with intervals by the fits of the
    others, which are resamples. None with fewer than four different distances.
    """
    terms = _design(law, kl)
    if len(set(kl)) < 4 or np.linalg.matrix_rank(terms) < 3:
        return None
    found = scores @ np.linalg.pinv(terms).T  # [1 + R, 3]
    intervals = []
    for column in (1, 2):
        low, high = np.quantile(found[1:, column], [0.025, 0.975])
        intervals.append(Interval(float(found[0, column]), float(low), float(high)))
    rest = scores[0] - terms @ found[0]
    return _fit(law, float(found[0, 0]), intervals[0], intervals[1], scores[0], rest)


def _fit(
    law: Law, start: float, alpha: Interval, beta: Interval, values: Array, rest: Array
) -> Fit:
    spread = float(((values - values.mean()) ** 2).sum())
    explained = 1 - float(rest @ rest) / spread if spread > 0 else math.nan
    return Fit(law, start, alpha, beta, explained, _peak(law, alpha.estimate, beta.estimate))


def _peak(law: Law, alpha: float, beta: float) -> float | None:
    """KL of the highest score; None where beta is not above 0 or the score falls from the start."""
    if beta <= 0:
        return None
    if law is Law.best_of_n:
        return (alpha / (2 * beta)) ** 2 if alpha > 0 else None
    power = 2 * (alpha / beta - 1)
    return math.exp(power) if power < 700 else None
