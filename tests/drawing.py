"""Plots are off in tests, since each run would take a second to draw them. Tests of plots turn them
on.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from rlhf.run import plots

plot_run = plots.plot_run  # the real function


def _none(directory: Path) -> list[Path]:
    return []


def off() -> None:
    """Runs in this process draw no plots from now on."""
    plots.plot_run = _none


@contextlib.contextmanager
def on() -> Iterator[None]:
    """While inside, runs in this process draw their plots."""
    plots.plot_run = plot_run
    try:
        yield
    finally:
        off()
