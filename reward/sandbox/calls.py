"""Calls of functions in the sandbox, which a policy asked for: the arguments, and of some functions
the code, are the policy's.

What is between a call and the machine is what reward/sandbox/run.py describes. Its supervisors stay
for further calls, since starting one takes longer than most calls; each call has processes and an
empty box of its own, of which nothing is left.
"""

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward.sandbox.run import (
    FIRST_UID,
    UIDS,
    Limits,
    SandboxError,
    interpreter_environment,
)

_CHILD = Path(__file__).with_name("calls_child.py")
_START_S = 60.0  # starting Python, on a machine under load
_MARGIN_S = 60.0  # beyond a call's own time: killing what it left
# Calls that sleep cost nothing but a supervisor of a few megabytes.
_MOST_SUPERVISORS = 16


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a function by its source: Python code that needs the standard library alone."""

    source: str
    name: str
    arguments: Mapping[str, Any]
    wall_s: float
    # False lets it start programs: only namespaces then keep it apart
    hook: bool = True
    output_bytes: int = 65536  # more of what it prints is cut


@dataclass(frozen=True, slots=True)
class Result:
    """How a call ended."""

    status: str  # passed, failed or timeout
    detail: str  # the exception or the limit; "" where it passed
    output: str  # what it printed, then what it returned


class Sandbox:
    """Runs calls, as many at once as threads ask for, up to a bound; the others wait."""

    def __init__(self, limits: Limits, *, namespaces: bool, files: str | None = None) -> None:
        """`namespaces`: whether to use them (`reward.sandbox.run.isolation`). `files`: a directory
        that calls may read, by its path in the variable FILES; any user of the machine can.
        """
        self._limits, self._namespaces, self._files = limits, namespaces, files
        self._free = threading.BoundedSemaphore(_MOST_SUPERVISORS)
        self._idle: list[_Supervisor] = []
        self._finalizer = weakref.finalize(self, _end_all, self._idle)

    def run(self, call: Call) -> Result:
        """Raises SandboxError where the sandbox fails twice through no fault of the call."""
        with self._free:
            try:
                return self._run(call)
            except SandboxError:
                return self._run(call)

    def _run(self, call: Call) -> Result:
        try:
            supervisor = self._idle.pop()
        except IndexError:
            supervisor = _Supervisor(self._limits, self._namespaces, self._files)
        try:
            result = supervisor.run(call)
        except BaseException:
            supervisor.close()
            raise
        self._idle.append(supervisor)
        return result

    def close(self) -> None:
        self._finalizer()


class _Supervisor:
    """A process that runs one call after another."""

    def __init__(self, limits: Limits, namespaces: bool, files: str | None) -> None:
        self._box = tempfile.mkdtemp(prefix="rlhf-sandbox-")
        # It ends with its standard input, so that it lives no longer than this process.
        self._process = subprocess.Popen(
            [getattr(sys, "_base_executable", sys.executable), "-s", "-S", "-P", "-B", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=interpreter_environment(namespaces),
            cwd="/",
            start_new_session=True,
        )
        self._buffer = b""
        job = limits.as_job() | {
            "box": self._box,
            "uid": FIRST_UID + secrets.randbelow(UIDS),
            "namespaces": namespaces,
            "files": files,
        }
        try:
            self._ask(job, _START_S)
        except BaseException:
            self.close()
            raise

    def run(self, call: Call) -> Result:
        """Raises SandboxError."""
        request = {
            "source": call.source,
            "name": call.name,
            "arguments": dict(call.arguments),
            "wall_s": call.wall_s,
            "hook": call.hook,
            "output_bytes": call.output_bytes,
        }
        answer = self._ask(request, call.wall_s + _MARGIN_S)
        return Result(answer["status"], answer["detail"], answer["output"])

    def _ask(self, message: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise SandboxError("the sandbox ended between two calls") from error
        answer: dict[str, Any] = json.loads(self._line(seconds))
        if "error" in answer:
            raise SandboxError(f"the sandbox failed: {answer['error']}")
        return answer

    def _line(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise SandboxError(f"the sandbox gave no answer within {seconds:g} s")
            chunk = os.read(self._process.stdout.fileno(), 65536)
            if not chunk:
                raise SandboxError("the sandbox ended in the middle of a call")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def close(self) -> None:
        """End its processes and remove its box."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self._box, ignore_errors=True)


def _end_all(supervisors: list[_Supervisor]) -> None:
    while supervisors:
        supervisors.pop().close()
