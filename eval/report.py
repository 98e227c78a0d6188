"""An evaluation for people: the table of figures before and after, samples side by side, plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.compare import Comparison, Difference

_LABELS = {
    "score": "reward-model score",
    "lexicon": "judge: lexicon",
    "classifier": "judge: classifier",
    "function": "judge: function",
    "length": "response length (tokens)",
    "finished": "finished share",
    "distinct_2": "distinct-2",
    "turns": "turns of an episode",
    "tokens": "tokens of an episode",
    "success": "success of episodes",
}
_COLOURS = {"before": "#777777", "after": "#3366aa"}


def table_rows(comparison: Comparison) -> list[dict[str, str]]:
    """Rows of the table: figure, before, after, difference with its 95 % interval."""
    rows = [_row(d) for d in comparison.differences]
    if comparison.score_shift is not None:
        shift = comparison.score_shift
        change = f"{shift.estimate:+.2f}  [{shift.low:+.2f}, {shift.high:+.2f}]"
        rows.insert(
            1,
            {
                "figure": "  in standard deviations",
                "before": "0",
                "after": f"{shift.estimate:.2f}",
                "difference [95 %]": change,
            },
        )
    kl = comparison.kl_per_response
    rows.append(
        {
            "figure": "KL (nats per token)",
            "before": "0",
            "after": f"{comparison.kl_per_token:.3f}",
            "difference [95 %]": "",
        }
    )
    interval = f"{kl.estimate:+.2f}  [{kl.low:+.2f}, {kl.high:+.2f}]"
    rows.append(
        {
            "figure": "KL (nats per response)",
            "before": "0",
            "after": f"{kl.estimate:.2f}",
            "difference [95 %]": interval,
        }
    )
    return rows


def _row(difference: Difference) -> dict[str, str]:
    change = f"{difference.delta:+.3f}"
    if difference.interval is not None:
        change += f"  [{difference.interval.low:+.3f}, {difference.interval.high:+.3f}]"
    elif difference.before:
        change += f"  ({difference.after / difference.before:.0%} of before)"
    label = _LABELS.get(difference.name, difference.name)
    return {
        "figure": label,
        "before": f"{difference.before:.3f}",
        "after": f"{difference.after:.3f}",
        "difference [95 %]": change,
    }


def sample_rows(rows: Sequence[Mapping[str, object]], shown: int) -> list[dict[str, object]]:
    """The first `shown` samples side by side, with the score where there is one."""
    columns = ("prompt", "response_before", "response", "score_before", "score")
    names = {"response_before": "before", "response": "after"}
    return [
        {names.get(key, key): row[key] for key in columns if key in row} for row in rows[:shown]
    ]


def plot(
    comparison: Comparison, scores: Mapping[str, Mapping[str, Sequence[float]]], folder: Path
) -> list[Path]:
    """Write PNGs into `folder`: a histogram of each judge's values, and the differences with their
    intervals. `scores`: judge -> "before" or "after" -> values. Returns the paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [
        _plot_histogram(name, values, folder / f"histogram_{name}.png")
        for name, values in scores.items()
    ]
    drawn = [d for d in comparison.differences if d.name in scores]
    return [*paths, _plot_differences(drawn, folder / "differences.png")]


def _plot_histogram(name: str, values: Mapping[str, Sequence[float]], path: Path) -> Path:
    """The values of a judge, before and after."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    every = [*values["before"], *values["after"]]
    low, high = min(every), max(every)
    if low == high:
        low, high = low - 0.5, high + 0.5
    for side in ("before", "after"):
        axes.hist(
            list(values[side]),
            bins=30,
            range=(low, high),
            alpha=0.6,
            label=side,
            color=_COLOURS[side],
        )
    label = _LABELS.get(name, name)
    axes.set_title(f"{label}, {len(values['before'])} responses each")
    axes.set_xlabel(label)
    axes.set_ylabel("responses")
    axes.legend()
    figure.savefig(path, dpi=110)
    return path


def _plot_differences(differences: Sequence[Difference], path: Path) -> Path:
    """A panel for each judge: both means, and the difference's interval on the bar "after"."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * max(1, len(differences)), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, difference in zip(
        figure.subplots(1, max(1, len(differences)), squeeze=False)[0], differences, strict=False
    ):
        axes.bar(
            ["before", "after"],
            [difference.before, difference.after],
            color=list(_COLOURS.values()),
        )
        if difference.interval is not None:
            below, above = (
                difference.delta - difference.interval.low,
                difference.interval.high - difference.delta,
            )
            axes.errorbar(
                ["after"],
                [difference.after],
                yerr=[[max(0.0, below)], [max(0.0, above)]],
                color="black",
                capsize=4,
            )
        axes.axhline(0.0, color="black", linewidth=0.6)
        axes.set_title(_LABELS.get(difference.name, difference.name), fontsize=9)
    figure.suptitle("Means; the whisker is the 95 % interval of the difference", fontsize=9)
    figure.savefig(path, dpi=110)
    return path
