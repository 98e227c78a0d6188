"""PNG plots of a run from its metrics.jsonl; which plots there are follows from the metric names
present.
"""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.online.watch import Point
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
        (
            Panel(
                "Learning rate",
                "rate",
                ("learning_rate", "train/learning_rate", "train/critic_learning_rate"),
            ),
        ),
    ),
    Figure(
        "grad_norm",
        (
            Panel(
                "Gradient norm",
                "norm before clipping",
                ("grad_norm", "train/grad_norm", "train/critic_grad_norm"),
            ),
        ),
    ),
    Figure(
        "timing",
        (
            Panel("Where a step's time goes", "seconds", ("time/*_s",), stacked=True),
            Panel(
                "Throughput", "tokens per second", ("rollout/tokens_per_s", "train/tokens_per_s")
            ),
        ),
    ),
)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values up to each point; the first points have what there is.
    Length kept.
    """
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value
        if i >= window:
            total -= values[i - window]
        out.append(total / min(i + 1, window))
    return out


def collect(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Per metric name, the steps and values that are numbers (nulls stand for NaN and are left
    out).
    """
    series: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if (
                name not in ("step", "time_s")
                and isinstance(value, (int, float))
                and not isinstance(value, bool)
            ):
                steps, values = series.setdefault(name, ([], []))
                steps.append(int(row["step"]))
                values.append(float(value))
    return series


def _matching(panel: Panel, names: Sequence[str]) -> list[str]:
    """The panel's metrics among `names`: in its own order, patterns sorted; a step's total is no
    part of a stack.
    """
    found = [
        n
        for pattern in panel.names
        for n in sorted(fnmatch.filter(names, pattern))
        if not any(fnmatch.fnmatch(n, w) for w in panel.without)
    ]
    return [
        n for n in dict.fromkeys(found) if not (panel.stacked and re.search(r"/(step|total)_s$", n))
    ]


def _draw(
    axes: Any,
    panel: Panel,
    names: Sequence[str],
    series: Mapping[str, tuple[list[int], list[float]]],
) -> None:
    if panel.stacked:
        steps = sorted({s for n in names for s in series[n][0]})
        rows = [[dict(zip(*series[n], strict=True)).get(s, 0.0) for s in steps] for n in names]
        labels = [n.split("/", 1)[1].removesuffix("_s") for n in names]
        axes.stackplot(
            steps,
            rows,
            labels=labels,
            colors=[_COLOURS[i % len(_COLOURS)] for i in range(len(names))],
        )
    else:
        for i, name in enumerate(names):
            steps, values = series[name]
            colour = _COLOURS[i % len(_COLOURS)]
            if len(values) >= _SMOOTH_FROM:
                axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
                axes.plot(
                    steps,
                    running_mean(values, len(values) // 20 or 1),
                    color=colour,
                    linewidth=1.8,
                    label=name,
                )
            else:
                axes.plot(
                    steps, values, color=colour, linewidth=1.6, marker="o", markersize=3, label=name
                )
    axes.set_title(panel.title, fontsize=11, loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if panel.stacked:  # beside the axes: the colours fill them
        axes.legend(
            fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True
        )
    elif len(names) > 1:
        axes.legend(fontsize=8, frameon=False, loc="best")


def plot_run(dir: Path) -> list[Path]:
    """Draw ``<dir>/plots/*.png`` from ``<dir>/metrics.jsonl``; returns the files written (none
    without metrics).
    """
    series = collect(read_jsonl(Path(dir) / METRICS_FILE))
    written: list[Path] = []
    if not series:
        return written
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    for figure in FIGURES:
        panels = [(p, _matching(p, list(series))) for p in figure.panels]
        panels = [(p, names) for p, names in panels if names]
        if not panels:
            continue
        canvas = Canvas(figsize=(5.2 * len(panels), 3.6), layout="constrained")
        FigureCanvasAgg(canvas)
        for i, (panel, names) in enumerate(panels):
            _draw(canvas.add_subplot(1, len(panels), i + 1), panel, names, series)
        path = Path(dir) / "plots" / f"{figure.file}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(path, dpi=120)
        written.append(path)
    return written


def plot_frontier(
    points: Sequence[Point], path: Path, best: int | None = None, stopped: int | None = None
) -> bool:
    """What the distance from the reference buys: the score that trains, and the judge, against KL;
    each point is a state of the policy.

    `best` and `stopped` are steps to mark. A run's last weights wrote no rollouts, so they are
    drawn at the KL of one update before. Returns whether there was anything to draw.
    """
    measured = {p.step: p.kl for p in points if p.kl is not None}
    placed = [(p, measured.get(p.step, measured.get(p.step - 1))) for p in points]
    scores = [(p.step, kl, p.score) for p, kl in placed if kl is not None and p.score is not None]
    judged = [(p.step, kl, p.judge) for p, kl in placed if kl is not None and p.judge is not None]
    panels = [
        (title, sorted(rows))
        for title, rows in (("Score that trains", scores), ("Held-out judge", judged))
        if rows
    ]
    if not panels:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(5.2 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(canvas)
    for i, (title, rows) in enumerate(panels):
        axes = canvas.add_subplot(1, len(panels), i + 1)
        steps, kl, values = zip(*rows, strict=True)
        axes.plot(kl, values, color="#999999", linewidth=0.8)
        colours = axes.scatter(kl, values, c=steps, cmap="viridis", s=16, zorder=2)
        for label, wanted, marker in (("best by the judge", best, "o"), ("stopped", stopped, "X")):
            marked = [(x, y) for step, x, y in rows if step == wanted]
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
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("KL against the reference, nats per response")
        axes.set_ylabel("score")
        axes.grid(True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, frameon=False, loc="best")
        if i == len(panels) - 1:
            canvas.colorbar(colours, ax=axes, label="step")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=120)
    return True
