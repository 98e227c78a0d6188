"""The supervisor of a job: ``python -m rlhf.board.jobs.supervisor FOLDER DEVICE``.

It is a process of a session of its own, so nothing that ends the board ends it. It starts the run
in a further session, writes down both processes, waits, writes the exit code, starts what waits
for the device. The run's output goes into a file by the run's own hand: nobody has to read along.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from rlhf.board.jobs.queue import ALL_CUDA, CPU, LOCK_FILE, TAKEN, fail, start_waiting
from rlhf.board.jobs.records import (
    CLAIM_FILE,
    EXIT_FILE,
    JOB_FILE,
    OUTPUT_FILE,
    PROCESS_FILE,
    SECRETS_FILE,
    STOP_FILE,
    read,
    this_process,
    write,
)


def main(argv: Sequence[str]) -> int:
    """Supervise the job in the folder argv[0] on the device argv[1], then go on with the queue."""
    folder, device = Path(argv[0]), argv[1]
    # The run gets signals of its own; the supervisor stays until it can say how the run ended. A
    # function, since what is ignored would be ignored by the run too.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stay)
    with (folder / LOCK_FILE).open("ab") as lock:
        if not _lock(lock) or read(folder, CLAIM_FILE) or read(folder, EXIT_FILE):
            return TAKEN
        asked = read(folder, JOB_FILE)
        if asked is None:
            fail(folder, f"{folder / JOB_FILE} can't be read")
            return TAKEN
        write(folder, CLAIM_FILE, {**this_process(os.getpid()), "device": device})
        _run(folder, asked, device)
    start_waiting(folder.parent)
    return 0


def _stay(number: int, frame: FrameType | None) -> None:
    """Does nothing."""


def _lock(file: Any) -> bool:
    """Whether no other supervisor has the job. It is held until this process ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: the queue's order has to do
        return True
    return True


def _run(folder: Path, asked: Mapping[str, Any], device: str) -> None:
    secret = read(folder, SECRETS_FILE) or {}
    (folder / SECRETS_FILE).unlink(missing_ok=True)
    try:
        with (folder / OUTPUT_FILE).open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "rlhf", *asked["argv"]],
                cwd=asked["cwd"],
                env={**_environment(device), **secret},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except OSError as error:
        fail(folder, str(error))
        return
    write(folder, PROCESS_FILE, {**this_process(process.pid), "started": time.time()})
    if (folder / STOP_FILE).is_file():  # asked before there was a process to tell
        with suppress(OSError):
            process.send_signal(signal.SIGTERM)
    code = process.wait()
    exit_code = code if code >= 0 else 128 - code
    write(folder, EXIT_FILE, {"exit_code": exit_code, "ended": time.time()})


def _environment(device: str) -> dict[str, str]:
    """The environment of a run: it sees its own device alone, and its output comes at once."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if device not in (CPU, ALL_CUDA):
        environment["CUDA_VISIBLE_DEVICES"] = device.removeprefix("cuda:")
    return environment


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
