"""A trial while it runs: the processes of its stages, one after the other, and how it ended."""

import fcntl
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.launch.children import Child, Command, read_failure
from rlhf.process.files import json_object
from rlhf.run.directory import SUMMARY_FILE
from rlhf.run.tracking.files import METRICS_FILE
from rlhf.search.commands import StageRun
from rlhf.search.following import Follower
from rlhf.search.trials import Trial
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.search")
LOCK, FAILURE = "process.lock", "failure.json"
_RESUME = "run.resume=true"
_POLL_S = 0.1
_LONGEST = 500  # characters of a reason

# Takes a step and the value of the metric that is compared; returns whether the trial is to stop.
Report = Callable[[int, float], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """What a worker has of the machine."""

    number: int
    cores: frozenset[int] | None = None  # None: any
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a trial ended: with the metrics of its stages, stopped as behind, or with a reason."""

    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by stage
    is_pruned: bool = False
    reason: str = ""  # of a failure
    is_refused: bool = False  # it failed before its first step, since something was wrong with it
    steps: int | None = None

    @property
    def failed(self) -> bool:
        return bool(self.reason)


class Running:
    """A trial that runs."""

    def __init__(
        self,
        trial: Trial,
        stages: Sequence[StageRun],
        slot: Slot,
        metric: str | None,
        grace_s: float,
    ) -> None:
        """`metric`: of the first stage, what is reported; `grace_s`: from SIGTERM to the kill."""
        self.trial, self.stages, self.slot = trial, stages, slot
        self.metric, self.grace_s = metric, grace_s
        self.folder = stages[0].directory.parent
        self._place = 0  # of the stage that runs
        self._child: Child | None = None  # None: an earlier search saw the stage end
        self._follower = Follower(Path(), None)
        self._steps: int | None = None
        self._is_pruned = False
        self._deadline: float | None = None
        self._begin_stage()

    # ---- stages ----

    @property
    def _stage(self) -> StageRun:
        return self.stages[self._place]

    def _begin_stage(self) -> None:
        """Start the stage, or go on with what a search before this one left of it."""
        stage = self._stage
        compared = self.metric if self._place == 0 else None
        self._follower = Follower(stage.directory / METRICS_FILE, compared)
        self._child = None
        self.folder.mkdir(parents=True, exist_ok=True)
        await_end(self.folder / LOCK, self.grace_s)
        if (stage.directory / SUMMARY_FILE).is_file():
            return
        command = list(stage.command)
        if stage.directory.is_dir() and any(stage.directory.iterdir()):
            command.append(_RESUME)
        self._child = Child.start(
            Command(
                name=f"trial {self.trial.number}",
                arguments=command,
                environment=self.slot.environment,
                cores=self.slot.cores,
                log=self.folder / f"{stage.stage}.log",
                error_file=self.folder / FAILURE,
                lock=self.folder / LOCK,
            )
        )
        (self.folder / LOCK).write_text(str(self._child.process.pid), encoding="utf-8")

    def look(self, report: Report) -> Outcome | None:
        """Read what is new, and see whether the trial has ended: None while it runs."""
        # whether it has ended is asked first: its last lines are there by then
        has_ended = self._child is None or self._child.look()
        for step, value in self._follower.values():
            if not self._is_pruned and report(step, value):
                self._is_pruned = True
                self.stop()
        if self._place == 0:
            self._steps = self._follower.step
        if not has_ended:
            self._kill_when_due()
            return None
        return self._ended()

    def stop(self) -> None:
        """Ask the trial to save and end."""
        if self._child is not None and self._deadline is None:
            self._child.tell(signal.SIGTERM)
            self._deadline = time.monotonic() + self.grace_s

    def has_stopped(self) -> bool:
        """Whether it has ended since `stop`; it is killed once its time is up."""
        if self._child is None or self._child.look():
            return True
        self._kill_when_due()
        return False

    def _kill_when_due(self) -> None:
        if self._child is None or self._deadline is None or time.monotonic() < self._deadline:
            return
        shown = self.trial.number, self.grace_s
        LOG.warning("trial %d runs on %g s after SIGTERM, and is killed.", *shown)
        self._child.kill()

    def kill(self) -> None:
        """End it now."""
        if self._child is not None:
            self._child.kill()

    # ---- its end ----

    def _ended(self) -> Outcome | None:
        """The outcome; None where another stage follows, which is started."""
        if self._is_pruned:
            return Outcome(is_pruned=True, steps=self._steps)
        problem = self._problem()
        if problem is not None:
            return problem
        if self._place + 1 < len(self.stages):
            self._place += 1
            self._begin_stage()
            return None
        metrics = {stage.stage: _metrics(stage.directory) for stage in self.stages}
        return Outcome(metrics=metrics, steps=self._steps)

    def _problem(self) -> Outcome | None:
        """The failure of the stage that has ended; None where there was none."""
        stage, child = self._stage, self._child
        if child is not None and child.code != 0:
            recorded = read_failure(self.folder / FAILURE)
            refused = recorded.startswith("error:") and self._follower.step is None
            reason = _shortened(child.failure())
            return Outcome(
                reason=f"stage={stage.stage}: {reason}", is_refused=refused, steps=self._steps
            )
        if not (stage.directory / SUMMARY_FILE).is_file():
            reason = f"stage={stage.stage} ended without {SUMMARY_FILE} in {stage.directory}"
            return Outcome(reason=reason, steps=self._steps)
        return None


def _metrics(directory: Path) -> dict[str, Any]:
    """The metrics of a finished run. Raises UserError for a damaged summary."""
    summary = json_object(directory / SUMMARY_FILE, "the trial's values are not known")
    metrics: dict[str, Any] = summary.get("metrics") or {}
    return metrics


def _shortened(text: str) -> str:
    """A failure in one line: a traceback's last, a message's first ones."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return "no message"
    shown = lines[-1] if lines[0].startswith("Traceback") else " ".join(lines)
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."


# ---- what an ended search left ----


def await_end(lock: Path, grace_s: float) -> None:
    """Wait until no process of a trial holds `lock`: the process of a search that was killed may
    still save. It is asked to end, and killed after `grace_s` seconds. Raises UserError where it
    lives on.
    """
    deadline = time.monotonic() + grace_s
    asked = killed = False
    while is_held(lock):
        if not asked:
            LOG.warning(
                "%s: a process of an ended search is still at it; it is asked to end.", lock
            )
            asked = _signal(lock, signal.SIGTERM)
        elif not killed and time.monotonic() > deadline:
            killed = _signal(lock, signal.SIGKILL)
        elif time.monotonic() > deadline + grace_s:
            raise UserError(
                f"{lock}: a process of an ended search holds it, and doesn't end. End it first."
            )
        time.sleep(_POLL_S)


def is_held(lock: Path) -> bool:
    try:
        with lock.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _signal(lock: Path, number: int) -> bool:
    """Send a signal to the process that holds `lock`, whose number the file has. Returns True."""
    with suppress(ValueError, ProcessLookupError, PermissionError):
        os.kill(int(lock.read_text(encoding="utf-8")), number)
    return True
