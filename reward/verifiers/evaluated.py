"""Verifiers that evaluate a response, in processes of their own: Python code in the sandbox
(reward/sandbox/), mathematics by math-verify and a task's own check by reasoning-gym in a `Worker`
each.

Both libraries give a response to parsers that it can make compute without end (9^9^9^9) or fill the
memory; some of reasoning-gym's run it as Python. A process can be killed: a response that uses up
its CPU time or memory is wrong, and the next response gets a fresh process.
"""

import contextlib
import importlib.util
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

from conf.schema import RewardTerm
from reward.sandbox.run import Limits, SandboxError, isolation, run_tests
from reward.verifiers.extract import after_marker, fenced_or_all

LOG = logging.getLogger(__name__)
_ROOT = Path(__file__).resolve().parents[2]
_GYM_KEYS = ("task", "config", "question", "answer", "metadata")
_START_S = 180.0  # imports, on a machine under load
_WALL_FACTOR = 20.0  # beyond so much wall time per CPU time the machine is at fault


class Code:
    """The share of the row's tests that the response's code passes; with all_or_nothing 1 for all
    of them, else 0.

    The code is the last fenced block whose language is Python or not named, or else the whole
    response. A test is Python code that raises where the response's code is wrong. The column holds
    a list of tests, that list as JSON text, or a single test.
    """

    def __init__(self, term: RewardTerm) -> None:
        """Raises ValueError where the sandbox doesn't work on this machine."""
        self.columns: tuple[str, ...] = (term.column or "tests",)
        self.all_or_nothing = term.all_or_nothing
        self.limits = Limits(time_s=term.time_limit_s, memory_mb=term.memory_mb)
        try:
            self.namespaces = isolation(term.isolation)
        except SandboxError as error:
            raise ValueError(str(error)) from error
        self.workers = max(1, len(os.sched_getaffinity(0)))

    def reference(self, *values: Any) -> list[str]:
        tests = values[0]
        if isinstance(tests, str) and tests.lstrip().startswith("["):
            tests = json.loads(tests)
        elif isinstance(tests, str):
            tests = [tests]
        usable = isinstance(tests, list) and all(isinstance(t, str) and t.strip() for t in tests)
        if not usable or not tests:
            raise ValueError(
                f"expected a list of tests, each of them Python code, found {values[0]!r}"
            )
        for number, test in enumerate(tests, start=1):
            try:
                compile(test, "test", "exec")
            except SyntaxError as error:
                raise ValueError(
                    f"test {number} is no Python code ({error.msg}, line {error.lineno}): "
                    f"{test[:80]!r}"
                ) from error
        return tests

    def score(self, response: str, reference: list[str]) -> float:
        code = fenced_or_all(response, ("python", "py", "python3"))
        outcomes = run_tests(code, reference, self.limits, namespaces=self.namespaces)
        passed = sum(outcome.passed for outcome in outcomes)
        if self.all_or_nothing:
            return float(passed == len(reference))
        return passed / len(reference)


class MathAnswer:
    r"""1 where the response's answer equals the row's as an expression, else 0: \frac{1}{2}, 0.5
    and 1/2 are equal.

    As in TRL's accuracy_reward the answer has to be LaTeX between delimiters; \boxed{} takes
    precedence over others. An answer is wrong when evaluating it takes more than 3 s of CPU or more
    memory than the process may use.
    """

    workers = 1

    def __init__(self, term: RewardTerm) -> None:
        """Raises ValueError when math-verify is not installed."""
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError(
                "needs the package math-verify, which is not installed: pip install "
                "math-verify==0.9.0"
            )
        self.columns: tuple[str, ...] = (term.column or "answer",)
        self.worker = Worker("math")

    def reference(self, *values: Any) -> Any:
        answer = values[0]
        usable = isinstance(answer, (str, int, float)) and not isinstance(answer, bool)
        if not usable or not str(answer).strip():
            raise ValueError(f"expected a mathematical expression or a number, found {answer!r}")
        self.worker.check(answer)
        return answer

    def score(self, response: str, reference: Any) -> float:
        return self.worker.score(reference, response)


class Gym:
    """The score of the task's own score_answer, in [0, 1]; some tasks give partial credit for
    partly right or well-formed answers.

    The answer is the text between the last <answer> and </answer> (reasoning-gym's convention),
    else the whole response without surrounding spaces.
    """

    workers = 1

    def __init__(self, term: RewardTerm) -> None:
        """Raises ValueError when reasoning-gym is not installed."""
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ValueError(
                "needs the package reasoning-gym, which is not installed: pip install "
                "reasoning-gym==0.1.25"
            )
        self.columns: tuple[str, ...] = (term.column or "metadata",)
        self.worker = Worker("gym")

    def reference(self, *values: Any) -> Any:
        entry = json.loads(values[0]) if isinstance(values[0], str) else values[0]
        if not isinstance(entry, dict) or set(entry) != set(_GYM_KEYS):
            actual = type(entry).__name__
            if isinstance(entry, dict):
                actual = ", ".join(map(str, entry))
            raise ValueError(
                f"expected an object with {', '.join(_GYM_KEYS)}, as data.recipe=gym writes it, "
                f"found {actual}"
            )
        self.worker.check(entry)
        return entry

    def score(self, response: str, reference: Any) -> float:
        answer = after_marker(response, "<answer>")
        if answer is None:
            answer = response.strip()
        return self.worker.score(reference, answer)


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
