"""A time limit for every phase of a run; the time that it took, and the memory of its process.

A phase that hangs dumps the stack of every thread, names phase and rank, and ends the process. A
run has one watchdog (`RunContext.watchdog`). A phase that takes rows one by one calls `alive` for
each, so that the limit is for the time without progress, whatever the number of rows.
"""

import contextlib
import faulthandler
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType

import psutil

from rlhf.process import distributed

EXIT_HUNG = 124  # as timeout(1) reports it
_ALIVE_EVERY_S = 1.0  # calls of `alive` within this time of the last are ignored
# Where the interpreter can't run, C code ends the process after so many further seconds: without
# the phase's name, with exit code 1.
_GRACE_S = 60.0
# A rank that waits for others gets so much longer: torchrun shows the first failure as the cause,
# in whole seconds.
_OTHERS_FIRST_S = 10.0
_COLLECTIVES = "distributed_c10d"  # torch's file of collectives


def record_failure(message: str) -> None:
    """Tell torchrun what it shows as this rank's failure; does nothing without torchrun."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None or os.path.exists(path):  # the first cause counts
        return
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump({"message": message, "timestamp": int(time.time())}, file)


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
