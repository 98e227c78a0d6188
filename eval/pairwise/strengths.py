"""Strengths of policies out of a judge's verdicts: Bradley and Terry's model (1952), with the
judge's taste for the first place and for length as terms of their own. Pure functions, float64.

    P(the answer shown first wins) = sigmoid(s_first - s_second + b + g tanh(d / sd(d)))

s are the policies' strengths (log-odds), b the judge's preference for the first place, g that for
length, d the characters by which the answer shown first is longer, sd(d) their standard deviation
over all pairs. A tie is half a win for each. With b = g = 0 it is the plain model. The term of
length and its scale are those of AlpacaEval 2's length-controlled win rate (Dubois et al. 2024,
arXiv:2404.04475), without their term for each prompt's difficulty, which needs many models.
The judge's taste is fitted, and then set to 0: what remains is who wins at equal lengths.

Each coefficient has a normal prior of standard deviation PRIOR around 0, so that a policy that
never lost has a finite strength; it moves a strength of 1 out of 100 verdicts by less than 0.01.
Comparisons of one prompt are resampled together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eval.pairwise.asking import IDENTICAL
from eval.pairwise.verdicts import Judged
from eval.statistics import Interval

Array = NDArray[np.float64]
PRIOR = 5.0  # log-odds
_STEPS = 60  # of Newton's method, which takes about 6
_SMALLEST = 1e-10  # step at which it has arrived
_BLOCK = 64  # resamples that are fitted at a time


@dataclass(frozen=True, slots=True)
class Design:
    """Verdicts as rows of a logistic regression."""

    policies: tuple[str, ...]
    terms: Array  # [N, policies + 2]: +1 and -1 for the two policies, 1 for the place, the length
    wins: Array  # [N]: of the answer shown first, 1, 1/2 or 0
    prompts: NDArray[np.int64]  # [N]: number of the prompt


@dataclass(frozen=True, slots=True)
class Strengths:
    """A fitted model: coefficients with intervals, and each policy's chance to win."""

    strength: dict[str, Interval]  # log-odds around their mean over the policies
    win_rate: dict[str, Interval]  # mean over the other policies of sigmoid(s - s_other)
    first_place: Interval | None  # b, log-odds; None where it was left out
    length: Interval | None  # g, log-odds


def design(judged: Sequence[Judged], policies: Sequence[str]) -> Design:
    """The rows of every pair with two verdicts, two rows each, and of equal answers, which are ties
    that say nothing of the judge. Raises ValueError without a verdict.
    """
    read = [one for one in judged if one.wins is not None or one.unasked == IDENTICAL]
    if all(one.wins is None for one in read):
        raise ValueError("no pair has a verdict in both orders")
    number = {name: i for i, name in enumerate(policies)}
    prompts: dict[str, int] = {}
    longer = np.array([one.pair.longer_by for one in read], dtype=np.float64)
    asked = np.array([one.wins is not None for one in read])
    scale = float(longer[asked].std()) or 1.0
    terms = np.zeros((2 * len(read), len(policies) + 2))
    wins, rows = np.full(len(terms), 0.5), np.zeros(len(terms), dtype=np.int64)
    for i, one in enumerate(read):
        mine, theirs = (number[name] for name in one.pair.policies)
        shown, swapped = 2 * i, 2 * i + 1
        terms[shown, [mine, theirs]] = 1.0, -1.0
        terms[swapped, [mine, theirs]] = -1.0, 1.0
        rows[[shown, swapped]] = prompts.setdefault(one.pair.prompt_id, len(prompts))
        if one.wins is None:
            continue
        terms[[shown, swapped], -2] = 1.0
        terms[shown, -1] = np.tanh(longer[i] / scale)
        terms[swapped, -1] = -terms[shown, -1]
        wins[shown], wins[swapped] = one.wins[0], 1 - one.wins[1]
    return Design(tuple(policies), terms, wins, rows)


def coefficients(terms: Array, wins: Array, weights: Array) -> Array:
    """[R, K]: the modes of the posteriors of a logistic regression without a constant, for each of
    R weightings. terms: [N, K]; wins: [N] in [0, 1]; weights: [R, N].

    Newton's method. Raises ArithmeticError where it does not arrive.
    """
    found = np.zeros((len(weights), terms.shape[1]))
    prior = np.eye(terms.shape[1]) / PRIOR**2
    for _ in range(_STEPS):
        chance = 1 / (1 + np.exp(-np.clip(found @ terms.T, -500, 500)))  # [R, N]
        slope = (weights * (wins - chance)) @ terms - found / PRIOR**2
        information = (weights * chance * (1 - chance))[:, None, :]  # [R, 1, N]
        curve = (terms.T * information) @ terms  # [R, K, K]
        step = np.linalg.solve(curve + prior, slope[:, :, None])[:, :, 0]
        # never farther than the prior's width at once: far out the curve is flat
        step *= np.minimum(1, PRIOR / np.maximum(np.abs(step).max(axis=1), 1e-300))[:, None]
        found += step
        if np.abs(step).max() < _SMALLEST:
            return found
    raise ArithmeticError("the fit of strengths did not converge")


def fit(given: Design, *, place: bool, length: bool, resamples: int, seed: int) -> Strengths:
    """Strengths with 95 % percentile intervals over resampled prompts; `place` and `length` say
    which of the judge's tastes are terms of the model.
    """
    count = len(given.policies)
    columns = [*range(count)] + [count] * place + [count + 1] * length
    terms = given.terms[:, columns]
    every = coefficients(terms, given.wins, np.ones((1, len(terms))))
    rng = np.random.default_rng(seed)
    prompts = int(given.prompts.max()) + 1
    drawn = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    parts = [every]
    for start in range(0, resamples, _BLOCK):
        weights = drawn[start : start + _BLOCK, given.prompts].astype(np.float64)
        parts.append(coefficients(terms, given.wins, weights))
    found = np.concatenate(parts)
    strengths = found[:, :count] - found[:, :count].mean(axis=1, keepdims=True)
    rates = _win_rates(strengths)
    names = given.policies
    return Strengths(
        {name: _interval(strengths[:, i]) for i, name in enumerate(names)},
        {name: _interval(rates[:, i]) for i, name in enumerate(names)},
        _interval(found[:, count]) if place else None,
        _interval(found[:, -1]) if length else None,
    )


def _win_rates(strengths: Array) -> Array:
    """[R, policies]: the mean chance of each to win against the others."""
    apart = strengths[:, :, None] - strengths[:, None, :]
    chance = 1 / (1 + np.exp(-apart))
    itself = 0.5
    return np.asarray((chance.sum(axis=2) - itself) / (strengths.shape[1] - 1))


def _interval(values: Array) -> Interval:
    """The first of `values` with the interval of the others."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Interval(float(values[0]), float(low), float(high))
