"""Scores by the length of a response."""

from collections.abc import Sequence

from conf.choices import LengthUnit
from conf.schema import RewardTerm
from reward.base import Stateless
from rlhf.types import Rollout, Scores


def band_score(length: int, low: int | None, high: int | None, ramp: int) -> float:
    """0 for a length in [low, high]; outside it falls linearly, to -1 at a distance of `ramp` and
    beyond. None: no bound on that side.

    With high = L_max - L_cache and ramp = L_cache it is DAPO's soft overlong punishment (Yu et al.
    2025, arXiv:2503.14476, equation 13).
    """
    distance = 0
    if low is not None and length < low:
        distance = low - length
    if high is not None and length > high:
        distance += length - high
    return -min(1.0, distance / ramp)


class LengthScorer(Stateless):
    """`band_score` of each response: in tokens, the end-of-sequence token included, or in
    characters of its text.
    """

    def __init__(self, term: RewardTerm) -> None:
        self.low, self.high, self.ramp = term.low, term.high, term.ramp
        self.unit = term.unit

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        if self.unit is LengthUnit.tokens:
            lengths = [len(rollout.token_ids) for rollout in rollouts]
        else:
            lengths = [len(rollout.text) for rollout in rollouts]
        total = [band_score(length, self.low, self.high, self.ramp) for length in lengths]
        return Scores(total=total, terms={"length": list(total)})
