"""Stages as forks of one process that has imported the libraries, so that a run of seconds does not
pay 7 s of imports. They draw no plots, which would be a fifth of such a run.

    python -m benchmarks.proofs.forks SOCKET            serves until its parent ends
    python -S -E benchmarks/proofs/forks.py SOCKET ...  runs `python -m rlhf ...` there

The second form has the run's output and its exit code, passes SIGTERM on, and imports the standard
library only.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_POLL_S = 0.02
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_LONGEST = 1 << 20


@dataclass(slots=True)
class _Fork:
    """A run, and the client that waits for it."""

    pid: int
    client: socket.socket


def client(path: str, arguments: list[str]) -> int:
    """Run a stage in a fork of the server at `path`. Returns its exit code."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        signal.signal(signal.SIGTERM, lambda number, frame: connection.sendall(b"T"))
        request = {"arguments": arguments, "error_file": os.environ.get(_ERROR_FILE)}
        text = json.dumps(request).encode()
        socket.send_fds(connection, [text], [1, 2])
        while True:
            with contextlib.suppress(InterruptedError):
                return int(connection.recv(16) or b"70")


def serve(path: str) -> None:
    """Fork a run for each client until this process's parent has ended."""
    _import_all()
    parent = os.getppid()
    forks: list[_Fork] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(16)
        while os.getppid() == parent:
            waiting = [listener, *(fork.client for fork in forks)]
            ready, _, _ = select.select(waiting, [], [], _POLL_S)
            for each in ready:
                fork = _accept(listener) if each is listener else None
                if fork is not None:
                    forks.append(fork)
            _pass_on([fork for fork in forks if fork.client in ready])
            forks = [fork for fork in forks if not _has_ended(fork)]
    for fork in forks:
        os.kill(fork.pid, signal.SIGKILL)


def _import_all() -> None:
    """What a stage=sft imports, without starting a thread."""
    import rlhf.__main__
    from rlhf.cli import config
    from rlhf.process import distributed
    from rlhf.process.libraries import quiet_libraries
    from rlhf.run import plots

    distributed.name_accelerator()
    quiet_libraries()
    for name in ("methods", "rows", "memory", "sft"):
        rlhf.__main__.stage_modules(name)
    config.compose(["stage=sft"])  # the first one takes twice as long
    plots.plot_run = _no_plots


def _no_plots(directory: Path) -> list[Path]:
    """In place of a run's plots."""
    return []


def _accept(listener: socket.socket) -> _Fork | None:
    """A run for the next client; None for one that only asked whether anybody listens."""
    connection, _ = listener.accept()
    text, files, _, _ = socket.recv_fds(connection, _LONGEST, 2)
    if not text:
        return None
    request = json.loads(text)
    pid = os.fork()
    if pid == 0:
        listener.close()
        connection.close()
        os.dup2(files[0], 1)
        os.dup2(files[1], 2)
        _run(request)
    for file in files:
        os.close(file)
    return _Fork(pid, connection)


def _run(request: dict[str, object]) -> None:
    """In the fork: the command line, and the end of the process."""
    from rlhf.__main__ import main

    if request["error_file"] is not None:
        os.environ[_ERROR_FILE] = str(request["error_file"])
    code = 70
    try:
        arguments = request["arguments"]
        assert isinstance(arguments, list)
        code = main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _pass_on(forks: list[_Fork]) -> None:
    """A client wants its run to end; one that is gone had it killed."""
    for fork in forks:
        told = fork.client.recv(16)
        with contextlib.suppress(ProcessLookupError):
            os.kill(fork.pid, signal.SIGTERM if told else signal.SIGKILL)


def _has_ended(fork: _Fork) -> bool:
    pid, status = os.waitpid(fork.pid, os.WNOHANG)
    if pid == 0:
        return False
    code = os.waitstatus_to_exitcode(status)
    with contextlib.suppress(OSError):
        fork.client.sendall(str(code if code >= 0 else 128 - code).encode())
    fork.client.close()
    return True


def wait_for(path: str, limit_s: float = 120.0) -> None:
    """Wait until a server listens at `path`. Raises TimeoutError."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
            connection.connect(path)
            return
        time.sleep(0.1)
    raise TimeoutError(f"{path}: nobody listens after {limit_s:g} s")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(client(sys.argv[1], sys.argv[2:]))
    serve(sys.argv[1])
