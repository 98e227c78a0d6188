"""A worker takes one turn for each line that it reads and answers with the turn's figures, so that
several of them can take turns.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.shared import environment, module, one_thread, pinned

Figures = dict[str, float]


def serve(step: Callable[[], Figures], ready: Figures | None = None) -> None:
    """Worker: say that everything is loaded, then step on demand until the other end closes. The
    pipe's numbers are the last two arguments.
    """
    reader, writer = os.fdopen(int(sys.argv[-2]), "r"), os.fdopen(int(sys.argv[-1]), "w")
    answer: Figures | None = ready or {}
    while True:
        print(json.dumps(answer), file=writer, flush=True)
        if reader.readline().strip() != "step":
            return
        answer = step() | {
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        }


@dataclass(slots=True)
class Worker:
    """The parent's end."""

    process: subprocess.Popen[bytes]
    reader: IO[str]
    writer: IO[str]
    log: Path

    @staticmethod
    def start(name: str, case: Path, log: Path, cores: str | None = None) -> "Worker":
        """Start `python -m name case` on `cores` and wait until it has loaded everything. Raises
        RuntimeError with its log's end when it dies.
        """
        to_read, child_write = os.pipe()
        child_read, to_write = os.pipe()
        command = module(name, str(case), str(child_read), str(child_write))
        with log.open("wb") as file:
            process = subprocess.Popen(
                pinned(command, cores),
                pass_fds=(child_read, child_write),
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(extra=one_thread(cores)),
            )
        os.close(child_read)
        os.close(child_write)
        worker = Worker(process, os.fdopen(to_read, "r"), os.fdopen(to_write, "w"), log)
        worker._answer()
        return worker

    def step(self) -> Figures:
        """One turn's figures."""
        print("step", file=self.writer, flush=True)
        return self._answer()

    def _answer(self) -> Figures:
        line = self.reader.readline()
        if not line:
            tail = self.log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise RuntimeError(
                f"the worker ended with exit code {self.process.wait()}; the end of "
                f"{self.log}:\n{tail}"
            )
        figures: Figures = json.loads(line)
        return figures

    def close(self) -> None:
        """End the worker: the closed pipe is its signal. Kills one that does not end in time."""
        self.writer.close()
        try:
            self.process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.reader.close()


def close_all(workers: Iterable[Worker]) -> None:
    """Tell all to end before waiting for any of them."""
    started = list(workers)
    for worker in started:
        worker.writer.close()
    for worker in started:
        worker.close()
