"""How well a detector agrees with people. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from eval.statistics import Interval

_Z = 1.959963984540054  # of a 95 % interval


@dataclass(frozen=True, slots=True)
class Agreement:
    """A detector's verdicts against people's labels."""

    accuracy: Interval
    precision: float  # NaN where it found none
    recall: float  # NaN where there is none
    count: int
    missed: tuple[int, ...]  # rows that people call positive, and it doesn't
    invented: tuple[int, ...]  # rows that it calls positive, and people don't


def agreement(found: Sequence[bool], labels: Sequence[bool]) -> Agreement:
    """`found` against `labels`, [N] each. Raises ValueError without rows, or for other lengths."""
    if len(found) != len(labels) or not labels:
        raise ValueError(f"expected as many verdicts as labels, found {len(found)}, {len(labels)}")
    pairs = list(zip(found, labels, strict=True))
    missed = tuple(i for i, (said, true) in enumerate(pairs) if true and not said)
    invented = tuple(i for i, (said, true) in enumerate(pairs) if said and not true)
    right = sum(said and true for said, true in pairs)
    return Agreement(
        accuracy=wilson(len(pairs) - len(missed) - len(invented), len(pairs)),
        precision=_share(right, sum(found)),
        recall=_share(right, sum(labels)),
        count=len(pairs),
        missed=missed,
        invented=invented,
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def wilson(successes: int, count: int) -> Interval:
    """A share with its 95 % interval (Wilson 1927)."""
    share = successes / count
    middle = share + _Z**2 / (2 * count)
    half = _Z * sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    scale = 1 + _Z**2 / count
    return Interval(share, max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale))
