"""Resident memory of this process as metrics of a step, so that a leak shows as a line that
rises.
"""

import psutil

from rlhf.run.context import peak_rss_mb


class Resident:
    """Asked once a step; `growth_mb` is what came on since it was asked before (0 at first)."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._last: float | None = None

    def figures(self) -> dict[str, float]:
        """memory/rss_mb now, memory/peak_rss_mb so far, memory/growth_mb since the last
        step; MiB.
        """
        now = self._process.memory_info().rss / 2**20
        growth = 0.0 if self._last is None else now - self._last
        self._last = now
        return {
            "memory/rss_mb": now,
            "memory/peak_rss_mb": max(now, peak_rss_mb()),
            "memory/growth_mb": growth,
        }
