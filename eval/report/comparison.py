"""Two policies for people: the table of figures before and after, samples side by side, plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.compare import Comparison, Difference
from eval.sections import Section, Table

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
_HATCHES = {"before": "", "after": "///"}  # readable without colours


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


def section(
    comparison: Comparison,
    rows: Sequence[Mapping[str, object]],
    plots: Mapping[str, Path],
    *,
    about: str,
    shown: int,
) -> Section:
    """The comparison as a part of the report. `rows`: those of `eval.compare.side_by_side`;
    `about`: a sentence that says whose answers to what; `shown`: samples.
    """
    tables = [Table.of("Before and after", table_rows(comparison))]
    tables += [Table.of(title, most) for title, most in _samples(rows, shown)]
    text = (
        about,
        "Each difference stands with its 95 % bootstrap interval, paired by prompt: where the "
        "interval holds 0, the difference may be chance.",
    )
    return Section(
        "Before and after", text, tuple(tables), dict(plots), figures=comparison.metrics()
    )


def _samples(
    rows: Sequence[Mapping[str, object]], shown: int
) -> list[tuple[str, list[dict[str, str]]]]:
    """Tables of samples by their titles: those that the first judge tells apart most, or without
    one the first.
    """
    judges = [name for name in rows[0] if f"{name}_before" in rows[0] and name != "response"]
    if not judges:
        return [("Answers", _as_text(rows[:shown], ()))]
    name = judges[0]

    def apart(row: Mapping[str, object]) -> float:
        return abs(float(str(row[name])) - float(str(row[f"{name}_before"])))

    ordered = sorted(rows, key=apart, reverse=True)
    label = _LABELS.get(name, name)
    title = f"Answers that differ most by {label}"
    return [(title, _as_text(ordered[:shown], (f"{name}_before", name)))]


def _as_text(rows: Sequence[Mapping[str, object]], figures: Sequence[str]) -> list[dict[str, str]]:
    out = []
    for row in rows:
        texts = {
            "prompt": str(row["prompt"]),
            "before": str(row["response_before"]),
            "after": str(row["response"]),
        }
        for name in figures:
            texts[name.replace("_", " ")] = f"{float(str(row[name])):.3f}"
        out.append(texts)
    return out


def sample_rows(rows: Sequence[Mapping[str, object]], shown: int) -> list[dict[str, object]]:
    """The first `shown` samples side by side, with the score where there is one."""
    columns = ("prompt", "response_before", "response", "score_before", "score")
    names = {"response_before": "before", "response": "after"}
    return [
        {names.get(key, key): row[key] for key in columns if key in row} for row in rows[:shown]
    ]


def plot(
    comparison: Comparison, scores: Mapping[str, Mapping[str, Sequence[float]]], folder: Path
) -> dict[str, Path]:
    """Write PNGs into `folder`: a histogram of each judge's values, and the differences with their
    intervals. `scores`: judge -> "before" or "after" -> values. Returns the paths by what each
    shows; nothing is drawn without a judge.
    """
    if not scores:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, values in scores.items():
        shows = f"How often each value of {_LABELS.get(name, name)} was given, before and after"
        paths[shows] = _plot_histogram(name, values, folder / f"histogram_{name}.png")
    drawn = [d for d in comparison.differences if d.name in scores]
    shows = "Means before and after, with the 95 % interval of each difference (table above)"
    paths[shows] = _plot_differences(drawn, folder / "differences.png")
    return paths


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
            hatch=_HATCHES[side],
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

    figure = Figure(figsize=(max(5.2, 2.6 * len(differences)), 3.5), layout="constrained")
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
