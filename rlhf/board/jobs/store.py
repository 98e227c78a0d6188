"""All jobs of a run.dir: asking for one, finding them again, stopping them, reading their output.

Nothing is kept in memory that counts: any board with the same run.dir sees the same jobs.
"""

import os
import re
import secrets
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf.board import OWN
from rlhf.board.jobs.processes import kill_session, memory_mib
from rlhf.board.jobs.queue import LOCK_FILE, SETTINGS_FILE, device_for, start_waiting
from rlhf.board.jobs.records import (
    EXIT_FILE,
    JOB_FILE,
    OUTPUT_FILE,
    PROCESS_FILE,
    SECRETS_FILE,
    STOP_FILE,
    Job,
    lives,
    load,
    read,
    write,
)
from rlhf.process.devices import visible_devices
from rlhf.process.files import exclusive
from rlhf.types import UserError

__all__ = ["Job", "Jobs"]

FOLDER = Path(OWN) / "jobs"  # in run.dir
_AT_MOST = 1 << 20  # bytes of output that one call gives
_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{8}")


class Jobs:
    """The jobs of one run.dir."""

    def __init__(self, runs: Path, at_once: int = 1) -> None:
        """runs: run.dir, absolute; at_once: runs at a time where there is no CUDA device."""
        self.runs, self.folder = runs, runs / FOLDER
        self._at_once = at_once
        self._devices: list[str] | None = None  # asked for once: nvidia-smi takes its time
        self._over: dict[str, Job] = {}  # those that have ended: they don't change any more

    def submit(
        self,
        argv: Sequence[str],
        *,
        title: str,
        run: str | None,
        stage: str | None,
        work: Mapping[str, Any] | None = None,
        secret: Mapping[str, str] | None = None,
    ) -> Job:
        """Queue ``python -m rlhf *argv`` and start what there is room for. run, stage: the run
        directory that it will write, None for none. work: what it has to do, where that is known.
        secret: environment variables that stand in no command and no output.

        Raises UserError where a job is at that run directory already.
        """
        devices = self._prepared()
        created = time.time()
        name = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(created))}-{secrets.token_hex(4)}"
        content = {
            "argv": list(argv),
            "title": title,
            "run": run,
            "stage": stage,
            "cwd": os.getcwd(),
            "device": device_for(argv, devices),
            "created": created,
            "work": work,
        }
        with exclusive(self.folder / LOCK_FILE, _nothing):
            there = None if run is None or stage is None else self.of_run(run, stage)
            if there is not None and there.is_active:
                raise UserError(
                    f"run.name={run} stage={stage}: a job is at it already ({there.title}). Stop "
                    "it first, or choose another run.name."
                )
            beside = self.folder / f".{name}"
            beside.mkdir()
            write(beside, JOB_FILE, content)
            if secret:
                write(beside, SECRETS_FILE, secret, mode=0o600)
            beside.rename(self.folder / name)
        start_waiting(self.folder)
        return self.job(name)

    def go_on(self) -> None:
        """Start queued jobs for which there is room, where no supervisor is left to do so."""
        if self.folder.is_dir():
            self._prepared()
            start_waiting(self.folder)

    def jobs(self) -> list[Job]:
        """All jobs, the newest first."""
        if not self.folder.is_dir():
            return []
        found = []
        for path in self.folder.iterdir():
            job = self._load(path.name) if _ID.fullmatch(path.name) else None
            if job is not None:
                found.append(job)
        return sorted(found, key=lambda job: job.created, reverse=True)

    def job(self, id: str) -> Job:
        """The job `id`. Raises KeyError where there is none."""
        job = self._load(id) if _ID.fullmatch(id) else None
        if job is None:
            raise KeyError(id)
        return job

    def _load(self, id: str) -> Job | None:
        if id in self._over:
            return self._over[id]
        job = load(self.folder / id)
        if job is not None and job.ended is not None:
            self._over[id] = job
        return job

    def of_run(self, run: str, stage: str) -> Job | None:
        """The newest job of a run directory; None where the board started none."""
        return next((job for job in self.jobs() if (job.run, job.stage) == (run, stage)), None)

    def stop(self, id: str) -> None:
        """Ask a job to end: a queued one never starts, a run saves after its step and ends. Asking
        again changes nothing, since a run takes a second signal for "at once". Raises KeyError.
        """
        if self._cancelled(id) or (self.job(id).folder / STOP_FILE).is_file():
            return
        folder = self.job(id).folder
        write(folder, STOP_FILE, {"asked": time.time()})
        process = read(folder, PROCESS_FILE)
        if process is not None and lives(process):
            with suppress(ProcessLookupError):
                os.kill(process["pid"], signal.SIGTERM)

    def kill(self, id: str) -> None:
        """End a job at once, with all processes of its session; what was not saved is lost. Raises
        KeyError.
        """
        if self._cancelled(id):
            return
        folder = self.job(id).folder
        write(folder, STOP_FILE, {"asked": time.time(), "at_once": True})
        process = read(folder, PROCESS_FILE)
        if process is not None and lives(process):
            kill_session(process["pid"])

    def _cancelled(self, id: str) -> bool:
        """Whether the job is over before it began, now that it was stopped in the queue."""
        with exclusive(self.folder / LOCK_FILE, _nothing):
            job = self.job(id)
            if job.state == "queued":
                write(job.folder, STOP_FILE, {"asked": time.time()})
                write(job.folder, EXIT_FILE, {"exit_code": None, "ended": time.time()})
            return job.state == "queued" or not job.is_active

    def over(self) -> list[Job]:
        """Those that have ended and that no run's page shows: of runs that are gone or were begun
        again since, and of none; the newest first.
        """
        shown, found = set(), []
        for job in self.jobs():
            at = (job.run, job.stage)
            newest = job.run is not None and job.stage is not None and at not in shown
            shown.add(at)
            if newest and (self.runs / str(job.run) / str(job.stage)).is_dir():
                continue
            if not job.is_active:
                found.append(job)
        return found

    def forget(self, jobs: Sequence[Job]) -> None:
        """Delete what is known of jobs that have ended: what was asked, and what they printed."""
        for job in jobs:
            with exclusive(self.folder / LOCK_FILE, _nothing):
                if self._load(job.id) is None or self.job(job.id).is_active:
                    continue
                going = job.folder.rename(self.folder / f".{job.id}.going")
            self._over.pop(job.id, None)
            shutil.rmtree(going)

    def output(self, id: str, start: int) -> tuple[bytes, int]:
        """What a job printed from byte `start` on, at most 1 MiB of it, and where the next part
        starts. A negative `start` counts from the end. Raises KeyError.
        """
        path = self.job(id).folder / OUTPUT_FILE
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                at = max(0, size + start) if start < 0 else min(start, size)
                file.seek(at)
                part = file.read(_AT_MOST)
        except FileNotFoundError:
            return b"", 0
        return part, at + len(part)

    def memory_mib(self, job: Job) -> float | None:
        """What all processes of a running job hold now, in MiB; None where none runs."""
        return memory_mib(job.pid) if job.pid is not None else None

    def _prepared(self) -> list[str]:
        """The CUDA devices, now that the folder is there and knows how many jobs may run."""
        if self._devices is None:
            self._devices = visible_devices()
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = {"at_once": self._at_once, "devices": self._devices}
        if read(self.folder, SETTINGS_FILE) != settings:
            write(self.folder, SETTINGS_FILE, settings)
        return self._devices


def _nothing() -> None:
    """Waiting for the lock needs no care: it is held for moments."""
