"""The search itself: trials are started while there are workers, looked at while they run, and told
to the study when they end.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlhf.process.supervision import Stopping
from rlhf.search.commands import StageRun
from rlhf.search.running import Outcome, Running, Slot
from rlhf.search.study import Study
from rlhf.search.trials import State, Trial
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.search")
_POLL_S = 0.1
_GO_ON = "run.resume=true goes on with it."


class Makes(Protocol):
    """What knows the commands of trials."""

    def stages(self, number: int, setting: Mapping[str, Any]) -> list[StageRun]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """Where an objective's value stands."""

    name: str
    metric: str
    stage: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How a search runs its trials."""

    goals: Sequence[Goal]
    trials: int  # in all
    slots: Sequence[Slot]
    compared: str | None = None  # the metric that says which trial is behind; None: none is
    failures: int | None = None  # failed trials that end the search
    grace_s: float = 60.0


@dataclass(slots=True)
class Search:
    """A search that runs."""

    study: Study
    commands: Makes
    rules: Rules
    finished: Callable[[], None]  # called after each trial's end
    _running: list[Running] = field(default_factory=list)
    _left: list[Trial] = field(default_factory=list)  # of a search before this one

    def run(self) -> int | None:
        """Run trials until there are enough. Returns None, or the signal that ended the search:
        its trials have saved then, and go on when it does.

        Raises UserError where nothing has worked yet and a trial refuses its configuration, and
        after too many failures.
        """
        self._left = self.study.running()
        with Stopping() as stopping:
            try:
                while self._is_going():
                    if stopping.received is not None:
                        self._end_all()
                        return stopping.received
                    time.sleep(_POLL_S)
            except BaseException:
                self._end_all()
                raise
        return None

    def _is_going(self) -> bool:
        """Start what can be started, and look at what runs. Returns whether there is more to do."""
        self._start()
        for running in list(self._running):
            outcome = running.look(self._reporter(running))
            if outcome is not None:
                self._running.remove(running)
                self._tell(running, outcome)
        return bool(self._running or self._left) or self._may_ask()

    def _may_ask(self) -> bool:
        return len(self.study.trials()) < self.rules.trials

    # ---- starting ----

    def _start(self) -> None:
        """A trial for each worker that has none. First those that an ended search left."""
        for slot in self._free():
            trial = self._next()
            if trial is None:
                return
            self._start_one(trial, slot)

    def _free(self) -> list[Slot]:
        busy = {running.slot.number for running in self._running}
        return [slot for slot in self.rules.slots if slot.number not in busy]

    def _next(self) -> Trial | None:
        if self._left:
            return self._left.pop(0)
        return self.study.ask() if self._may_ask() else None

    def _start_one(self, trial: Trial, slot: Slot) -> None:
        shown = ", ".join(f"{key}={value}" for key, value in trial.setting.items())
        LOG.info("trial %d: %s", trial.number, shown)
        try:
            stages = self.commands.stages(trial.number, trial.setting)
        except UserError as error:  # values that don't go together
            self.study.fail(trial.number, str(error))
            self._ended(trial.number)
            return
        rules = self.rules
        self._running.append(Running(trial, stages, slot, rules.compared, rules.grace_s))

    # ---- looking ----

    def _reporter(self, running: Running) -> Callable[[int, float], bool]:
        number = running.trial.number

        def report(step: int, value: float) -> bool:
            return self.study.report(number, step, value)

        return report

    # ---- ending ----

    def _tell(self, running: Running, outcome: Outcome) -> None:
        number = running.trial.number
        if outcome.is_pruned:
            self.study.prune(number, outcome.steps)
        elif outcome.failed:
            self._tell_failure(number, outcome)
        else:
            self._tell_values(number, outcome)
        self._ended(number)

    def _tell_failure(self, number: int, outcome: Outcome) -> None:
        """Raises UserError for a configuration that no trial could work with."""
        if outcome.is_refused and not self._has_succeeded():
            raise UserError(
                f"trial {number} could not start, and none has ended yet: {outcome.reason} Put it "
                f"right; {_GO_ON}"
            )
        self.study.fail(number, outcome.reason, outcome.steps)

    def _has_succeeded(self) -> bool:
        ended = (State.complete, State.pruned)
        return any(trial.state in ended for trial in self.study.trials())

    def _tell_values(self, number: int, outcome: Outcome) -> None:
        values = []
        for goal in self.rules.goals:
            metrics = outcome.metrics[goal.stage]
            if goal.metric not in metrics:
                self._refuse_metric(goal, metrics)
            value = metrics[goal.metric]
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                reason = f"{goal.metric} is no finite number: {value}"
                self.study.fail(number, reason, outcome.steps)
                return
            values.append(float(value))
        self.study.tell(number, values, outcome.steps)

    def _refuse_metric(self, goal: Goal, metrics: Mapping[str, Any]) -> None:
        names = ", ".join(sorted(metrics))
        raise UserError(
            f"stage.objectives.{goal.name}: stage={goal.stage} has no metric {goal.metric}. It "
            f"has: {names or 'none'}. Put it right; {_GO_ON}"
        )

    def _ended(self, number: int) -> None:
        """Raises UserError after too many failures."""
        trials = self.study.trials()
        trial = trials[number]
        shown = trial.reason or ", ".join(f"{value:.6g}" for value in trial.values)
        LOG.info("trial %d: %s, %s", number, trial.state.value, shown)
        self.finished()
        failed = [other for other in trials if other.state is State.failed]
        limit = self.rules.failures
        if limit is not None and len(failed) >= limit:
            raise UserError(
                f"stage.failures={limit}: {len(failed)} trials have failed, the last with: "
                f"{failed[-1].reason} Raise the limit to go on with run.resume=true."
            )

    def _end_all(self) -> None:
        """Ask the trials that run to save and end, and wait for them. They stay running in the
        study: a search that goes on takes them up.
        """
        for running in self._running:
            running.stop()
        while self._running:
            self._running = [each for each in self._running if not each.has_stopped()]
            if self._running:
                time.sleep(_POLL_S)
