"""A reward of several terms: each is scored, clipped and normalised by itself; the total is their
weighted sum.

    total = sum over terms of weight x normalised(clipped(raw))

A term is any Scorer; its `total` is the term's raw value. Scores.terms holds the raw values, so
that reward/<term> is comparable from step to step, whatever the running statistics are.
"""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from reward.base import name_prompt
from rlhf.process import distributed
from rlhf.process.distributed import RunningMoments
from rlhf.types import NonFiniteScore, Rollout, Scorer, Scores, UserError

_LEAST_STD = 1e-6  # below it all values are equal, and their normalised value is 0


@dataclass(slots=True)
class Term:
    """A summand of the reward."""

    name: str
    scorer: Scorer
    weight: float = 1.0
    clip: float | None = None  # raw values into [-clip, clip]
    # with mean and standard deviation of all clipped values so far, this batch included
    normalise: bool = False
    moments: RunningMoments = field(default_factory=RunningMoments)


class CompositeScorer:
    """The weighted sum of terms.

    Where a term is normalised, `score` is a collective operation: every rank calls it, also a rank
    without responses.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        names = [term.name for term in terms]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"expected at least one term, each name once; found {names}")
        self.terms = list(terms)

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """Raw values by term, the total, and extras: `<term>_clipped` (1 where a value was clipped)
        and the extras of the terms' scorers as `<term>_<name>`.

        Raises UserError naming term and prompt for a value that is not a finite number.
        """
        total = [0.0] * len(rollouts)
        values: dict[str, list[float]] = {}
        extras: dict[str, list[float]] = {}
        for term in self.terms:
            scored = term.scorer.score(rollouts)
            raw = checked(term.name, scored.total, rollouts)
            values[term.name] = raw
            extras |= {f"{term.name}_{key}": list(extra) for key, extra in scored.extras.items()}
            if term.clip is not None:
                extras[f"{term.name}_clipped"] = [float(abs(value) > term.clip) for value in raw]
            for row, value in enumerate(_scaled(term, raw)):
                total[row] += term.weight * value
        return Scores(total=total, terms=values, extras=extras)

    def state_dict(self) -> dict[str, object]:
        """Running statistics by term, as JSON can hold them; the same on every rank."""
        return {term.name: term.moments.state_dict() for term in self.terms if term.normalise}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue with the statistics of `state_dict`. Raises UserError when other terms are
        normalised than then.
        """
        expected = {term.name for term in self.terms if term.normalise}
        if set(state) != expected:
            raise UserError(
                "The checkpoint holds statistics of the reward terms "
                f"{', '.join(sorted(state)) or 'none'}, but reward.terms normalises "
                f"{', '.join(sorted(expected)) or 'none'}. Resume with the terms that the run "
                "started with."
            )
        for term in self.terms:
            moments = state.get(term.name)
            if isinstance(moments, dict):
                term.moments.load_state_dict(moments)


def _scaled(term: Term, raw: Sequence[float]) -> list[float]:
    """Raw values clipped and normalised: what the term adds before its weight."""
    values = list(raw)
    if term.clip is not None:
        values = [min(max(value, -term.clip), term.clip) for value in raw]
    if not term.normalise or distributed.all_sum([len(values)]) == [0.0]:
        return values
    term.moments.update(values, distributed.all_sum)
    mean, std = term.moments.mean, max(term.moments.std, _LEAST_STD)
    return [(value - mean) / std for value in values]


def checked(name: str, values: Sequence[Any], rollouts: Sequence[Rollout]) -> list[float]:
    """The values of a term as floats. Raises UserError naming term and prompt unless there is one
    finite number for each response.
    """
    if len(values) != len(rollouts):
        first = ""
        if rollouts:
            first = f"; the first response is to {name_prompt(rollouts[0])}"
        raise UserError(
            f"reward.terms.{name}: expected {len(rollouts)} scores, one per response, found "
            f"{len(values)}{first}."
        )
    for value, rollout in zip(values, rollouts, strict=True):
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise NonFiniteScore(
                f"reward.terms.{name}: returned {value!r} for {name_prompt(rollout)}; expected a "
                "finite number."
            )
    return [float(value) for value in values]
