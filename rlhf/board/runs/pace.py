"""How long a run takes: before its start as an earlier run of the same stage took with a model of
the same size on this machine, and while it runs as its own steps so far took.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.board.jobs.store import Job
from rlhf.board.runs.metrics import newest, row_of
from rlhf.run.tracking.files import METRICS_FILE

# What two runs have in common where one tells of the other.
_LIKE = ("stage", "parameters", "machine")


@dataclass(frozen=True, slots=True)
class Estimate:
    """How long a run may take, and the run that says so."""

    seconds: float
    steps: int
    rows: int  # of a step
    other: Job
    other_pace: float  # seconds a step
    other_rows: int


def work_of(facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a job has to do, from the facts of its dry run; None where that isn't known."""
    work = facts.get("work")
    if not isinstance(work, dict) or not work.get("parameters"):
        return None
    return {**work, "machine": platform.node()}


def estimate(work: Mapping[str, Any], jobs: Sequence[Job], runs: Path) -> Estimate | None:
    """As the newest run that is like it; None where there is none. jobs: the newest first."""
    seen = set()
    for job in jobs:
        if job.run is None or job.stage is None or (job.run, job.stage) in seen:
            continue  # of several jobs at a run directory its metrics are the newest's
        seen.add((job.run, job.stage))
        other = job.work
        if other is None or any(other.get(name) != work[name] for name in _LIKE):
            continue
        pace = seconds_a_step(runs / job.run / job.stage / METRICS_FILE)
        if pace is not None:
            seconds = work["steps"] * pace * work["rows"] / other["rows"]
            return Estimate(seconds, work["steps"], work["rows"], job, pace, other["rows"])
    return None


def left(work: Mapping[str, Any], metrics: Path) -> float | None:
    """Seconds until a run has done its steps; None before its second step."""
    pace = seconds_a_step(metrics)
    if pace is None:
        return None
    step = newest(metrics).step or 0
    return max(0.0, (work["steps"] - step) * pace)


def seconds_a_step(metrics: Path) -> float | None:
    """Wall time of a step from the first to the last line, evaluations included; None before the
    second step.
    """
    try:
        with metrics.open("rb") as file:
            first = row_of(file.readline())
        last = newest(metrics)
    except OSError:
        return None
    if first is None or last.step is None or last.time_s is None or last.step <= first["step"]:
        return None
    start = first.get("time_s")
    if not isinstance(start, (int, float)) or last.time_s <= start:
        return None
    return (last.time_s - start) / (last.step - first["step"])
