"""Seconds of each phase of a run."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf.process.watchdog import Watchdog


@dataclasses.dataclass(slots=True)
class PhaseClock:
    """Measures phases, and tells the watchdog which one runs."""

    watchdog: Watchdog
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # by phase

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the ``with`` block to the phase `name`."""
        start = time.perf_counter()
        self.watchdog.phase(name)
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
