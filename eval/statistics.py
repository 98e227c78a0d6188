"""Figures over responses: averages with bootstrap intervals paired by prompt, and diversity. Pure
functions, float64.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

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
    """Mean value of each prompt's responses, [prompts], in order of first appearance. Raises
    ValueError for no or unequally many values.
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
    """Mean of `values` [N] and its percentile bootstrap interval (Efron and Tibshirani 1993,
    chapter 13). Raises ValueError without values.
    """
    if values.ndim != 1 or len(values) == 0 or resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            "expected values [N] with N >= 1, resamples >= 1 and confidence in (0, 1), found "
            f"{values.shape}, {resamples}, {confidence}"
        )
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // len(values))
    means = [
        values[rng.integers(0, len(values), (min(block, resamples - done), len(values)))].mean(
            axis=1
        )
        for done in range(0, resamples, block)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def paired_difference(
    before: Sequence[float],
    after: Sequence[float],
    prompt_ids: Sequence[str],
    *,
    resamples: int,
    seed: int,
) -> Interval:
    """Mean of after - before and its 95 % interval, prompts resampled as a whole.

    Both lists hold one value per response to the prompts of `prompt_ids`. Pairing by prompt takes
    out what the prompts themselves differ by; a prompt with several responses counts once, by their
    mean.
    """
    return bootstrap_mean(
        per_prompt(after, prompt_ids) - per_prompt(before, prompt_ids),
        resamples=resamples,
        seed=seed,
    )


def distinct_n(sequences: Sequence[Sequence[Hashable]], n: int) -> float:
    """Different n-grams / all n-grams over every sequence (Li et al. 2016, arXiv:1510.03055). 0
    when no sequence has n items.

    It falls as there is more text, so compare only equally many responses of about the same length.
    """
    if n < 1:
        raise ValueError(f"expected n >= 1, found {n}")
    grams = [
        tuple(sequence[i : i + n]) for sequence in sequences for i in range(len(sequence) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0
