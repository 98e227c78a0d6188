"""PNG plots of a run from its metrics.jsonl; which plots there are follows from the metric names
present.
"""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlhf.run.tracking.files import METRICS_FILE, read_jsonl

_SMOOTH_FROM = 40  # points from which a running mean is drawn over the raw series
_COLOURS = ("#3366aa", "#cc5533", "#449966", "#8855aa", "#bb9922", "#555555", "#2299aa", "#dd6699")


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes: metric names (or patterns) that share a unit."""

    title: str
    unit: str
    names: tuple[str, ...]
    stacked: bool = False
    without: tuple[str, ...] = ()  # patterns of names that have another unit


@dataclass(frozen=True, slots=True)
class Figure:
    """One PNG: its panels side by side; panels without a metric are left out."""

    file: str
    panels: tuple[Panel, ...]


# among reward/*, but no scores
_SHARES = ("reward/*_correlation", "reward/truncated", "reward/clipped")

FIGURES: tuple[Figure, ...] = (
    Figure(
        "loss",
        (
            Panel("Loss", "loss", ("loss", "eval_loss")),
            Panel("Policy loss", "loss", ("loss/policy",)),
            Panel("Value loss", "loss", ("loss/value",)),
            Panel("Explained variance of the value", "share", ("value/explained_variance",)),
        ),
    ),
    Figure(
        "score",
        (
            Panel(
                "Score",
                "reward-model score",
                ("objective/scores", "objective/rlhf_reward", "eval/scores"),
            ),
            Panel("Reward terms", "score", ("reward/*",), without=_SHARES),
            Panel(
                "Scores of the batch",
                "score",
                ("mean_reward", "min_reward", "max_reward", "eval_mean_reward"),
            ),
        ),
    ),
    Figure(
        "kl",
        (
            Panel("KL against the reference", "nats per response", ("objective/kl",)),
            Panel("KL per token", "nats per token", ("objective/kl_per_token",)),
            Panel("KL old to new policy", "nats per token", ("policy/approxkl",)),
            Panel("KL coefficient", "coefficient", ("objective/kl_coef",)),
        ),
    ),
    Figure(
        "watch",
        (
            Panel("Held-out judge", "score", ("judge/score",)),
            Panel("Training's score of the same responses", "score", ("judge/proxy",)),
            Panel("The score goes with", "correlation", ("reward/*_correlation",)),
            Panel("Truncated responses", "share", ("reward/truncated", "judge/truncated")),
        ),
    ),
    Figure(
        "group",
        (
            Panel("Responses to one prompt", "score", ("group/std", "group/gain")),
            Panel("Groups of equal scores", "share", ("group/equal",)),
        ),
    ),
    Figure(
        "length",
        (
            Panel("Response length", "tokens", ("rollout/response_length",)),
            Panel("Finished responses", "share", ("rollout/finished",)),
        ),
    ),
    Figure(
        "turns",
        (
            Panel("Episodes that succeeded", "share", ("environment/success",)),
            Panel("Rewards from a turn on", "reward", ("turn/return_*",)),
            Panel("Turns", "turns per episode", ("rollout/turns",)),
            Panel("Episodes that a limit ended", "share", ("rollout/ended_*",)),
        ),
    ),
    Figure(
        "margins",
        (
            Panel(
                "Margin chosen - rejected",
                "score",
                ("margin", "eval_margin", "rewards/margins", "eval_rewards/margins"),
            ),
            Panel(
                "Accuracy",
                "share of pairs",
                ("accuracy", "eval_accuracy", "rewards/accuracies", "eval_rewards/accuracies"),
            ),
        ),
    ),
    Figure(
        "token_accuracy",
        (
            Panel(
                "Token accuracy",
                "share of tokens",
                ("mean_token_accuracy", "eval_mean_token_accuracy"),
            ),
        ),
    ),
    Figure(
        "policy",
        (
            Panel("Entropy", "nats per token", ("objective/entropy", "entropy", "eval_entropy")),
            Panel("Clipped tokens", "share", ("policy/clipfrac", "value/clipfrac")),
            Panel("Ratio new / old", "ratio", ("policy/ratio",)),
            Panel("Sampler against trainer", "nats", ("rollout/logprob_gap",)),
        ),
    ),
    Figure(
        "learning_rate",
        (Panel("Learning rate", "rate", ("learning_rate", "train/*learning_rate")),),
    ),
    Figure(
        "grad_norm",
        (Panel("Gradient norm", "norm before clipping", ("grad_norm", "train/*grad_norm")),),
    ),
    Figure(
        "timing",
        (
            Panel("Where a step's time goes", "seconds", ("time/*_s",), stacked=True),
            Panel("Throughput", "tokens per second", ("*/tokens_per_s",)),
        ),
    ),
)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values up to each point, of fewer at the beginning."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value
        if i >= window:
            total -= values[i - window]
        out.append(total / min(i + 1, window))
    return out


Series = tuple[list[int], list[float]]  # steps and values


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def collect(rows: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Per metric name, the steps and values that are numbers.

    Nulls, which stand for NaN, are left out.
    """
    series: dict[str, Series] = {}
    for row in rows:
        for name, value in row.items():
            if name in ("step", "time_s") or not _is_number(value):
                continue
            steps, values = series.setdefault(name, ([], []))
            steps.append(int(row["step"]))
            values.append(float(value))
    return series


def matching(panel: Panel, names: Sequence[str]) -> list[str]:
    """The panel's metrics among `names`, in its own order, those of a pattern sorted.

    A step's total is no part of a stack.
    """
    matching: dict[str, None] = {}
    for pattern in panel.names:
        for name in sorted(fnmatch.filter(names, pattern)):
            excluded = any(fnmatch.fnmatch(name, other) for other in panel.without)
            is_total = panel.stacked and re.search(r"/(step|total)_s$", name)
            if not excluded and not is_total:
                matching[name] = None
    return list(matching)


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _draw_stack(axes: Any, names: Sequence[str], series: Mapping[str, Series]) -> None:
    steps = sorted({step for name in names for step in series[name][0]})
    heights = []
    for name in names:
        by_step = dict(zip(*series[name], strict=True))
        heights.append([by_step.get(step, 0.0) for step in steps])
    labels = [name.split("/", 1)[1].removesuffix("_s") for name in names]
    colours = [_colour(i) for i in range(len(names))]
    axes.stackplot(steps, heights, labels=labels, colors=colours)


def _draw_lines(axes: Any, names: Sequence[str], series: Mapping[str, Series]) -> None:
    for i, name in enumerate(names):
        steps, values = series[name]
        if len(values) < _SMOOTH_FROM:
            axes.plot(
                steps, values, color=_colour(i), linewidth=1.6, marker="o", markersize=3, label=name
            )
            continue
        smooth = running_mean(values, len(values) // 20 or 1)
        axes.plot(steps, values, color=_colour(i), alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth, color=_colour(i), linewidth=1.8, label=name)


def _finish_axes(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw(axes: Any, panel: Panel, names: Sequence[str], series: Mapping[str, Series]) -> None:
    draw = _draw_stack if panel.stacked else _draw_lines
    draw(axes, names, series)
    _finish_axes(axes, panel.title, "step", panel.unit)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if panel.stacked:  # beside the axes: the colours fill them
        axes.legend(
            fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True
        )
    elif len(names) > 1:
        axes.legend(fontsize=8, frameon=False, loc="best")


def _new_canvas(panels: int) -> Any:
    """A figure for so many panels side by side; it needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(5.2 * panels, 3.6), layout="constrained")
    FigureCanvasAgg(canvas)
    return canvas


def _save(canvas: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=120)


def plot_run(directory: Path) -> list[Path]:
    """Draw ``<directory>/plots/*.png`` from its metrics.jsonl.

    Returns the files written, [] where there are no metrics.
    """
    series = collect(read_jsonl(directory / METRICS_FILE))
    written: list[Path] = []
    for figure in FIGURES:
        panels = []
        for panel in figure.panels:
            names = matching(panel, list(series))
            if names:
                panels.append((panel, names))
        if not panels:
            continue
        canvas = _new_canvas(len(panels))
        for i, (panel, names) in enumerate(panels):
            _draw(canvas.add_subplot(1, len(panels), i + 1), panel, names, series)
        path = directory / "plots" / f"{figure.file}.png"
        _save(canvas, path)
        written.append(path)
    return written


# What is drawn of the blocks of a model: the key, the panel's title and unit.
_BLOCKS = (
    ("dimension", "Intrinsic dimension of the hidden states", "dimensions"),
    ("rank", "Rank of the updates", "rank"),
)


def plot_blocks(found: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draw into `path` what a method found of a model's blocks, values by names of modules such as
    ``model.layers.3.mlp.up_proj``: a line for each kind of module over the blocks' numbers.
    """
    panels = [panel for panel in _BLOCKS if panel[0] in found]
    canvas = _new_canvas(len(panels))
    for i, (key, title, unit) in enumerate(panels):
        series: dict[str, Series] = {}
        for name, value in found[key].items():
            number = re.search(r"\.(\d+)", name)
            kind = name[number.end() :] if number else name
            blocks, values = series.setdefault(kind.rsplit(".", 1)[-1], ([], []))
            blocks.append(int(number[1]) if number else 0)
            values.append(value)
        axes = canvas.add_subplot(1, len(panels), i + 1)
        _draw_lines(axes, list(series), series)
        _finish_axes(axes, title, "block", unit)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(series) > 1:  # beside the axes: lines are everywhere
            axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(canvas, path)


class PolicyState(Protocol):
    """What is drawn of a state of the policy; None where it was not measured."""

    step: int  # updates done
    kl: float | None  # nats per response
    score: float | None  # the reward that trains
    judge: float | None


Row = tuple[int, float, float]  # step, KL in nats per response, score


def _frontier(points: Sequence[PolicyState]) -> dict[str, list[Row]]:
    """Panel title -> rows sorted by step; panels without a row are left out.

    A run's last weights wrote no rollouts, so they stand at the KL of the update before.
    """
    measured = {point.step: point.kl for point in points if point.kl is not None}
    panels: dict[str, list[Row]] = {"Score that trains": [], "Held-out judge": []}
    for point in points:
        kl = measured.get(point.step, measured.get(point.step - 1))
        if kl is None:
            continue
        if point.score is not None:
            panels["Score that trains"].append((point.step, kl, point.score))
        if point.judge is not None:
            panels["Held-out judge"].append((point.step, kl, point.judge))
    return {title: sorted(rows) for title, rows in panels.items() if rows}


def _mark(axes: Any, rows: Sequence[Row], step: int | None, label: str, marker: str) -> None:
    """A large symbol around the state after `step`, where it was drawn."""
    marked = [(kl, score) for at, kl, score in rows if at == step]
    if marked:
        axes.scatter(
            *marked[0],
            marker=marker,
            s=110,
            facecolors="none",
            edgecolors=_COLOURS[1],
            label=label,
            zorder=3,
        )


def plot_frontier(
    points: Sequence[PolicyState], path: Path, best: int | None = None, stopped: int | None = None
) -> bool:
    """Draw the score that trains, and the judge, against the distance from the reference.

    `best` and `stopped` are steps to mark. Returns whether there was anything to draw.
    """
    panels = _frontier(points)
    if not panels:
        return False
    canvas = _new_canvas(len(panels))
    for i, (title, rows) in enumerate(panels.items()):
        axes = canvas.add_subplot(1, len(panels), i + 1)
        steps, kl, values = zip(*rows, strict=True)
        axes.plot(kl, values, color="#999999", linewidth=0.8)
        colours = axes.scatter(kl, values, c=steps, cmap="viridis", s=16, zorder=2)
        _mark(axes, rows, best, "best by the judge", "o")
        _mark(axes, rows, stopped, "stopped", "X")
        _finish_axes(axes, title, "KL against the reference, nats per response", "score")
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, frameon=False, loc="best")
        if i == len(panels) - 1:
            canvas.colorbar(colours, ax=axes, label="step")
    _save(canvas, path)
    return True
