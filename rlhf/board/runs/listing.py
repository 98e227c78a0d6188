"""The runs of run.dir with their stages: state, steps, newest figures, time. A list reads the end
of each metrics.jsonl, and of unchanged files nothing.
"""

import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.board.app import Place
from rlhf.board.jobs.processes import writing
from rlhf.board.jobs.store import Job
from rlhf.board.paths import lies_inside, run_directories, run_link
from rlhf.board.runs.cache import FileCache
from rlhf.board.runs.metrics import Newest, newest
from rlhf.run.console import HEADLINES
from rlhf.run.directory import SUMMARY_FILE
from rlhf.run.tracking.files import METRICS_FILE

State = Literal["queued", "running", "stopping", "ended", "failed", "stopped", "lost"]
LIVE: tuple[State, ...] = ("queued", "running", "stopping")
# How a state looks beside its word: classes of board.css.
LOOKS: dict[State, str] = {
    "queued": "busy",
    "running": "busy",
    "stopping": "busy",
    "ended": "good",
    "failed": "warn",
    "stopped": "",
    "lost": "warn",
}
_LOOK_EVERY_S = 1.0  # at the files that processes have open
_MOST = 5000  # files whose end is kept


@dataclass(frozen=True, slots=True)
class Stage:
    """A run directory, or one that a queued job will make."""

    run: str
    stage: str
    folder: Path
    state: State
    job: Job | None  # the newest of the board's
    newest: Newest
    summary: Mapping[str, Any] | None  # None: it has not ended
    changed: float  # seconds since the epoch: when its files last changed

    @property
    def link(self) -> str:
        """The path of its page."""
        return run_link(self.run, self.stage)

    @property
    def id(self) -> str:
        """Run and stage in one text, as forms send them."""
        return f"{self.run}/{self.stage}"

    @property
    def is_live(self) -> bool:
        """Whether it waits or runs."""
        return self.state in LIVE

    @property
    def steps(self) -> int | None:
        """Steps done, as far as is known."""
        if self.summary is not None and isinstance(self.summary.get("steps"), int):
            return int(self.summary["steps"])
        return self.newest.step

    @property
    def seconds(self) -> float | None:
        """Wall time that it took so far."""
        wall = None if self.summary is None else self.summary.get("wall_s")
        return wall if isinstance(wall, (int, float)) else self.newest.time_s

    def headlines(self) -> list[tuple[str, float]]:
        """The few figures that a list shows: the label in `HEADLINES`, and the newest value."""
        out = []
        for label, names in HEADLINES:
            name = next((name for name in names if name in self.newest.figures), None)
            if name is not None:
                out.append((label, self.newest.figures[name]))
        return out


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _newest(path: Path) -> Newest:
    try:
        return newest(path)
    except OSError:  # it went while the list was made
        return Newest()


class Runs:
    """What there is in the run.dir of `place`."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._ends = FileCache(_newest, _MOST)
        self._objects = FileCache(_json, _MOST)
        self._lock = threading.Lock()
        self._written: tuple[float, set[Path]] = (0.0, set())

    def stages(self) -> list[Stage]:
        """All stages of all runs, those that changed last first."""
        jobs: dict[tuple[str, str], Job] = {}
        for job in reversed(self._place.jobs.jobs()):
            if job.run is not None and job.stage is not None:
                jobs[job.run, job.stage] = job
        found = {}
        for run, stage, folder in run_directories(self._place.runs):
            found[run, stage] = self._stage(run, stage, folder, jobs.get((run, stage)))
        for (run, stage), job in jobs.items():
            if (run, stage) not in found and job.is_active:
                folder = self._place.runs / run / stage
                found[run, stage] = self._stage(run, stage, folder, job)
        return sorted(found.values(), key=lambda stage: stage.changed, reverse=True)

    def stage(self, run: str, stage: str, folder: Path) -> Stage:
        """One stage, by its checked folder, which a queued job has not made yet."""
        return self._stage(run, stage, folder, self._place.jobs.of_run(run, stage))

    def object(self, path: Path) -> dict[str, Any] | None:
        """The object in a JSON file of a run; None where there is none."""
        return self._objects.get(path)

    def _stage(self, run: str, stage: str, folder: Path, job: Job | None) -> Stage:
        metrics = folder / METRICS_FILE
        end = self._ends.get(metrics) if lies_inside(metrics, self._place.runs) else None
        summary = None
        if lies_inside(folder / SUMMARY_FILE, self._place.runs):
            summary = self._objects.get(folder / SUMMARY_FILE)
        state: State = "stopped"
        if job is not None and job.is_active:
            state = job.state
        elif metrics.resolve() in self._open_files():
            state = "running"
        elif summary is not None:
            state = "ended"
        elif job is not None:
            state = job.state
        changed = max(map(_time_of, (folder, metrics, folder / SUMMARY_FILE)))
        if job is not None:
            changed = max(changed, job.created)
        return Stage(run, stage, folder, state, job, end or Newest(), summary, changed)

    def _open_files(self) -> set[Path]:
        """Each metrics.jsonl that a process of this machine writes: a run keeps its own open from
        its start to its end, whoever started it.
        """
        with self._lock:
            at, held = self._written
            if time.monotonic() - at > _LOOK_EVERY_S:
                held = writing(METRICS_FILE)
                self._written = (time.monotonic(), held)
            return held


def _time_of(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def search(stages: Sequence[Stage], words: str, names: Mapping[State, str]) -> list[Stage]:
    """The stages in whose run, stage or state each of the words stands. names: the states as the
    reader knows them.
    """
    wanted = words.casefold().split()
    out = []
    for stage in stages:
        text = f"{stage.run} {stage.stage} {stage.state} {names.get(stage.state, '')}".casefold()
        if all(word in text for word in wanted):
            out.append(stage)
    return out
