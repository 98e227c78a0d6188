"""How long a response is, as a score."""

from collections.abc import Sequence

from conf.choices import LengthUnit
from conf.schema import RewardTerm
from reward.base import Stateless
from rlhf.types import Rollout, Scores


def band_score(length: int, low: int | None, high: int | None, ramp: int) -> float:
    """0 inside [low, high], falling in a straight line to -1 at `ramp` units outside, and no
    further.

    With high = L_max - L_cache and ramp = L_cache it is DAPO's soft overlong punishment (Yu et al.
    2025, arXiv:2503.14476, equation 13).
    """
    short = 0 if low is None else max(0, low - length)
    long = 0 if high is None else max(0, length - high)
    return -min(1.0, (short + long) / ramp)


class LengthScorer(Stateless):
    """`band_score` of the response in tokens (the end-of-sequence token is one) or in characters of
    its text.
    """

    def __init__(self, term: RewardTerm) -> None:
        self.low, self.high, self.ramp, self.unit = term.low, term.high, term.ramp, term.unit

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        lengths = [
            len(r.token_ids) if self.unit is LengthUnit.tokens else len(r.text) for r in rollouts
        ]
        total = [band_score(length, self.low, self.high, self.ramp) for length in lengths]
        return Scores(total=total, terms={"length": list(total)})
