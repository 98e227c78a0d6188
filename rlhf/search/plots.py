"""Plots of a search: its history, the importance of the options, the Pareto front."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.methods import Direction
from rlhf.search.trials import State, Trial

_BEST, _OTHER, _BEHIND = "#cc5533", "#3366aa", "#999999"
_DPI = 120


def _axes(width: float, height: float) -> tuple[Any, Any]:
    """A figure that needs no display, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def best_so_far(values: Sequence[float], direction: Direction) -> list[float]:
    """The best of the values up to each."""
    better = min if direction is Direction.min else max
    out: list[float] = []
    for value in values:
        best = value
        if out:
            best = better(value, out[-1])
        out.append(best)
    return out


def plot_history(
    trials: Sequence[Trial], place: int, name: str, direction: Direction, path: Path
) -> bool:
    """The values of the objective at `place` over the trials, and the best so far. Returns whether
    there was anything to draw.
    """
    complete = [trial for trial in trials if trial.state is State.complete]
    if not complete:
        return False
    figure, axes = _axes(6.4, 3.8)
    numbers = [trial.number for trial in complete]
    values = [trial.values[place] for trial in complete]
    axes.scatter(numbers, values, s=18, color=_OTHER, label="complete")
    axes.step(
        numbers, best_so_far(values, direction), where="post", color=_BEST, label="best so far"
    )
    behind = [trial for trial in trials if trial.last is not None]
    if behind:
        last = [trial.last for trial in behind]
        numbers = [trial.number for trial in behind]
        axes.scatter(numbers, last, s=18, marker="x", color=_BEHIND, label="stopped, last value")
    failed = [trial.number for trial in trials if trial.state is State.failed]
    title = name
    if failed:
        title = f"{name}, {len(failed)} failed (dotted)"
    for number in failed:
        axes.axvline(number, color=_BEHIND, linewidth=0.8, linestyle=":")
    axes.set_title(title, loc="left")
    axes.set_xlabel("trial")
    axes.set_ylabel(name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=_DPI)
    return True


def plot_importance(shares: Mapping[str, float], name: str, path: Path) -> None:
    """A bar for each option, the most important on top."""
    figure, axes = _axes(6.4, 1.2 + 0.4 * len(shares))
    keys = list(shares)
    keys.reverse()  # bars stand from below
    widths = [shares[key] for key in keys]
    axes.barh(keys, widths, color=_OTHER)
    axes.set_xlabel("share of the variance over the complete trials (fANOVA)")
    axes.set_title(f"Importance for {name}", loc="left")
    figure.savefig(path, dpi=_DPI)


def plot_front(
    trials: Sequence[Trial], front: Sequence[Trial], names: Sequence[str], path: Path
) -> None:
    """The first two objectives of all complete trials, those of the front marked by number."""
    figure, axes = _axes(5.6, 4.4)
    others = [trial for trial in trials if trial.state is State.complete and trial not in front]
    _scatter(axes, others, _OTHER, "other trials")
    _scatter(axes, front, _BEST, "Pareto front")
    for trial in front:
        place = (trial.values[0], trial.values[1])
        axes.annotate(
            str(trial.number), place, fontsize=8, textcoords="offset points", xytext=(4, 4)
        )
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=_DPI)


def _scatter(axes: Any, trials: Sequence[Trial], colour: str, label: str) -> None:
    x = [trial.values[0] for trial in trials]
    y = [trial.values[1] for trial in trials]
    axes.scatter(x, y, s=20, color=colour, label=label)
