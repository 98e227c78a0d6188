"""How the gateway stands, for its operator."""

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlhf.gateway import keeping, trial
from rlhf.gateway.arms import Arms
from rlhf.gateway.store import Store


@dataclass(frozen=True, slots=True)
class State:
    """The arms, the test between them, and what was counted."""

    epoch: int
    arms: Mapping[str, Mapping[str, Any]]  # version, address, share by name
    standings: tuple[trial.Standing, ...]
    comparisons: tuple[trial.Comparison, ...]
    figures: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def state_of(store: Store, arms: Arms, alpha: float) -> State:
    """The state now. A test that is decided is kept as decided."""
    store.submit(lambda db: None).result()  # what waits to be written is in it
    epoch, now, shares = arms.epoch, dict(arms.arms), arms.shares
    outcomes = store.read(lambda db: keeping.outcomes(db, epoch))
    compared = trial.comparisons(outcomes, list(now), alpha) if len(now) > 1 else []
    for found in compared:
        if found.stopped is not None:
            text = _sentence(found, {name: arm.label for name, arm in now.items()})
            store.submit(functools.partial(_decide, epoch, found.b, text)).result()
    shown = {
        name: {"version": arm.label, "address": arm.address, "share": shares[name]}
        for name, arm in now.items()
    }
    figures = store.read(lambda db: keeping.figures(db, epoch))
    standings = tuple(trial.standings(outcomes, list(now), alpha))
    return State(epoch, shown, standings, tuple(compared), figures)


def _decide(epoch: int, b: str, text: str, db: keeping.Db) -> None:
    keeping.decide(db, epoch, b, text)


def _sentence(found: trial.Comparison, labels: Mapping[str, str]) -> str:
    better, worse = found.b, found.a
    if found.decision.startswith("a"):
        better, worse = found.a, found.b
    return (
        f"{better} ({labels[better]}) is better than {worse} ({labels[worse]}): decided after "
        f"{found.stopped} users, at alpha {found.alpha:g}"
    )
