"""Simulated annotators: people whose taste is known, so that what a choice of pairs is worth can be
measured. Pure and seeded.

An annotator compares the hidden worth of the answers with noise: the difference of two Gumbel draws
is logistic, so a pair is judged by Bradley and Terry's model (1952) at a temperature, and a ranking
by that of Plackett and Luce. A pair that seems equal is a tie (Rao and Kupper 1967). Then a slip of
the hand turns some of the judgements round, whatever was seen.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.labels.records import Judgement, Task, Verdict


@dataclass(frozen=True, slots=True)
class Annotator:
    """One annotator's reliability. A judgement is a function of these fields and the task alone, so
    the order of the tasks does not matter.
    """

    name: str
    seed: int
    # difference of worth at which the better answer is preferred with logistic(1) = 73 %
    temperature: float = 1.0
    flip: float = 0.0  # share of the judgements that are turned round
    # a pair whose difference, noise included, is below so many temperatures is a tie
    tie: float = 0.0
    side_bias: float = 0.0  # temperatures that the answer on the left is given

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 <= self.flip <= 1 or self.tie < 0:
            raise ValueError(
                "expected a temperature above 0, a flip in [0, 1] and a tie of at least 0, "
                f"found {self}"
            )


def judge(annotator: Annotator, task: Task, worth: Sequence[float]) -> Judgement:
    """The annotator's judgement of a task, by positions as shown; `worth` is that of task.answers,
    in their order.

    Raises ValueError for another number of worths, or one that is not finite.
    """
    if len(worth) != len(task.answers) or not all(math.isfinite(value) for value in worth):
        raise ValueError(
            f"task {task.id}: expected {len(task.answers)} finite numbers, found {list(worth)}"
        )
    rng = random.Random(f"{annotator.seed}:{annotator.name}:{task.id}")
    seen = [worth[i] / annotator.temperature + _gumbel(rng) for i in task.order]  # by position
    slipped = rng.random() < annotator.flip
    ranking: tuple[tuple[int, ...], ...] = ()
    if len(seen) > 2:
        ranked = sorted(range(len(seen)), key=lambda i: -seen[i])
        verdict, ranking = (
            Verdict.ranked,
            tuple((i,) for i in (reversed(ranked) if slipped else ranked)),
        )
    else:
        difference = seen[0] + annotator.side_bias - seen[1]
        better = Verdict.left if (difference > 0) != slipped else Verdict.right
        verdict = Verdict.tie if abs(difference) < annotator.tie else better
    return Judgement(
        task=task.id,
        annotator=annotator.name,
        verdict=verdict,
        ranking=ranking,
        annotation=f"{annotator.name}-{task.id}",
        place=f"simulated annotator {annotator.name}",
        prompt=task.prompt,
        shown=task.shown,
    )


def _gumbel(rng: random.Random) -> float:
    """A draw from the standard Gumbel distribution: minus the logarithm of an exponential one."""
    return -math.log(max(rng.expovariate(1.0), 1e-300))
