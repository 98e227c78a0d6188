"""What the best of n answers by a proxy is worth to a judge that the proxy never saw, out of N
answers to each prompt. Pure functions.

The expected value over all subsets of n of the N answers is computed by order statistics, without
drawing any: the answer of rank i from below is the best of n with probability C(i - 1, n - 1) /
C(N, n). It has no bias, as pass@k has none (Chen et al. 2021, arXiv:2107.03374; for best-of-n
Nakano et al. 2021, arXiv:2112.09332, appendix I). Answers with equal proxies share their chances.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eval.statistics import Interval

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Curve:
    """Means over prompts for each n, with the 95 % interval over resampled prompts."""

    n: tuple[int, ...]
    kl: tuple[float, ...]  # nats, of the best of n from the policy
    proxy: tuple[Interval, ...]
    judge: tuple[Interval, ...]
    prompts: int
    # [1 + resamples, n]: the judge's and the proxy's values, the first row as measured
    judge_draws: Array
    proxy_draws: Array


def kl_of_best(n: int) -> float:
    """KL in nats of the best of n from the policy it is drawn from: log n - (n - 1) / n, an upper
    bound where answers repeat (Beirami et al. 2024, arXiv:2401.01879).
    """
    return math.log(n) - (n - 1) / n


def chances(proxy: Sequence[float], n: int) -> Array:
    """[N]: how likely each of the answers is the best of n drawn without replacement. Raises
    ValueError unless 1 <= n <= N.
    """
    values = np.asarray(proxy, dtype=np.float64)
    count = len(values)
    if not 1 <= n <= count:
        raise ValueError(f"expected n between 1 and {count}, found {n}")
    whole = math.comb(count, n)
    by_rank = np.empty(count)
    for rank in range(count):
        by_rank[rank] = math.comb(rank, n - 1) / whole
    # answers with equal proxies share the chances of their ranks
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    shared = np.add.reduceat(by_rank, ends - sizes) / sizes
    return np.asarray(shared[group])


def powers_of_two(most: int) -> tuple[int, ...]:
    """1, 2, 4 and so on up to `most`, and `most` itself."""
    out = [1]
    while out[-1] * 2 <= most:
        out.append(out[-1] * 2)
    if out[-1] < most:
        out.append(most)
    return tuple(out)


def best_of_n(
    proxy: Sequence[Sequence[float]],
    judge: Sequence[Sequence[float]],
    *,
    resamples: int,
    seed: int,
) -> Curve:
    """Curves up to the fewest answers of a prompt. `proxy`, `judge`: for each prompt its answers'
    values. Raises ValueError without prompts.
    """
    if not proxy:
        raise ValueError("expected at least one prompt")
    ns = powers_of_two(min(len(values) for values in proxy))
    prompts = len(proxy)
    by_proxy = np.zeros((prompts, len(ns)))
    by_judge = np.zeros((prompts, len(ns)))
    for row, (values, gold) in enumerate(zip(proxy, judge, strict=True)):
        for column, n in enumerate(ns):
            weights = chances(values, n)
            by_proxy[row, column] = weights @ np.asarray(values, dtype=np.float64)
            by_judge[row, column] = weights @ np.asarray(gold, dtype=np.float64)
    rng = np.random.default_rng(seed)
    alike = np.full(prompts, 1 / prompts)
    drawn = rng.multinomial(prompts, alike, size=resamples)  # [resamples, prompts]
    proxy_draws = _means(by_proxy, drawn)
    judge_draws = _means(by_judge, drawn)
    return Curve(
        ns,
        tuple(kl_of_best(n) for n in ns),
        tuple(_interval(column) for column in proxy_draws.T),
        tuple(_interval(column) for column in judge_draws.T),
        prompts,
        judge_draws=judge_draws,
        proxy_draws=proxy_draws,
    )


def _means(values: Array, drawn: NDArray[np.int64]) -> Array:
    """[1 + resamples, n]: the mean over the prompts, as measured and in each resample."""
    measured = values.mean(axis=0, keepdims=True)
    again = drawn @ values / len(values)
    return np.concatenate([measured, again])


def _interval(values: Array) -> Interval:
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Interval(float(values[0]), float(low), float(high))
