"""Programs that take turns: all are loaded, one works at a time."""

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.speed.protocol import Figures, Worker, close_all
from rlhf.types import UserError

WARM_UP = 1  # turns of each program that are not counted
# Between turns: threads of the other program stop spinning; a server of vLLM's does for a second.
PAUSE_S = 1.2


@dataclass(frozen=True, slots=True)
class Contestant:
    """A program and what it is given."""

    module: str
    case: Path  # a file
    cores: str | None = None


def cores_here(count: int) -> list[str]:
    """The first `count` cores that this process may use. Raises UserError where there are fewer."""
    found = sorted(os.sched_getaffinity(0))
    if len(found) < count:
        raise UserError(f"this machine has {len(found)} cores, expected at least {count}")
    return [str(core) for core in found[:count]]


def take_turns(
    label: str, contestants: Mapping[str, Contestant], rounds: int, folder: Path
) -> dict[str, list[Figures]]:
    """Figures of the turns of each program, one after the other; the idle ones wait on a pipe.

    folder: for their logs.
    """
    workers: dict[str, Worker] = {}
    out: dict[str, list[Figures]] = {name: [] for name in contestants}
    try:
        for name, one in contestants.items():
            log = folder / f"{label}-{name}.log"
            workers[name] = Worker.start(one.module, one.case, log, one.cores)
        for number in range(WARM_UP + rounds):
            order = list(workers)
            if number % 2:  # so that a machine that grows slower favours nobody
                order.reverse()
            for name in order:
                time.sleep(PAUSE_S)
                figures = workers[name].step()
                if number >= WARM_UP:
                    out[name].append(figures)
                print(
                    f"  {label} {name:<6} {number - WARM_UP + 1:>2}  {figures['step_s']:.3f} s",
                    file=sys.stderr,
                    flush=True,
                )
    finally:
        close_all(workers.values())
    return out
