"""Statistics of responses: means with bootstrap intervals, paired by prompt, and diversity. Pure
functions, float64.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 22  # resampled values held at a time


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the percentile interval around it."""

    estimate: float
    low: float
    high: float


def per_prompt(values: Sequence[float], prompt_ids: Sequence[str]) -> NDArray[np.float64]:
    """The mean value of each prompt's responses, [prompts], in the order of the prompts' first
    appearance. `values` and `prompt_ids`: [B]. Raises ValueError where B is 0 or differs.
    """
    if len(values) != len(prompt_ids) or not prompt_ids:
        raise ValueError(
            f"expected as many values as prompt ids and at least one, found {len(values)} and "
            f"{len(prompt_ids)}"
        )
    groups: dict[str, list[float]] = {}
    for value, prompt_id in zip(values, prompt_ids, strict=True):
        groups.setdefault(prompt_id, []).append(float(value))
    return np.array([np.mean(group) for group in groups.values()], dtype=np.float64)


def bootstrap_mean(
    values: NDArray[np.float64], *, resamples: int, seed: int, confidence: float = 0.95
) -> Interval:
    """The mean of `values` [N] with its percentile bootstrap interval (Efron and Tibshirani 1993,
    chapter 13). Raises ValueError without values.
    """
    if values.ndim != 1 or len(values) == 0 or resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            "expected values [N] with N >= 1, resamples >= 1 and confidence in (0, 1), found "
            f"{values.shape}, {resamples}, {confidence}"
        )
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // len(values))
    means = []
    for done in range(0, resamples, block):
        size = (min(block, resamples - done), len(values))
        means.append(values[rng.integers(0, len(values), size)].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def bootstrap_ratio(
    parts: NDArray[np.float64],
    wholes: NDArray[np.float64],
    *,
    resamples: int,
    seed: int,
    confidence: float = 0.95,
) -> Interval:
    """sum(parts) / sum(wholes), both [N], with its percentile bootstrap interval over the N. Raises
    ValueError without values, and for a whole that is not above 0.
    """
    if parts.shape != wholes.shape or parts.ndim != 1 or not len(parts) or wholes.min() <= 0:
        raise ValueError(
            f"expected as many parts as wholes above 0, found {parts.shape} and {wholes.shape}"
        )
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // len(parts))
    ratios = []
    for done in range(0, resamples, block):
        chosen = rng.integers(0, len(parts), (min(block, resamples - done), len(parts)))
        ratios.append(parts[chosen].sum(axis=1) / wholes[chosen].sum(axis=1))
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(np.concatenate(ratios), tails)
    return Interval(float(parts.sum() / wholes.sum()), float(low), float(high))


def wilson(share: float, count: int, confidence: float = 0.95) -> Interval:
    """A share of `count` independent cases with Wilson's score interval (1927), which has a width
    where all cases agree. Raises ValueError without cases.
    """
    if count < 1 or not 0 <= share <= 1:
        raise ValueError(f"expected a share in [0, 1] of at least one case: {share}, {count}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    inner = share * (1 - share) / count + z**2 / (4 * count**2)
    half = z * math.sqrt(inner) / (1 + z**2 / count)
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def share_by_group(
    cases: Sequence[tuple[str, float, float]], *, resamples: int, seed: int
) -> Interval | None:
    """A share of cases that are independent between groups only, such as prompts: the sum of the
    second numbers over that of the third, with whole groups resampled for the 95 % interval
    (`wilson` of the groups where all of them agree). None where nothing counts.
    """
    sums: dict[str, tuple[float, float]] = {}
    for group, part, whole in cases:
        old = sums.get(group, (0.0, 0.0))
        sums[group] = (old[0] + part, old[1] + whole)
    values = np.array([value for value in sums.values() if value[1] > 0]).reshape(-1, 2)
    if not len(values):
        return None
    found = bootstrap_ratio(values[:, 0], values[:, 1], resamples=resamples, seed=seed)
    if found.low == found.high:  # all or none: resampling sees no other case
        return wilson(found.estimate, len(values))
    return found


def paired_difference(
    before: Sequence[float],
    after: Sequence[float],
    prompt_ids: Sequence[str],
    *,
    resamples: int,
    seed: int,
) -> Interval:
    """The mean of after - before with its 95 % interval.

    `before`, `after`: [B], a value for each response to the prompt in `prompt_ids` [B]. Prompts are
    resampled as a whole: a prompt with several responses counts once, by their mean. Pairing by
    prompt removes the differences between prompts from the interval.
    """
    return bootstrap_mean(
        per_prompt(after, prompt_ids) - per_prompt(before, prompt_ids),
        resamples=resamples,
        seed=seed,
    )


# From sums over rows, [..., S], to a figure, [...].
Figure = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def bootstrap_totals(
    totals: NDArray[np.float64], figure: Figure, *, resamples: int, seed: int
) -> Interval:
    """A figure of sums over rows, such as BLEU or a perplexity, with its 95 % percentile bootstrap
    interval by row. `totals`: [N, S], what each row adds. Raises ValueError without rows.
    """
    if totals.ndim != 2 or len(totals) == 0 or resamples < 1:
        raise ValueError(
            f"expected totals [N, S] with N >= 1 and resamples >= 1, found {totals.shape}, "
            f"{resamples}"
        )
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // totals.size)
    figures = []
    for done in range(0, resamples, block):
        size = (min(block, resamples - done), len(totals))
        figures.append(figure(totals[rng.integers(0, len(totals), size)].sum(axis=1)))
    low, high = np.quantile(np.concatenate(figures), [0.025, 0.975])
    return Interval(float(figure(totals.sum(axis=0))), float(low), float(high))


def paired_totals(
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    figure: Figure,
    *,
    resamples: int,
    seed: int,
) -> Interval:
    """The figure of `after` less that of `before`, both [N, S] of the same rows, with its 95 %
    interval: rows are resampled for both together.
    """
    size = before.shape[1]

    def difference(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(figure(sums[..., size:]) - figure(sums[..., :size]))

    both = np.concatenate([before, after], axis=1)
    return bootstrap_totals(both, difference, resamples=resamples, seed=seed)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """The two-sided p-value of McNemar's exact test (1947) that both are right equally often, from
    the rows where only one of them is; 1 where there is none.
    """
    lost = sum(old and not new for old, new in zip(before, after, strict=True))
    won = sum(new and not old for old, new in zip(before, after, strict=True))
    count = lost + won
    tail = sum(math.comb(count, k) for k in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / 2**count)


def distinct_n(sequences: Sequence[Sequence[Hashable]], n: int) -> float:
    """Distinct n-grams divided by all n-grams of the sequences (Li et al. 2016, arXiv:1510.03055);
    0 where no sequence has n items.

    It falls with the amount of text: compare equally many responses of about the same length.
    """
    if n < 1:
        raise ValueError(f"expected n >= 1, found {n}")
    grams = [
        tuple(sequence[i : i + n]) for sequence in sequences for i in range(len(sequence) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0
