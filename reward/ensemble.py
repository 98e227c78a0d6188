"""Several reward models as one score, and how far apart they are (Coste et al. 2023,
arXiv:2310.02743; Eisenstein et al. 2023, arXiv:2312.09244).
"""

import math
import statistics
from collections.abc import Sequence

from conf.choices import Combine
from reward.scorer import RewardModelScorer, Stateless
from rlhf.types import Rollout, Scores, UserError


def combine(
    members: Sequence[Sequence[float]], how: Combine, spread_coef: float = 1.0
) -> tuple[list[float], list[float]]:
    """(score, spread) per response from `members` [models][B] on one scale.

    The spread is the population standard deviation over the models; pessimistic is mean -
    spread_coef x spread. (Coste et al. subtract the variance, equation 3; the standard deviation
    has the score's own unit, so that its coefficient means the same at every scale.)
    """
    columns = list(zip(*members, strict=True))
    means = [statistics.fmean(column) for column in columns]
    spreads = [statistics.pstdev(column) for column in columns]
    if how is Combine.minimum:
        return [min(column) for column in columns], spreads
    if how is Combine.pessimistic:
        return [
            mean - spread_coef * spread for mean, spread in zip(means, spreads, strict=True)
        ], spreads
    return means, spreads


class EnsembleScorer(Stateless):
    """Reward models scored side by side; extras hold `spread`.

    A reward model's zero and unit are arbitrary (only differences were trained), so each score is
    first put on the scale of the model's own held-out texts: (score - score_mean) / score_std of
    its manifest. Else the minimum would always be the same model.
    """

    def __init__(
        self, members: Sequence[RewardModelScorer], how: Combine, spread_coef: float
    ) -> None:
        """Raises UserError for a member whose held-out scores don't differ."""
        for member in members:
            spread = member.manifest.score_std
            if not (math.isfinite(spread) and spread > 0):
                raise UserError(
                    f"{member.place}: its score_std over held-out texts is {spread}, so it can't "
                    "be put on one scale with the other models of the "
                    "ensemble. Expected: a reward model whose scores differ."
                )
        self.members, self.how, self.spread_coef = list(members), how, spread_coef

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """The combined score in held-out standard deviations. Raises UserError as the
        members do.
        """
        scaled = []
        for member in self.members:
            mean, std = member.manifest.score_mean, member.manifest.score_std
            scaled.append([(score - mean) / std for score in member.score(rollouts).total])
        total, spread = combine(scaled, self.how, self.spread_coef)
        return Scores(total=total, terms={"ensemble": list(total)}, extras={"spread": spread})
