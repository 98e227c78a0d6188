"""What watches over a run: the signals that end it in order, the time limit of its phases, and the
memory of its process.

While a stage trains, the first SIGTERM or Ctrl-C lets the step end and the run save (`Stopping`); a
second signal ends the process at once. Everywhere else either signal ends the run in order:
half-written files are removed and trackers are closed.

A phase that hangs dumps the stack of every thread, names phase and rank, and ends the process. A
run has one `Watchdog` (`RunContext.watchdog`). A phase that takes rows one by one calls `alive` for
each, so that the limit is for the time without progress, whatever the number of rows.
"""

import contextlib
import faulthandler
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType, TracebackType

import psutil

from rlhf.process import distributed

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# After the terminal's Ctrl-C torchrun sends each rank a signal of its own: no second wish.
_LAUNCHER_ECHO_S = 3.0
EXIT_HUNG = 124  # as timeout(1) reports it
_ALIVE_EVERY_S = 1.0  # calls of `alive` within this time of the last are ignored
# Where the interpreter can't run, C code ends the process after so many further seconds: without
# the phase's name, with exit code 1.
_GRACE_S = 60.0
# A rank that waits for others gets so much longer: torchrun shows the first failure as the cause,
# in whole seconds.
_OTHERS_FIRST_S = 10.0
_COLLECTIVES = "distributed_c10d"  # torch's file of collectives

# ---- signals ----


class Terminated(KeyboardInterrupt):
    """A signal other than Ctrl-C that asks the process to end.

    It is a KeyboardInterrupt, so that whatever cleans up after Ctrl-C cleans up after it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def _raise(number: int, frame: FrameType | None) -> None:
    raise Terminated(number)


def _note_only(number: int, frame: FrameType | None) -> None:
    """Does nothing: the thread that reads the wakeup socket acts on the signal."""


def _forget() -> None:
    """In a forked child: restore the usual handlers, so that a signal ends the child alone."""
    for number, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_DFL),
    ):
        if signal.getsignal(number) in (_raise, _note_only):
            signal.signal(number, usual)
            signal.set_wakeup_fd(-1)  # the run's socket


os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """While inside, SIGTERM raises `Terminated` in the main thread.

    With several ranks nothing is changed: a rank that waits in a collective would never raise it,
    and the launcher would wait in vain before it kills.
    """
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if not ours or distributed.world_size() > 1:
        yield
        return

    signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run_child(command: Sequence[str]) -> int:
    """Run a command as a process of its own and return its exit code.

    SIGTERM is passed on to it; Ctrl-C reaches it without help. Either signal lets it save first.
    """
    with subprocess.Popen(command) as process:

        def pass_on(number: int) -> None:
            if number == signal.SIGTERM:
                process.send_signal(number)

        with Stopping(pass_on):
            return process.wait()


class Stopping:
    """While inside, a signal is recorded; the loop asks for it with `agreed` after each step.

    A thread reads what the interpreter's own C handler writes into a socket, so that a second
    signal ends the process even where the main thread is stuck in a library. Outside the main
    thread, where Python allows no handlers, nothing is changed.
    """

    def __init__(self, told: Callable[[int], None] | None = None) -> None:
        """`told` is called with the first signal's number, from the thread."""
        self.received: int | None = None  # the first signal's number
        self._told = told
        self._at = 0.0
        self._installed = False

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._installed = True
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old = {number: signal.signal(number, _note_only) for number in _SIGNALS}
        self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._installed:
            return
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._writer.close()  # ends the thread

    def _listen(self) -> None:
        with self._reader:
            while received := self._reader.recv(64):
                for number in received:
                    if number in _SIGNALS:
                        self._note(number)

    def _note(self, number: int) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self.received is None:
            self.received, self._at = number, now
            if self._told is not None:
                self._told(number)
            if distributed.is_main():
                _say(f"{name}: the run stops after this step and saves. Once more ends it at once.")
        elif distributed.world_size() == 1 or now - self._at > _LAUNCHER_ECHO_S:
            _say(f"{name} again: ended at once; run.resume=true goes on from the last checkpoint.")
            os._exit(128 + number)  # as Interrupted.code

    def agreed(self) -> int | None:
        """The signal that any rank has received; None where none has. A collective."""
        return int(distributed.all_max([float(self.received or 0)])[0]) or None


def _say(text: str) -> None:
    os.write(2, f"\n{text}\n".encode())


# ---- the time of a phase ----

# Watchdogs that were entered, the innermost last. The innermost alone watches: the C code has one
# timer for the process.
_watching: "list[Watchdog]" = []


def alive() -> None:
    """The current phase made progress: its time limit starts again. Cheap enough for every row."""
    if _watching:
        _watching[-1].alive()


def forget() -> None:
    """In a forked process: the parent watches itself, and `alive` does nothing here."""
    _watching.clear()


class Watchdog:
    """Watches the phases of a run. limit: seconds; None: no limit, only the phase's name is kept.

    Where one rank hangs the others soon wait for it, so that all their limits end at about the same
    time. Ranks that wait go on for `_OTHERS_FIRST_S`: the rank that hangs ends first, and torchrun
    shows it as the cause.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self.name = "start"
        self._deadline = float("inf")
        self._extended = False  # the deadline, because this rank waits for others
        self._changed = threading.Condition()
        self._running = False
        self._armed = 0.0  # when the limit was last set anew

    def __enter__(self) -> "Watchdog":
        if _watching:
            _watching[-1].rest()
        _watching.append(self)
        self._running = True
        self.phase(self.name)
        if self.limit is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._running = False
            self._changed.notify()
        if self.limit is not None:
            faulthandler.cancel_dump_traceback_later()
        _watching.remove(self)
        if _watching:
            _watching[-1]._arm()

    def phase(self, name: str) -> None:
        """The phase `name` begins, and the phase before it is over."""
        self.name = name
        self._arm()

    def alive(self) -> None:
        """The phase goes on."""
        if self.limit is not None and time.monotonic() - self._armed > min(
            _ALIVE_EVERY_S, self.limit / 10
        ):
            self._arm()

    def rest(self) -> None:
        """No limit until the next phase, for what waits without end, such as a server."""
        self._arm(float("inf"))

    def _arm(self, limit: float | None = None) -> None:
        """The phase may take its limit, or `limit` seconds, from now on."""
        with self._changed:
            if self.limit is None or not self._running:
                return
            self._armed, self._extended = time.monotonic(), False
            self._deadline = self._armed + (self.limit if limit is None else limit)
            self._changed.notify()
        if limit is None:
            faulthandler.dump_traceback_later(self.limit + _GRACE_S, exit=True, file=2)
        else:
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        with self._changed:
            while self._running:
                left = self._deadline - time.monotonic()
                may_extend = not self._extended and distributed.world_size() > 1
                if left <= 0 and may_extend and in_collective():
                    self._deadline, self._extended = self._deadline + _OTHERS_FIRST_S, True
                    continue
                if left <= 0:
                    self._end()
                self._changed.wait(None if left == float("inf") else max(left, 0.0))

    def _end(self) -> None:
        others = ""
        if self._extended:
            others = "It waited for the other ranks, one of which may be the cause. "
        message = (
            f"rank {distributed.rank()}: phase {self.name} took longer than "
            f"run.phase_timeout_s={self.limit:g}. {others}The stacks above say where "
            "each thread stood. If the phase is merely slow, raise the limit; run.resume=true "
            "goes on from the last checkpoint."
        )
        faulthandler.dump_traceback(file=2, all_threads=True)
        record_failure(message)
        os.write(2, f"error: {message}\n".encode())
        os._exit(EXIT_HUNG)


def in_collective() -> bool:
    """Whether the main thread waits for other ranks, as far as its Python frames tell.

    CUDA's collectives return before they are done, so this is for gloo.
    """
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if _COLLECTIVES in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def record_failure(message: str) -> None:
    """Tell torchrun what it shows as this rank's failure; does nothing without torchrun."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None or os.path.exists(path):  # the first cause counts
        return
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump({"message": message, "timestamp": int(time.time())}, file)


@dataclass(slots=True)
class Clock:
    """Seconds by phase, of phases that the watchdog watches."""

    watchdog: Watchdog
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside counts to `name`; a phase that comes again goes on counting."""
        start = time.perf_counter()
        self.watchdog.phase(name)
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


# ---- memory ----


def peak_rss_mb() -> float:
    """The highest resident memory of this process so far, in MiB.

    ru_maxrss counts KiB on Linux and bytes on macOS.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Resident:
    """Resident memory of this process, asked for once a step: a leak shows as a line that rises."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._last: float | None = None

    def figures(self) -> dict[str, float]:
        """MiB: memory/rss_mb now, memory/peak_rss_mb so far, memory/growth_mb since the last step.

        The growth is 0 at the first call.
        """
        now = self._process.memory_info().rss / 2**20
        growth = 0.0 if self._last is None else now - self._last
        self._last = now
        return {
            "memory/rss_mb": now,
            "memory/peak_rss_mb": max(now, peak_rss_mb()),
            "memory/growth_mb": growth,
        }
