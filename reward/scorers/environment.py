"""What an environment makes of an episode: the sum of the rewards that it gave for its turns."""

from collections.abc import Sequence

from conf.schema import RewardTerm
from reward.base import Stateless, name_prompt
from rlhf.types import Rollout, Scores, UserError


class EnvironmentScorer(Stateless):
    """Scores an episode by its environment, whatever the policy wrote last."""

    def __init__(self, term: RewardTerm) -> None:
        pass  # the kind has no options of its own

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """One term, environment. Raises UserError naming the prompt of a response that no
        environment answered.
        """
        total = [_sum_of_turns(rollout) for rollout in rollouts]
        return Scores(total=total, terms={"environment": list(total)})


def _sum_of_turns(rollout: Rollout) -> float:
    if not rollout.turns:
        raise UserError(
            f"reward.terms of kind=environment: no environment answered {name_prompt(rollout)}. "
            "Set environment, or leave the term out."
        )
    return sum(turn.reward for turn in rollout.turns)
