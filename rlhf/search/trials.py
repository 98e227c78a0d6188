"""Trials as the search knows them, what a search does with them, and which are the best of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from conf.methods import Direction, PruneConfig, Sampler
from rlhf.search.space import Parameter


class State(Enum):
    """How a trial stands."""

    running = "running"
    complete = "complete"
    pruned = "pruned"
    failed = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A trial: its setting, and what came of it."""

    number: int
    state: State
    setting: Mapping[str, Any]  # values by option
    values: tuple[float, ...] = ()  # of the objectives, in their order; only of complete trials
    last: float | None = None  # a pruned trial's last value of the metric that is compared
    reason: str = ""  # of a failure, or of a stop
    steps: int | None = None  # that it trained
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a search does, apart from how its trials run."""

    parameters: Sequence[Parameter]
    directions: Mapping[str, Direction]  # by the objectives' names
    seed: int
    sampler: Sampler = Sampler.tpe
    startup: int = 10
    prune: PruneConfig = field(default_factory=PruneConfig)
    facts: Mapping[str, Any] = field(default_factory=dict)  # what else must not change in between

    def identity(self) -> dict[str, Any]:
        """What a search that goes on must have in common with its beginning, as JSON holds it."""
        space = [_identity(parameter) for parameter in self.parameters]
        directions = [[name, direction.value] for name, direction in self.directions.items()]
        rule = {"kind": self.prune.kind.value, "metric": self.prune.metric}
        plain = {
            "space": space,
            "objectives": directions,
            "sampler": self.sampler.value,
            "seed": self.seed,
            "prune": rule,
            **self.facts,
        }
        copied: dict[str, Any] = json.loads(json.dumps(plain))
        return copied


def _identity(parameter: Parameter) -> dict[str, Any]:
    return {
        "option": parameter.key,
        "range": [parameter.low, parameter.high, parameter.log, parameter.step],
        "choices": list(parameter.labels),
        "when": {key: list(values) for key, values in parameter.when.items()},
    }


def pareto_front(
    ordered: Sequence[Trial], losses: Callable[[Trial], tuple[float, ...]]
) -> list[Trial]:
    """Of trials in the order of their losses those that no other is at least as good as in all
    objectives and better in one. Of equal trials the first.
    """
    front: list[Trial] = []
    for trial in ordered:
        own = losses(trial)
        if not any(_covers(losses(other), own) for other in front):
            front.append(trial)
    return front


def _covers(left: Sequence[float], right: Sequence[float]) -> bool:
    return all(one <= other for one, other in zip(left, right, strict=True))
