"""Runs Python that a policy wrote against tests, in processes of its own.

What is between the response and the machine, the strongest first:

    namespaces        no network interface; no other process to see or to signal; a file system of
                      the interpreter's files (read-only), three devices and an empty /box in
                      memory, so that neither the user's files nor their secrets can be read.
                      Whatever a response leaves running ends with its init process. Needs root, or
                      a kernel that gives users namespaces (not inside most containers).
    another user      as root each run gets a user id that nobody has, without capabilities and
                      unable to gain any: it can neither read what is private nor signal anyone.
                      Without root and without namespaces the response runs as the user who trains.
    limits (rlimit)   CPU seconds, address space, size of a file, open files, processes and threads
                      (against fork bombs). Without root and namespaces the limit on processes
                      counts all of the user's, so that a response can't start any.
    time, memory      a supervisor kills every process of a runner after its test or at the wall
                      time, also processes that left its session.
    environment       no variable is passed on; standard input is empty; output goes to a file,
                      where the limit on its size holds.
    audit hook        in the runner (PEP 578): refuses sockets, processes, ctypes, and files outside
                      of the box. Code that sets out to can get around it, because it shares the
                      interpreter; it stops ordinary mistakes and lazy hacks where there are no
                      namespaces. There it alone closes the network: a program that a response
                      manages to start can connect.

What it does not stop: a response that reads its runner's memory to forge a success (the tests run
in the same interpreter), bugs of the kernel, and the use of CPU time within the limits. For hostile
code put the whole training job into a container or a virtual machine.

A response that breaks a limit is wrong and fails its test. A sandbox that can't be set up raises
SandboxError.
"""

import atexit
import compileall
import functools
import json
import logging
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.choices import Isolation

LOG = logging.getLogger(__name__)
_CHILD = Path(__file__).with_name("child.py")
# beyond the response's own time: starting Python and killing what it left, on a machine under load
_MARGIN_S = 60.0
# far from any account; two runs at once get the same user id with a probability of 2e-9
FIRST_UID, UIDS = 0x40000000, 0x20000000


class SandboxError(RuntimeError):
    """The sandbox itself failed, through no fault of the response."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a response; some hold for each of its processes."""

    time_s: float = 5.0  # CPU seconds of the process that runs a test
    memory_mb: int = 512  # address space of a process
    processes: int = 16  # processes and threads at once
    file_mb: int = 1  # size of a file, what is printed included
    box_mb: int = 16  # all files together, with namespaces
    open_files: int = 64

    @property
    def wall_s(self) -> float:
        """Seconds for all tests together: four times the CPU time, so that load on the machine
        hardly ever fails a response that computes for less.
        """
        return 4 * self.time_s

    def as_job(self) -> dict[str, object]:
        """What the processes in the sandbox are told of the limits."""
        return {
            "cpu_s": self.time_s,
            "wall_s": self.wall_s,
            "memory_mb": self.memory_mb,
            "processes": self.processes,
            "file_mb": self.file_mb,
            "box_mb": self.box_mb,
            "open_files": self.open_files,
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a test ended."""

    status: str  # passed, failed or timeout
    detail: str = ""  # the exception or the limit

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def run_tests(
    code: str, tests: Sequence[str], limits: Limits, *, namespaces: bool
) -> list[Outcome]:
    """Run each test in a fresh process, after `code`. A test passes when it ends without an
    exception.

    `namespaces`: whether to use them (see `isolation`). Raises SandboxError when the sandbox can't
    be set up or doesn't answer.
    """
    box = tempfile.mkdtemp(prefix="rlhf-sandbox-")
    job = limits.as_job() | {
        "code": code,
        "tests": list(tests),
        "box": box,
        "uid": FIRST_UID + secrets.randbelow(UIDS),
        "namespaces": namespaces,
    }
    try:
        report = _run(job, limits.wall_s + _MARGIN_S)
    finally:
        shutil.rmtree(box, ignore_errors=True)
    if "error" in report:
        raise SandboxError(
            f"the sandbox failed ({'with' if namespaces else 'without'} namespaces): "
            f"{report['error']}"
        )
    return [Outcome(status, detail) for status, detail in report["results"]]


def _run(job: dict[str, object], seconds: float) -> dict[str, list[tuple[str, str]]]:
    """The supervisor's report."""
    # not the virtual environment's interpreter, whose packages are no part of the box
    interpreter = getattr(sys, "_base_executable", sys.executable)
    process = subprocess.Popen(
        [interpreter, "-s", "-S", "-P", "-B", str(_CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=interpreter_environment(bool(job["namespaces"])),
        cwd="/",
        start_new_session=True,
    )
    try:
        out, err = process.communicate(json.dumps(job).encode(), timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise SandboxError(f"the sandbox gave no answer within {seconds} s") from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    try:
        report: dict[str, list[tuple[str, str]]] = json.loads(out)
    except ValueError as error:
        output = err.decode(errors="replace").strip()[-400:]
        raise SandboxError(
            f"the sandbox ended with exit code {process.returncode} and without a report: "
            f"{output or 'it wrote nothing'}"
        ) from error
    return report


def interpreter_environment(namespaces: bool) -> dict[str, str]:
    """The variables of a sandbox's interpreter."""
    # a fixed hash seed: sets have the same order in every run
    environment = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"}
    library = None if namespaces else _library()
    if library is not None:
        environment["PYTHONPATH"] = f"{library}:{library}/lib-dynload"
    return environment


@functools.cache
def _library() -> str | None:
    """A copy of the standard library for another user, where root keeps the interpreter in a
    private directory; None where that user can read the library itself.
    """
    library = Path(os.__file__).resolve().parent
    folders = (library, *library.parents)
    if os.getuid() != 0 or all(folder.stat().st_mode & stat.S_IXOTH for folder in folders):
        return None
    copy = Path(tempfile.mkdtemp(prefix="rlhf-sandbox-library-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    copy.chmod(0o755)
    skipped = shutil.ignore_patterns(
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "tkinter",
        "ensurepip",
        "lib2to3",
        "config-*",
    )
    # keeps modification times, by which Python knows that byte code is up to date
    shutil.copytree(library, copy, ignore=skipped, dirs_exist_ok=True)
    copy.chmod(0o755)
    # otherwise every runner would compile what it imports, within the response's time
    compileall.compile_dir(copy, quiet=2)
    return str(copy)


@functools.cache
def _probe(namespaces: bool) -> str | None:
    """Why the sandbox doesn't work; None where it does."""
    try:
        outcomes = run_tests(
            "import fractions\nx = 1",
            ["assert x == 1", "assert x == 2"],
            Limits(),
            namespaces=namespaces,
        )
    except SandboxError as error:
        return str(error)
    if [outcome.status for outcome in outcomes] == ["passed", "failed"]:
        return None
    return f"a test that should pass and one that should fail: {outcomes}"


def isolation(wanted: Isolation) -> bool:
    """Whether to use namespaces. `auto` uses them where they work, and else logs a warning. Raises
    SandboxError where the wanted isolation doesn't work.
    """
    if wanted is not Isolation.limits:
        problem = _probe(True)
        if problem is None:
            return True
        if wanted is Isolation.namespaces:
            raise SandboxError(
                f"isolation=namespaces: {problem}. isolation=limits does without, in a container "
                "of your own."
            )
        LOG.warning(
            "No namespaces for the code sandbox (%s): limits and an audit hook alone keep the "
            "responses apart.",
            problem,
        )
    problem = _probe(False)
    if problem is not None:
        raise SandboxError(problem)
    return False
