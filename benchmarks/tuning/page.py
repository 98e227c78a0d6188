"""The table and the picture of docs/tuning.md."""

import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.tuning.cases import CASES

PAGE = Path("docs/tuning.md")
PICTURE = Path("docs/images/tuning.png")
BEGIN, END = "<!-- figures of make bench-tuning -->\n", "<!-- end of the figures -->\n"
HEAD = (
    "| way | trains | share | peak MiB | s a step | held-out loss | accuracy | rate |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
)
_BESIDE, _COLUMN = 1.2, 1.6  # as factors of parameters: a name's distance, a column's width
_LINE = 0.037  # height of a name, nats
_COLOURS = {"weights": "#2680c2", "low rank": "#d64545", "modules": "#3f9142", "prompt": "#8719e0"}


def write(known: Mapping[str, Any]) -> None:
    """Put both in their places, in the order of the cases."""
    results = {name: known[name] for name in CASES if name in known}
    text = PAGE.read_text(encoding="utf-8")
    start = results["full"]["start"]
    untrained = (
        f"| untrained | 0 | 0 | - | - | {start['loss']:.3f} | {start['accuracy']:.2f} | - |\n"
    )
    rows = "".join(f"{row(name, result)}\n" for name, result in results.items())
    block = f"{BEGIN}{HEAD}{untrained}{rows}{END}"
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{PAGE} has no place for the figures: {BEGIN.strip()}")
    PAGE.write_text(pattern.sub(lambda _: block, text), encoding="utf-8")
    draw(results)


def mean(result: Mapping[str, Any], name: str) -> float:
    """A figure over the seeds."""
    return statistics.fmean(run[name] for run in result["runs"])


def beats_start(result: Mapping[str, Any], start: Mapping[str, Any]) -> bool:
    """Whether the held-out loss is below that of the untrained model, whose figures are `start`."""
    return mean(result, "loss") < start["loss"]


def row(name: str, result: Mapping[str, Any]) -> str:
    """A row of the table: means over the seeds, the loss with its range."""
    trained, total = result["runs"][0]["trained"], result["runs"][0]["total"]
    losses = [run["loss"] for run in result["runs"]]
    cells = [
        name,
        f"{trained:,}",
        f"{100 * trained / total:.3g} %",
        f"{max(run['peak_mib'] for run in result['runs']):,.0f}",
        f"{mean(result, 'step_s'):.2f}",
        f"{statistics.fmean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})",
        f"{mean(result, 'accuracy'):.2f}",
        f"{result['rate']:g}",
    ]
    return f"| {' | '.join(cells)} |"


def label_places(points: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Where names stand: right of their points (parameters, loss), those of one column one above
    the other.
    """
    places: dict[str, tuple[float, float]] = {}
    for name, (x, y) in sorted(points.items(), key=lambda item: item[1][1]):
        right = x * _BESIDE
        taken = [b for a, b in places.values() if 1 / _COLUMN < a / right < _COLUMN]
        places[name] = (right, max([y, *(other + _LINE for other in taken)]))
    return places


def draw(results: Mapping[str, Any]) -> None:
    """Held-out loss against what trains."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8.2, 5.6))
    points = {}
    for name, result in results.items():
        x, y = result["runs"][0]["trained"], mean(result, "loss")
        axes.scatter([x], [y], color=_COLOURS[CASES[name].family], s=22)
        points[name] = (x, y)
    line = {"arrowstyle": "-", "color": "grey", "linewidth": 0.4}
    for name, place in label_places(points).items():
        axes.annotate(name, points[name], xytext=place, fontsize=7, va="center", arrowprops=line)
    for family, colour in _COLOURS.items():
        axes.scatter([], [], color=colour, label=family)
    start = results["full"]["start"]["loss"]
    axes.set(xscale="log", xlabel="parameters that train", ylabel="held-out loss (nats)")
    title = f"make bench-tuning: SmolLM2-135M, mean of three seeds (untrained: {start:.2f} nats)"
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)
    plt.close(figure)
