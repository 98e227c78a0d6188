"""Resident memory of this process as metrics of a step: a leak shows as a line that rises."""

import resource
import sys

import psutil


def peak_rss_mb() -> float:
    """The highest resident memory of this process so far, in MiB.

    ru_maxrss counts KiB on Linux and bytes on macOS.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Resident:
    """Memory figures, asked for once a step."""

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
