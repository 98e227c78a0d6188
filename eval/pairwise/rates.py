"""Win rates out of a judge's verdicts, and whether they mean anything. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.pairwise.asking import IDENTICAL
from eval.pairwise.biases import Biases
from eval.pairwise.verdicts import Judged
from eval.statistics import Interval, bootstrap_mean


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a judge must reach before its verdicts rank anybody."""

    least_consistency: float  # share of pairs with the same winner in both orders
    most_unread: float  # share of pairs without a verdict


def untrusted(found: Biases, bounds: Bounds) -> list[str]:
    """Why a judge's verdicts rank nobody, a sentence each; empty where they do."""
    out = []
    if found.unread_share > bounds.most_unread:
        out.append(
            f"{found.unread_share:.0%} of the pairs have no clear verdict in both orders, more "
            f"than most_unread={bounds.most_unread:g}"
        )
    if found.asked == 0:
        return [*out, "the judge was asked about no pair"]
    if found.consistency is None:
        out.append("the judge named no winner in any pair")
    elif found.consistency.estimate < bounds.least_consistency:
        place = ""
        if found.first is not None:
            place = f"; {found.first.estimate:.0%} of its choices are the answer shown first"
        out.append(
            f"it names the same winner in both orders in {found.consistency.estimate:.0%} of the "
            f"pairs, fewer than least_consistency={bounds.least_consistency:g}{place}"
        )
    return out


@dataclass(frozen=True, slots=True)
class PairRate:
    """Two policies: how often the first wins, in the mean of both orders and a tie as half."""

    policies: tuple[str, str]
    win_rate: Interval  # intervals resample prompts
    pairs: int  # that have a verdict, equal answers included
    wins: float  # pairs, ties and contradictions as half
    split: int  # pairs with another winner in each order, or one in one order only
    ties: int  # pairs without a winner in either order, equal answers included


def value(one: Judged) -> float | None:
    """What the first policy of a pair gets: the mean of both orders, 1/2 for equal answers; None
    where a verdict is missing.
    """
    if one.unasked == IDENTICAL:
        return 0.5
    return None if one.wins is None else sum(one.wins) / 2


def pair_rates(judged: Sequence[Judged], *, resamples: int, seed: int) -> list[PairRate]:
    """Each two policies that were compared, in the order of `judged`. Two without any verdict are
    left out.
    """
    groups: dict[tuple[str, str], list[Judged]] = {}
    for one in judged:
        groups.setdefault(one.pair.policies, []).append(one)
    out = []
    for policies, group in groups.items():
        values = [(one.pair.prompt_id, value(one)) for one in group]
        known = [(prompt, number) for prompt, number in values if number is not None]
        if not known:
            continue
        ties = [one for one in group if one.unasked == IDENTICAL or one.wins == (0.5, 0.5)]
        split = [one for one in group if one.wins is not None and one.wins[0] != one.wins[1]]
        interval = _by_prompt(known, resamples=resamples, seed=seed)
        wins = sum(number for _, number in known)
        out.append(PairRate(policies, interval, len(known), wins, len(split), len(ties)))
    return out


def win_rates(
    judged: Sequence[Judged], policies: Sequence[str], *, resamples: int, seed: int
) -> dict[str, Interval]:
    """Each policy's wins against all others, as `value` counts them, with the 95 % interval over
    resampled prompts; each prompt counts once.
    """
    out = {}
    for name in policies:
        values = []
        for one in judged:
            number = value(one)
            if number is None or name not in one.pair.policies:
                continue
            own = number if one.pair.policies[0] == name else 1 - number
            values.append((one.pair.prompt_id, own))
        if values:
            out[name] = _by_prompt(values, resamples=resamples, seed=seed)
    return out


def _by_prompt(values: Sequence[tuple[str, float]], *, resamples: int, seed: int) -> Interval:
    groups: dict[str, list[float]] = {}
    for prompt, number in values:
        groups.setdefault(prompt, []).append(number)
    means = np.array([np.mean(group) for group in groups.values()], dtype=np.float64)
    return bootstrap_mean(means, resamples=resamples, seed=seed)
