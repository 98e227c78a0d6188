"""Which curves a run has: the panels of rlhf/run/plots.py, memory, and each metric by itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf.board.runs.drawing import LINES
from rlhf.board.runs.metrics import Series
from rlhf.run.plots import FIGURES, Panel, matching

_MEMORY = Panel("Memory", "MiB", ("memory/rss_mb", "memory/peak_rss_mb"))


@dataclass(frozen=True, slots=True)
class Chosen:
    """A panel with metrics that a run has. key: its name in an address, "" for a metric by itself,
    whose title is its own name and which has no unit; title, unit: as the panel has them, in
    English.
    """

    key: str
    title: str
    unit: str
    names: tuple[str, ...]
    left_out: int = 0  # metrics that did not fit


def _all_panels() -> dict[str, Panel]:
    out = {}
    for figure in FIGURES:
        for number, panel in enumerate(figure.panels):
            out[f"{figure.file}-{number}"] = panel
    out["memory"] = _MEMORY
    return out


PANELS = _all_panels()


def panels(names: Sequence[str]) -> list[Chosen]:
    """The panels of a run with the metrics `names`."""
    chosen = []
    for key in PANELS:
        panel = by_key(key, names)
        if panel is not None:
            chosen.append(panel)
    return chosen


def by_key(key: str, names: Sequence[str]) -> Chosen | None:
    """The panel `key`; None where there is none, or where the run has nothing for it."""
    panel = PANELS.get(key)
    found = [] if panel is None else matching(panel, names)
    if panel is None or not found:
        return None
    return Chosen(key, panel.title, panel.unit, tuple(found[:LINES]), max(0, len(found) - LINES))


def alone(name: str, names: Sequence[str]) -> Chosen | None:
    """A metric by itself; None for one that the run has not."""
    return Chosen("", name, "", (name,)) if name in names else None


def others(names: Sequence[str]) -> list[str]:
    """The metrics that stand in no panel's picture."""
    shown = {name for panel in panels(names) for name in panel.names}
    return sorted(set(names) - shown)


def picked(panel: Chosen, series: Mapping[str, Series]) -> dict[str, Series]:
    """The panel's series."""
    return {name: series[name] for name in panel.names if name in series}
