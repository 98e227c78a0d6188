"""Runs a vLLM server and ends it, with every process that it started, as soon as the process that
asked for it is gone, however that ended; then it deletes what that process left in memory. Without
torch:

    python -m rollout.server.guard PARENT GRACE_S CORES COMMAND ...

CORES: those that the server may use, such as 0,1; a dash: any.
The parent is gone when its end of standard input closes, after AT_ONCE where nothing is to be
waited for, or when it is no longer this process's parent: a process that it forked may hold the
pipe open. Exits with the server's own code, which
says little: vLLM exits with 0 after its worker was killed.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rlhf.process.files import delete_orphans, memory_folder

ANY_CORE = "-"
AT_ONCE = b"!"
_LOOK_S = 0.5  # between two looks at parent and server
_SUBREAPER, _DEATH_SIGNAL = 36, 1  # PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG of prctl(2)


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code, 128 + the signal's number where one ended it."""
    parent, grace_s, cores = int(arguments[0]), float(arguments[1]), arguments[2]
    command = list(arguments[3:])
    if cores != ANY_CORE:
        os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
    # The parent decides: on Ctrl-C it still saves, and it may need the server for that.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _prctl(_SUBREAPER, 1)  # what the server leaves behind becomes this process's child
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_as_server,  # noqa: PLW1509 - this process has one thread
    )
    told: bytes | None = None
    while server.poll() is None and told is None:
        told = _told(parent)
    if server.poll() is None and told != AT_ONCE:
        _signal_group(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(grace_s)
    # the server's children do not always follow it
    _signal_group(server.pid, signal.SIGKILL)
    code = server.wait()
    _reap(grace_s)
    for place in (memory_folder(), Path(tempfile.gettempdir())):
        if place is not None:  # weights and adapters of a process that was killed
            delete_orphans(place)
    return code if code >= 0 else 128 - code


def _as_server() -> None:
    """In the server's process, before the command: it dies with this one."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    _prctl(_DEATH_SIGNAL, signal.SIGKILL)


def _told(parent: int) -> bytes | None:
    """None while the parent is there and says nothing; waits for a moment."""
    readable, _, _ = select.select([sys.stdin], [], [], _LOOK_S)
    if readable:
        return os.read(sys.stdin.fileno(), 1)
    return None if os.getppid() == parent else b""


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _reap(limit_s: float) -> None:
    """Wait for all processes that became this one's children."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:  # none is left
            return
        if pid == 0:
            time.sleep(0.02)


def _prctl(option: int, value: int) -> None:
    """prctl(2) of Linux; elsewhere nothing, and the two looks have to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
