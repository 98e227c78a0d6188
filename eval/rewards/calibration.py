"""Whether a reward model is as sure as it is right: sigmoid(chosen - rejected) read as the
probability that people prefer the chosen answer. Pure functions.

The expected calibration error is that of Guo et al. 2017 (arXiv:1706.04599), over bins of equal
width between 1/2 and 1, since the surer side of a pair has at least 1/2. It is never below 0 by
chance, so what a calibrated model would show with the same confidences stands beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eval.statistics import Interval, wilson

Array = NDArray[np.float64]
_DRAWS = 400  # of outcomes of a calibrated model
_LOWEST, _HIGHEST = 1e-3, 1e3  # temperatures that are looked at


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs of about equal confidence."""

    low: float
    high: float
    count: int
    confidence: float  # mean
    right: Interval  # share, with Wilson's interval


@dataclass(frozen=True, slots=True)
class Calibration:
    """How well confidences fit at one temperature."""

    temperature: float  # scores are divided by it
    pairs: int
    ece: Interval  # 95 % percentile intervals over resampled pairs
    ece_by_chance: float  # mean error of a calibrated model with these confidences
    brier: Interval  # mean squared error of the probability; 0.25 for 1/2 everywhere
    log_loss: Interval  # nats; 0.693 for 1/2 everywhere
    bins: tuple[Bin, ...]  # those with pairs


@dataclass(frozen=True, slots=True)
class Calibrated:
    """On one half of the pairs: as it is, and at the temperature that fits the other half best."""

    plain: Calibration
    tempered: Calibration
    at_bound: bool  # the best temperature is the smallest or largest that was looked at


def calibration(
    margins: Sequence[float], temperature: float, *, bins: int, resamples: int, seed: int
) -> Calibration:
    """Calibration of margins [N], chosen minus rejected. Raises ValueError without margins."""
    given = np.asarray(margins, dtype=np.float64)
    if not len(given):
        raise ValueError("expected at least one pair")
    pairs = len(given)
    scaled = given / temperature
    sure = _confidence(scaled)
    right = np.where(given == 0, 0.5, given > 0)
    number = _bin(sure, bins)
    squared = (1 - _sigmoid(scaled)) ** 2
    loss = np.logaddexp(0, -scaled)
    rng = np.random.default_rng(seed)
    draws = np.empty((3, resamples))
    for column in range(resamples):
        rows = rng.integers(0, pairs, pairs)
        draws[0, column] = _ece(sure[rows], right[rows], number[rows], bins)
        draws[1, column] = squared[rows].mean()
        draws[2, column] = loss[rows].mean()
    chance = []
    for _ in range(_DRAWS):
        outcome = (rng.random(pairs) < sure).astype(np.float64)
        chance.append(_ece(sure, outcome, number, bins))
    return Calibration(
        temperature,
        pairs,
        _around(_ece(sure, right, number, bins), draws[0]),
        float(np.mean(chance)),
        _around(float(squared.mean()), draws[1]),
        _around(float(loss.mean()), draws[2]),
        _bins(sure, right, number, bins),
    )


def best_temperature(margins: Sequence[float]) -> tuple[float, bool]:
    """What scores are to be divided by for the least log loss, between 0.001 and 1000, and whether
    that is one of the two. Raises ValueError without margins.
    """
    from scipy.optimize import minimize_scalar

    given = np.asarray(margins, dtype=np.float64)
    if not len(given):
        raise ValueError("expected at least one pair")

    def loss(log_temperature: float) -> float:
        return float(np.logaddexp(0, -given / np.exp(log_temperature)).mean())

    low, high = np.log(_LOWEST), np.log(_HIGHEST)
    found = float(minimize_scalar(loss, bounds=(low, high), method="bounded").x)
    at_bound = min(found - low, high - found) < 0.01
    return float(np.exp(found)), bool(at_bound)


def halves(groups: Sequence[str], seed: int) -> tuple[list[int], list[int]]:
    """Two halves of the rows, by drawn groups (prompts), so that no group is in both."""
    names = sorted(set(groups))
    order = np.random.default_rng(seed).permutation(len(names))
    half = len(names) // 2
    first = {names[i] for i in order[:half]}
    one, other = [], []
    for i, name in enumerate(groups):
        if name in first:
            one.append(i)
        else:
            other.append(i)
    return one, other


def calibrated(
    margins: Sequence[float], prompts: Sequence[str], *, bins: int, resamples: int, seed: int
) -> Calibrated | None:
    """Both calibrations on the same half; None with fewer than two prompts."""
    fitted, held = halves(prompts, seed)
    if not fitted or not held:
        return None
    temperature, at_bound = best_temperature([margins[i] for i in fitted])
    values = [margins[i] for i in held]
    plain = calibration(values, 1.0, bins=bins, resamples=resamples, seed=seed)
    tempered = calibration(values, temperature, bins=bins, resamples=resamples, seed=seed)
    return Calibrated(plain, tempered, at_bound)


def _sigmoid(values: Array) -> Array:
    clipped = np.clip(values, -500, 500)  # exp would overflow
    return np.asarray(1 / (1 + np.exp(-clipped)))


def _confidence(scaled: Array) -> Array:
    return _sigmoid(np.abs(scaled))


def _bin(sure: Array, bins: int) -> NDArray[np.int64]:
    place = (sure - 0.5) * 2 * bins
    return np.minimum(place.astype(np.int64), bins - 1)


def _ece(sure: Array, right: Array, number: NDArray[np.int64], bins: int) -> float:
    gaps = np.bincount(number, right - sure, bins)
    return float(np.abs(gaps).sum() / len(sure))


def _bins(sure: Array, right: Array, number: NDArray[np.int64], bins: int) -> tuple[Bin, ...]:
    out = []
    for i in range(bins):
        rows = number == i
        count = int(rows.sum())
        if count == 0:
            continue
        low = 0.5 + i / (2 * bins)
        high = 0.5 + (i + 1) / (2 * bins)
        confidence = float(sure[rows].mean())
        share = wilson(float(right[rows].mean()), count)
        out.append(Bin(low, high, count, confidence, share))
    return tuple(out)


def _around(estimate: float, draws: Array) -> Interval:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(estimate, float(low), float(high))
