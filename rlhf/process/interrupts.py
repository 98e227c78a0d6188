"""SIGTERM and Ctrl-C.

While a stage trains, the first signal lets the step end and the run save; a second signal ends the
process at once. Everywhere else either signal ends the run in order: half-written files are
removed and trackers are closed.
"""

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, TracebackType

from rlhf.process import distributed

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# After the terminal's Ctrl-C torchrun sends each rank a signal of its own: no second wish.
_LAUNCHER_ECHO_S = 3.0


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
