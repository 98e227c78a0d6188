"""Child processes of a launcher: each in a session of its own, ended with its whole process group,
and always waited for.
"""

import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.process import redaction

_SHIM = Path(__file__).with_name("child.py")
_POLL_S = 0.05
_TAIL = 4000  # characters of a log that an error shows


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What a child process runs."""

    name: str  # for people, such as "rank 0"
    arguments: Sequence[str]
    environment: Mapping[str, str]  # beside this process's own
    cores: Iterable[int] | None = None  # None: any
    log: Path | None = None  # of what it prints; None: this process's output
    folder: str | None = None  # where it runs; None: where this process does
    error_file: Path | None = None  # in which a rank records its failure, as under torchrun
    lock: Path | None = None  # a file that is locked as long as the process lives

    @property
    def shown(self) -> str:
        """For a shell, without secrets."""
        return redaction.text(shlex.join(self.arguments))


@dataclass(slots=True)
class Child:
    """A child process that was started."""

    command: Command
    process: "subprocess.Popen[bytes]"
    code: int | None = None  # as a shell counts it: 128 + n after signal n; None: it runs
    ended_at: float = field(default=0.0)  # by time.monotonic

    @property
    def name(self) -> str:
        return self.command.name

    @classmethod
    def start(cls, command: Command) -> "Child":
        """Start `command`. It gets SIGTERM when this process ends, however it ends.

        Raises BlockingIOError where another process has its lock.
        """
        cores = "any"
        if command.cores is not None:
            cores = ",".join(map(str, sorted(command.cores)))
        environment = os.environ | dict(command.environment)
        if command.error_file is not None:
            command.error_file.unlink(missing_ok=True)
            environment["TORCHELASTIC_ERROR_FILE"] = str(command.error_file)
        shim = [sys.executable, "-I", str(_SHIM), str(os.getpid()), cores]
        with contextlib.ExitStack() as stack:
            output: Any = None
            if command.log is not None:
                command.log.parent.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context(command.log.open("ab"))
            held: tuple[int, ...] = ()
            if command.lock is not None:
                file = stack.enter_context(command.lock.open("ab"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = (file.fileno(),)  # the child's lock too, when this process closes it
            process = subprocess.Popen(
                [*shim, *command.arguments],
                env=environment,
                cwd=command.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output is not None else None,
                start_new_session=True,
                pass_fds=held,
            )
        return cls(command, process)

    def look(self) -> bool:
        """Whether it has ended. What is left of its process group is then killed."""
        if self.code is not None:
            return True
        # seen, but not yet waited for: until then no other group can have its number
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        if os.waitid(os.P_PID, self.process.pid, options) is None:
            return False
        self._signal_group(signal.SIGKILL)
        code = self.process.wait()
        self.code = code if code >= 0 else 128 - code
        self.ended_at = time.monotonic()
        return True

    def tell(self, number: int) -> None:
        """Send a signal to the process alone, which passes it on as it likes."""
        if self.code is None:
            # Popen.send_signal would wait for the process, from whatever thread this is
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def kill(self) -> None:
        """End it and all of its process group now."""
        if self.code is None:
            self._signal_group(signal.SIGKILL)
            while not self.look():
                time.sleep(_POLL_S)

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def failure(self) -> str:
        """What it recorded as its failure, or else how it ended; without secrets."""
        recorded = read_failure(self.command.error_file)
        if recorded:
            return redaction.text(recorded.removeprefix("error: "))
        if self.command.log is not None:
            return f"it ended with exit code {self.code}. {log_tail(self.command.log)}"
        if self.code is not None and self.code > 128:
            with contextlib.suppress(ValueError):
                name = signal.Signals(self.code - 128).name
                hint = " (the kernel does that when memory runs out)" if name == "SIGKILL" else ""
                return f"it was ended by {name}{hint}"
        return f"it ended with exit code {self.code}; what it printed stands above"


def read_failure(path: Path | None) -> str:
    """The message in the file that a rank wrote when it failed; empty where there is none."""
    if path is None or not path.is_file():
        return ""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""  # half-written when the rank was killed
    return str(content.get("message", "")) if isinstance(content, dict) else ""


def log_tail(path: Path) -> str:
    """Where a log is, and its last lines without secrets."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")[-_TAIL:]
    except OSError as error:
        return f"Its log {path} can't be read ({error})."
    return f"The end of {path}:\n{redaction.text(text).strip()}"


def all_ended(children: Sequence[Child]) -> bool:
    """Whether all have ended. Each is looked at, so that none stays behind as a zombie."""
    ended = [child.look() for child in children]
    return all(ended)


def end_all(children: Sequence[Child], grace_s: float) -> None:
    """Ask all to end by SIGTERM, and kill those that run on after `grace_s` seconds."""
    for child in children:
        child.tell(signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline:
        if all_ended(children):
            return
        time.sleep(_POLL_S)
    for child in children:
        child.kill()


def first_failed(children: Sequence[Child]) -> Child | None:
    """Of the children that ended with another exit code than 0 the one that failed first.

    Several may have ended between two looks: one that recorded its failure earlier comes first, and
    one that recorded none last.
    """
    failed = [child for child in children if child.code not in (None, 0)]
    return min(failed, key=_failed_at, default=None)


def _failed_at(child: Child) -> tuple[float, float]:
    path, recorded = child.command.error_file, float("inf")
    if path is not None and path.is_file():
        recorded = float(path.stat().st_mtime_ns)
    return child.ended_at, recorded
