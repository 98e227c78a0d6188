"""``python -I child.py PARENT CORES COMMAND...``: becomes COMMAND, on CORES alone (such as
``0,1,2``; ``any`` for all), and asks the kernel for SIGTERM when the process PARENT ends, however
that ends.

A file of its own, since what a forked child of a threaded Python runs before exec may hang. It
imports the standard library only.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(parent: int, cores: str, command: list[str]) -> None:
    """Set up this process and run `command` in its place."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
            sys.exit(f"error: prctl failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        sys.exit(128 + signal.SIGTERM)  # it ended before the kernel was asked
    if cores != "any":
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"error: {command[0]}: {error}")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
