"""Python that a policy wrote, run against tests in processes of its own. Standard library only
inside the box.

What stands between the response and the machine, in the order of what it withstands:

    namespaces        no network interface; no other process to see or signal; a file system of the
    interpreter's files (read-only), three devices
                      and an empty /box in memory, so neither the user's files nor their secrets are
                      there to read; whatever a response leaves
                      running ends with its init. Needs root, or a kernel that gives users
                      namespaces (not inside most containers).
    another user      as root each run gets a user id that nobody has, without capabilities and
    unable to gain any: it can neither read what is
                      private nor signal anyone. Without root and without namespaces the response
                      runs as the user who trains.
    limits (rlimit)   CPU seconds, address space, size of a file, open files, processes and threads
    (a fork bomb); without root and namespaces the
                      limit on processes counts all of the user's, so a response can then start none
                      at all.
    time, memory      a supervisor ends every process of a runner after its test or at the wall
    time, also those that left its session.
    environment       none is passed on; standard input is empty; output goes to a file under the
    file limit.
    audit hook        in the runner (PEP 578): refuses sockets, processes, ctypes, and files outside
    of the box. Code that sets out to can get around
                      it (it shares the interpreter); it is what keeps ordinary mistakes and lazy
                      hacks off where there are no namespaces.
                      The network in particular is closed by it alone there: a program started past
                      it can connect.

What it does not stop: a response that reads its runner's memory to forge a success (the tests run
in the same interpreter), bugs of the kernel, and a share of the CPU's time within the limits. For
hostile code put the whole training job into a container or a virtual machine.

A response that breaks a limit is wrong and fails its test; a sandbox that can't be set up raises
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
# beyond the response's own time: starting Python, and ending what it started, on a machine under
# load
_MARGIN_S = 60.0
# far from any account; two runs at once have the same one with a probability of 2e-9
_FIRST_UID, _UIDS = 0x40000000, 0x20000000


class SandboxError(RuntimeError):
    """The sandbox itself failed: no fault of the response."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Per response, but for what a process is given."""

    time_s: float = 5.0  # CPU seconds of one test's process
    memory_mb: int = 512  # address space of a process
    processes: int = 16  # processes and threads at once
    file_mb: int = 1  # size of a file, what is printed included
    box_mb: int = 16  # all files together, with namespaces
    open_files: int = 64

    @property
    def wall_s(self) -> float:
        """For all tests together: four times the CPU time, so that load on the machine hardly ever
        fails a response that computes for less.
        """
        return 4 * self.time_s


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one test ended."""

    status: str  # passed, failed or timeout
    detail: str = ""  # the exception or the limit

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def run_tests(
    code: str, tests: Sequence[str], limits: Limits, *, namespaces: bool
) -> list[Outcome]:
    """Execute `code` and then each test after it, each in a fresh process. A test passes when it
    ends without an exception.

    Raises SandboxError when the sandbox can't be set up or doesn't answer; `namespaces` says
    whether to use them, see `isolation`.
    """
    box = tempfile.mkdtemp(prefix="rlhf-sandbox-")
    job = {
        "code": code,
        "tests": list(tests),
        "box": box,
        "uid": _FIRST_UID + secrets.randbelow(_UIDS),
        "namespaces": namespaces,
        "cpu_s": limits.time_s,
        "wall_s": limits.wall_s,
        "memory_mb": limits.memory_mb,
        "processes": limits.processes,
        "file_mb": limits.file_mb,
        "box_mb": limits.box_mb,
        "open_files": limits.open_files,
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
    # the same order of sets in every run
    environment = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"}
    library = None if job["namespaces"] else _library()
    if library is not None:
        environment["PYTHONPATH"] = f"{library}:{library}/lib-dynload"
    # not the virtual environment's: its packages are no part of the box
    interpreter = getattr(sys, "_base_executable", sys.executable)
    process = subprocess.Popen(
        [interpreter, "-s", "-S", "-P", "-B", str(_CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
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
        said = err.decode(errors="replace").strip()[-400:]
        raise SandboxError(
            f"the sandbox ended with exit code {process.returncode} and without a report: "
            f"{said or 'it said nothing'}"
        ) from error
    return report


@functools.cache
def _library() -> str | None:
    """Where another user reads the standard library: None where it stands; a copy where root keeps
    the interpreter in a private directory.
    """
    place = Path(os.__file__).resolve().parent
    if os.getuid() != 0 or all(
        folder.stat().st_mode & stat.S_IXOTH for folder in (place, *place.parents)
    ):
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
    # with times, by which Python knows that byte code is up to date
    shutil.copytree(place, copy, ignore=skipped, dirs_exist_ok=True)
    copy.chmod(0o755)
    # else every runner would compile what it imports, within the response's time
    compileall.compile_dir(copy, quiet=2)
    return str(copy)


@functools.cache
def _probe(namespaces: bool) -> str | None:
    """None where the sandbox works, else why not."""
    try:
        outcomes = run_tests(
            "import fractions\nx = 1",
            ["assert x == 1", "assert x == 2"],
            Limits(),
            namespaces=namespaces,
        )
    except SandboxError as error:
        return str(error)
    found = [o.status for o in outcomes]
    return (
        None
        if found == ["passed", "failed"]
        else f"a test that should pass and one that should fail: {outcomes}"
    )


def isolation(wanted: Isolation) -> bool:
    """Whether to use namespaces: `auto` where they work, else said aloud. Raises SandboxError where
    what is wanted doesn't work.
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
