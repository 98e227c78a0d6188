"""What the folder of a job holds, and what follows from it.

    job.json         what was asked: written before the folder has its name, never changed
    supervisor.json  the supervisor's number, start and device: the job was begun
    process.json     the run's number and start: its first process
    stop.json        somebody asked it to stop
    exit.json        its exit code, and when it ended
    secrets.json     what its environment holds that nobody else may read: gone once it was begun
    output.txt       what it printed

Each is written beside its name and renamed, so a reader sees a whole file or none. The state
follows from which of them there are and from whether the processes live: nothing has to be put
right after a kill or a reboot.
"""

import json
import os
import secrets
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.board.jobs.processes import is_alive, start_mark

JOB_FILE, CLAIM_FILE, PROCESS_FILE = "job.json", "supervisor.json", "process.json"
STOP_FILE, EXIT_FILE, OUTPUT_FILE = "stop.json", "exit.json", "output.txt"
SECRETS_FILE = "secrets.json"
CANT_START = 127  # exit code of what could not be started, as a shell has it
# Exit codes of a run that a signal ended; one that saved first ends with the same.
_BY_SIGNAL = (128 + signal.SIGINT, 128 + signal.SIGTERM)

State = Literal["queued", "running", "stopping", "ended", "failed", "stopped", "lost"]
ACTIVE: tuple[State, ...] = ("queued", "running", "stopping")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as its folder has it now."""

    id: str
    argv: tuple[str, ...]  # what follows `python -m rlhf`
    title: str
    run: str | None
    stage: str | None
    cwd: str
    # "cpu"; of CUDA "cuda" for any one, "cuda:all", or once it was begun the one it has, "cuda:1"
    device: str
    state: State
    pid: int | None  # of the run, while it lives
    created: float
    started: float | None
    ended: float | None
    exit_code: int | None  # of a run that a signal killed: 128 and the signal's number
    folder: Path
    work: Mapping[str, Any] | None = None  # as rlhf/board/runs/pace.py has it

    @property
    def is_active(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ACTIVE


def write(folder: Path, name: str, content: Mapping[str, Any], mode: int = 0o666) -> None:
    """Write a file of a job whole or not at all."""
    beside = folder / f".{name}.{secrets.token_hex(4)}"
    descriptor = os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, ensure_ascii=False) + "\n")
    os.replace(beside, folder / name)


def read(folder: Path, name: str) -> dict[str, Any] | None:
    """A file of a job; None where there is none."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def this_process(pid: int) -> dict[str, Any]:
    """The number of a process that runs, and what tells it from others with that number."""
    return {"pid": pid, "start": start_mark(pid)}


def lives(process: Mapping[str, Any] | None) -> bool:
    """Whether the process that `this_process` described still runs."""
    if process is None or process.get("start") is None:
        return False
    return is_alive(process["pid"], process["start"])


def load(folder: Path) -> Job | None:
    """The job in a folder; None where the folder is none."""
    asked = read(folder, JOB_FILE)
    if asked is None:
        return None
    claim, process = read(folder, CLAIM_FILE), read(folder, PROCESS_FILE)
    end = read(folder, EXIT_FILE)
    run_lives = end is None and lives(process)
    someone_lives = run_lives or (end is None and lives(claim))
    if end is None and claim is not None and not someone_lives:
        # It may have ended between the two looks, and then its last act was to say so.
        end = read(folder, EXIT_FILE)
    return Job(
        id=folder.name,
        argv=tuple(asked["argv"]),
        title=asked["title"],
        run=asked["run"],
        stage=asked["stage"],
        cwd=asked["cwd"],
        device=(claim or asked)["device"],
        state=_state(folder, claim is not None, someone_lives, end),
        pid=process["pid"] if process is not None and run_lives else None,
        created=asked["created"],
        started=process["started"] if process is not None else None,
        ended=end["ended"] if end is not None else None,
        exit_code=end["exit_code"] if end is not None else None,
        folder=folder,
        work=asked.get("work"),
    )


def _state(folder: Path, begun: bool, lives_on: bool, end: Mapping[str, Any] | None) -> State:
    asked_to_stop = (folder / STOP_FILE).is_file()
    if end is not None:
        if end["exit_code"] == 0:
            return "ended"
        by_signal = end["exit_code"] in _BY_SIGNAL
        return "stopped" if asked_to_stop or by_signal else "failed"
    if lives_on:
        return "stopping" if asked_to_stop else "running"
    return "lost" if begun else "queued"


def load_all(folder: Path) -> Iterator[Job]:
    """The jobs in the folder of all jobs, the oldest first."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        job = load(path) if path.is_dir() and not path.name.startswith(".") else None
        if job is not None:
            yield job
