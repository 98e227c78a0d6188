"""A process of its own that evaluates responses for the verifiers of mathematics and of
reasoning-gym.

Both give a response to parsers that it can make compute without end (9^9^9^9) or fill the memory;
some of reasoning-gym's run it as Python. A process can be killed: a response that uses up its CPU
time or memory is wrong, and the next response gets a fresh process.
"""

import contextlib
import json
import logging
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import psutil

LOG = logging.getLogger(__name__)
_ROOT = Path(__file__).resolve().parents[2]
_START_S = 180.0  # imports, on a machine under load
_WALL_FACTOR = 20.0  # beyond so much wall time per CPU time the machine is at fault


class WorkerError(RuntimeError):
    """The process itself failed, through no fault of the response."""


class BrokenReference(ValueError):
    """The row's reference can't be used."""


class _Ended(Exception):
    """The process ended, or was killed because of its CPU time."""


class Worker:
    """The process, started at the first request and ended with this object or with the program.
    Threads take turns.
    """

    def __init__(self, kind: str, *, cpu_s: float = 3.0, memory_mb: int = 4096) -> None:
        """`kind`: math or gym. `cpu_s`: CPU seconds for a response. `memory_mb`: MiB of address
        space, libraries included.
        """
        self.kind, self.cpu_s, self.memory_mb = kind, cpu_s, memory_mb
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._folder = tempfile.TemporaryDirectory(prefix="rlhf-worker-")
        self._holder: list[subprocess.Popen[bytes]] = []
        self._finalizer = weakref.finalize(self, _end_all, self._holder)

    def check(self, reference: Any) -> None:
        """Raises BrokenReference for a reference that can't be used, WorkerError where the process
        fails.
        """
        with self._lock:
            try:
                self._ask({"reference": reference})
            except _Ended as error:
                raise WorkerError(
                    f"the {self.kind} process {error} on a reference alone: {reference!r}"
                ) from error

    def score(self, reference: Any, response: str) -> float:
        """A score in [0, 1]; 0 for a response that used up its time or memory. Raises as `check`
        does.
        """
        with self._lock:
            try:
                return float(self._ask({"reference": reference, "response": response}))
            except _Ended as error:
                LOG.debug("The %s process %s on %r", self.kind, error, response[:200])
        self.check(reference)  # the process must live without the response: else it is not at fault
        return 0.0

    def close(self) -> None:
        self._finalizer()
        self._folder.cleanup()

    def _ask(self, request: dict[str, Any]) -> Any:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended("ended") from error
        answer = json.loads(self._line(process, self.cpu_s))
        if "broken" in answer:
            raise BrokenReference(answer["broken"])
        return answer["score"]

    def _start(self) -> subprocess.Popen[bytes]:
        # of this environment only what Python needs: the rest may hold secrets
        kept = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        environment |= {
            "PYTHONHASHSEED": "0",
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "LANG": "C.UTF-8",
        }
        arguments = [self.kind, str(self.memory_mb), self._folder.name]
        process = subprocess.Popen(
            [sys.executable, "-m", "reward.verifiers.worker_child", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=_ROOT,
            env=environment,
            start_new_session=True,
        )
        self._process, self._buffer = process, b""
        self._holder[:] = [process]
        try:
            self._line(process, _START_S)
        except _Ended as error:
            raise WorkerError(
                f"the {self.kind} process {error} before it was ready. Start it by hand to see "
                "why: "
                f"python -m reward.verifiers.worker_child {self.kind} {self.memory_mb} /tmp"
            ) from error
        return process

    def _line(self, process: subprocess.Popen[bytes], cpu_s: float) -> bytes:
        """The next line of the process. Raises _Ended after `cpu_s` seconds of CPU, WorkerError
        where wall time passes but no CPU time.
        """
        assert process.stdout is not None
        began, used = time.monotonic(), _cpu_seconds(process.pid)
        while b"\n" not in self._buffer:
            if select.select([process.stdout], [], [], 0.05)[0]:
                chunk = os.read(process.stdout.fileno(), 65536)
                if not chunk:
                    raise self._ended("ended")
                self._buffer += chunk
            elif _cpu_seconds(process.pid) - used > cpu_s:
                raise self._ended(f"used more than {cpu_s} s of CPU")
            elif time.monotonic() - began > _WALL_FACTOR * cpu_s:
                self._ended("")
                raise WorkerError(
                    f"the {self.kind} process gave no answer within {_WALL_FACTOR * cpu_s:.0f} s "
                    f"though it computed for less than {cpu_s} s"
                )
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _ended(self, why: str) -> _Ended:
        _end_all(self._holder)
        self._process = None
        return _Ended(why)


def _cpu_seconds(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def _end_all(processes: list[subprocess.Popen[bytes]]) -> None:
    while processes:
        process = processes.pop()
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        process.wait()
