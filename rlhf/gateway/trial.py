"""How the test between arms stands: an anytime-valid test with the user as the unit.

A user's outcome y in [0, 1] is the mean of the first few thumbs. Each user was put into arm b with
a known probability p by a keyed hash, that is at random. If the arms do not differ, y says nothing
about the arm, and

    x = 1/2 + (y - c) (1[b] - p) / (2 max(c, 1 - c) max(p, 1 - p))

has mean 1/2 whatever c is, as long as c is known before: here the mean of the users before, which
takes most of the noise away. So the x of users in the order in which they became complete are
outcomes for the test by betting of rlhf.labels.ab (arXiv:2010.09686): one may look at any time, and
the probability of ever naming a better arm where there is none is at most alpha. Nothing is assumed
of the users: not that they are alike, nor that they come at the same times. Only users count, not
thumbs: thumbs of one user are alike, and counting them as if they were independent names a better
arm far too often.

More than two arms are each compared with the first by name, at alpha divided by the number of
comparisons (Bonferroni).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.gateway.records import Outcome
from rlhf.labels.ab import sequential_test
from rlhf.labels.betting import bets, confidence_interval


@dataclass(frozen=True, slots=True)
class Standing:
    """An arm's users: how many are complete, their mean outcome, and its interval, which is right
    however often one looks, where users are independent and alike.
    """

    arm: str
    users: int
    mean: float | None
    interval: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The test of arm `b` against arm `a`."""

    a: str
    b: str
    users: int
    e_value: float
    alpha: float
    decision: str  # "b is better", "a is better", "not decided"
    stopped: int | None  # users at which it was decided


def moves(outcomes: Sequence[Outcome], a: str, b: str) -> np.ndarray:
    """x of the users of arms `a` and `b`, [N], in their order."""
    out = []
    total, count = 0.5, 1.0
    for outcome in outcomes:
        if outcome.arm not in (a, b):
            continue
        shares = outcome.weights.get(a, 0.0), outcome.weights.get(b, 0.0)
        if not min(shares) > 0:  # the other arm could not have been drawn: it says nothing
            continue
        p = shares[1] / sum(shares)
        c = total / count
        reach = 2 * max(c, 1 - c) * max(p, 1 - p)
        side = (1 - p) if outcome.arm == b else -p
        out.append(0.5 + (outcome.value - c) * side / reach)
        total, count = total + outcome.value, count + 1
    return np.clip(np.array(out, dtype=np.float64), 0.0, 1.0)


def compare(outcomes: Sequence[Outcome], a: str, b: str, alpha: float) -> Comparison:
    """How the test of `b` against `a` stands."""
    given = moves(outcomes, a, b)
    found = sequential_test(given.tolist(), alpha=alpha)
    decision = found.decision if found.stopped is not None else "not decided"
    return Comparison(a, b, len(given), found.e_value, alpha, decision, found.stopped)


def comparisons(outcomes: Sequence[Outcome], arms: Sequence[str], alpha: float) -> list[Comparison]:
    """Each arm against the first by name."""
    first, *others = sorted(arms)
    return [compare(outcomes, first, other, alpha / len(others)) for other in others]


def standings(outcomes: Sequence[Outcome], arms: Sequence[str], alpha: float) -> list[Standing]:
    """Each arm by itself."""
    out = []
    for arm in sorted(arms):
        values = np.array([outcome.value for outcome in outcomes if outcome.arm == arm])
        mean = float(values.mean()) if len(values) else None
        interval = confidence_interval(values, alpha, bets(None))
        out.append(Standing(arm, len(values), mean, interval))
    return out
