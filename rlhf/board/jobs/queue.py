"""The queue: a CUDA device has one job at a time; a machine without one has as many as
`stage.at_once` says. Whoever finds room starts the next job: the board, or the supervisor of a job
that has ended.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf.board.jobs.records import (
    CANT_START,
    CLAIM_FILE,
    EXIT_FILE,
    OUTPUT_FILE,
    Job,
    load_all,
    read,
    write,
)
from rlhf.process.files import exclusive

CPU, CUDA, ALL_CUDA = "cpu", "cuda", "cuda:all"
LOCK_FILE = ".lock"  # of the queue, and of each job
SETTINGS_FILE = "settings.json"
TAKEN = 3  # exit code of a supervisor whose job another one has
SUPERVISOR = "rlhf.board.jobs.supervisor"
_LOG = "supervisor.txt"  # what a supervisor says when it fails itself
_WAIT_S = 30.0  # for a supervisor's first word; Python starts in a fraction of that
_LOOK_S = 0.02
# Launchers that give each process devices of their own, and those that start nothing here.
_OF_SEVERAL, _ELSEWHERE = ("local", "torchrun"), ("slurm", "ray")


def device_for(argv: Sequence[str], devices: Sequence[str]) -> str:
    """What a job needs of the CUDA `devices` of this machine: one, all, or none."""
    launch = "none"
    for argument in argv:
        key, _, value = argument.partition("=")
        if key.lstrip("+") in ("launch", "launch.kind"):
            launch = value
    if not devices or launch in _ELSEWHERE:
        return CPU
    return ALL_CUDA if launch in _OF_SEVERAL else CUDA


def startable(
    jobs: Sequence[Job], devices: Sequence[str], at_once: int
) -> Iterator[tuple[Job, str]]:
    """The queued among `jobs` (the oldest first) for which there is room, and their devices."""
    busy = [job.device for job in jobs if job.state in ("running", "stopping")]
    room = at_once - busy.count(CPU)
    free = [] if ALL_CUDA in busy else [name for name in devices if f"cuda:{name}" not in busy]
    for job in jobs:
        if job.state != "queued":
            continue
        if job.device == CPU:
            if room > 0:
                yield job, CPU
            room -= 1
        elif job.device == ALL_CUDA:
            if len(free) == len(devices):
                yield job, ALL_CUDA
            free = []  # they are its own, or are kept for it
        elif free:
            yield job, f"cuda:{free.pop(0)}"


def start_waiting(folder: Path) -> None:
    """Start the queued jobs in `folder`, that of all jobs, for which there is room."""
    with exclusive(folder / LOCK_FILE, _nothing):
        settings = read(folder, SETTINGS_FILE) or {"at_once": 1, "devices": []}
        jobs = sorted(load_all(folder), key=lambda job: job.created)
        for job, device in list(startable(jobs, settings["devices"], settings["at_once"])):
            _start(job, device)


def _nothing() -> None:
    """Waiting for the lock needs no care: it is held for moments."""


def _start(job: Job, device: str) -> None:
    """Start a job's supervisor, and wait until it has the job. The queue's lock is held, so nobody
    starts another.
    """
    command = [sys.executable, "-m", SUPERVISOR, str(job.folder), device]
    try:
        with (job.folder / _LOG).open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=job.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
    except OSError as error:
        fail(job.folder, f"{job.cwd}: {error}")
        return
    # asks for the exit code, so that no dead process stays in the table
    threading.Thread(target=process.wait, name="reaper", daemon=True).start()
    until = time.monotonic() + _WAIT_S
    while read(job.folder, CLAIM_FILE) is None and time.monotonic() < until:
        code = process.poll()
        if code is not None and code != TAKEN and read(job.folder, CLAIM_FILE) is None:
            said = (job.folder / _LOG).read_text(encoding="utf-8", errors="replace")
            fail(job.folder, said or f"the supervisor ended with exit code {code}")
        if code is not None:
            return
        time.sleep(_LOOK_S)


def fail(folder: Path, problem: str) -> None:
    """Record that a job could not be started."""
    with (folder / OUTPUT_FILE).open("a", encoding="utf-8") as output:
        output.write(f"error: the job could not be started: {problem}\n")
    write(folder, EXIT_FILE, {"exit_code": CANT_START, "ended": time.time()})
