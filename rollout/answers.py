"""What environments answer: many at the same time, each within a time limit.

A thread can't be ended. One that takes too long is left to itself, another takes over its work, and
none keeps the process from ending.
"""

import asyncio
import inspect
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rlhf.process import supervision

LOOK_S = 1.0  # between two words to the watchdog
Result = TypeVar("Result")


class TooLong(Exception):
    """An environment exceeded its limit."""


class GivenUp(TooLong):
    """It still does: its thread is left to itself."""


@dataclass(frozen=True, slots=True)
class Answered(Generic[Result]):
    """What became of a call: a value, or what it raised."""

    value: Result | None = None
    error: Exception | None = None
    took_s: float = 0.0


class SideBySide(Generic[Result]):
    """Calls that run in threads until each has a value, has raised, or is given up."""

    def __init__(
        self,
        calls: Sequence[Callable[[], Result]],
        *,
        limit_s: float,
        returned_late: Callable[[int], None] = lambda index: None,
    ) -> None:
        """`limit_s`: of each call, from when it begins. `returned_late`: told the number
        of a call that was given up and ends after all, in its thread.
        """
        self._calls, self._limit_s, self._returned_late = calls, limit_s, returned_late
        self._changed = threading.Condition()
        self._waiting = deque(range(len(calls)))
        self._began: dict[int, float] = {}  # of the calls that run
        self._answered: dict[int, Answered[Result]] = {}

    def run(self, workers: int) -> list[Answered[Result]]:
        """The answers in the order of the calls, at most `workers` of which run at a time."""
        for _ in range(min(workers, len(self._calls))):
            self._start()
        seen = 0
        with self._changed:
            while len(self._answered) < len(self._calls):
                self._changed.wait(self._patience())
                self._give_up()
                if len(self._answered) > seen:
                    seen = len(self._answered)
                    tell_progress()
        return [self._answered[index] for index in range(len(self._calls))]

    def _start(self) -> None:
        threading.Thread(target=self._work, name="environment", daemon=True).start()

    def _patience(self) -> float:
        """Seconds until the next call may be given up."""
        first = min(self._began.values(), default=time.monotonic())
        return max(0.0, min(LOOK_S, first + self._limit_s - time.monotonic()))

    def _give_up(self) -> None:
        now = time.monotonic()
        late = [index for index, began in self._began.items() if now - began >= self._limit_s]
        for index in late:
            took_s = now - self._began.pop(index)
            self._answered[index] = Answered(error=GivenUp(), took_s=took_s)
            if self._waiting:
                self._start()

    def _work(self) -> None:
        """In a thread: calls until none waits, or this one was given up."""
        while True:
            with self._changed:
                if not self._waiting:
                    return
                index = self._waiting.popleft()
                self._began[index] = time.monotonic()
            answered = self._answer(index)
            with self._changed:
                late = index in self._answered
                if not late:
                    del self._began[index]
                    self._answered[index] = answered
                if len(self._answered) == len(self._calls):
                    self._changed.notify_all()
            if late:
                self._returned_late(index)
                return

    def _answer(self, index: int) -> Answered[Result]:
        began = time.monotonic()
        try:
            value = self._calls[index]()
        except Exception as error:  # noqa: BLE001 - who asked judges it
            return Answered(error=error, took_s=time.monotonic() - began)
        return Answered(value, took_s=time.monotonic() - began)


def tell_progress() -> None:
    """The phase goes on, where it is the main thread's."""
    if threading.current_thread() is threading.main_thread():
        supervision.alive()


class Waiter:
    """Waits for coroutines of one environment, in a loop that is its own as long as it lives."""

    def __init__(self, limit_s: float) -> None:
        """`limit_s`: of each coroutine, which is then cancelled."""
        self._limit_s = limit_s
        self._loop: asyncio.AbstractEventLoop | None = None

    def finished(self, value: Any) -> Any:
        """`value`, or what it becomes where it is awaitable. Raises TooLong, and what it raises."""
        if not inspect.isawaitable(value):
            return value
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(self._within(value))

    async def _within(self, value: Any) -> Any:
        try:
            async with asyncio.timeout(self._limit_s) as scope:
                return await value
        except TimeoutError as error:
            if scope.expired():
                raise TooLong from error
            raise

    def close(self) -> None:
        """The environment is closed."""
        if self._loop is not None:
            self._loop.close()
