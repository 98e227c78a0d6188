"""The report's plots as SVG that stands inside a page: no external resource, text and axes in the
page's own colour.

No row text comes into a plot: matplotlib's fonts lack the glyphs of many scripts, and the page's
tables show such names.
"""

import html
import io
import re
from typing import Any

from rlhf.data.report.records import Bars, Histogram

_INK = "#123456"  # stands for the page's text colour in what matplotlib draws
# at least 3:1 on white and on the dark page
COLOURS = ("#4a83c4", "#d0683f", "#4c9f70", "#9a6cc0", "#b08a2e", "#7f7f7f")
_BINS = 40


def draw(plot: Histogram | Bars, number: int) -> str:
    """One ``<svg>`` element. `number` keeps the ids of several plots on one page apart."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK
    )
    with mpl.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "report",
            "font.family": "sans-serif",
            "font.size": 10,
            **ink,
        }
    ):
        figure = Figure(figsize=(6.4, 3.0), layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_facecolor("none")
        if isinstance(plot, Histogram):
            _histogram(axes, plot)
        else:
            _bars(axes, plot)
        axes.spines[["top", "right"]].set_visible(False)
        out = io.StringIO()
        figure.savefig(
            out,
            format="svg",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return _inline(out.getvalue(), plot.title, number)


def _histogram(axes: Any, plot: Histogram) -> None:
    """Shares of each series, since series may have different sizes; the outer bins hold the 1 %
    beyond them too.
    """
    import numpy as np

    values = {name: np.asarray(v, dtype=float) for name, v in plot.series.items() if len(v)}
    every = np.concatenate(list(values.values()))
    low, high = (float(q) for q in np.quantile(every, [0.01, 0.99]))
    if plot.mark is not None and high < plot.mark < 3 * high:
        high = plot.mark * 1.05
    edges = np.linspace(low, high if high > low else low + 1.0, _BINS + 1)
    for (name, series), colour in zip(
        values.items(), COLOURS * (1 + len(values) // len(COLOURS)), strict=False
    ):
        weights = np.full(len(series), 1.0 / len(series))
        axes.hist(
            np.clip(series, edges[0], edges[-1]),
            bins=edges,
            weights=weights,
            histtype="step",
            linewidth=1.8,
            color=colour,
            label=name,
        )
    if plot.mark is not None and edges[0] <= plot.mark <= edges[-1]:
        axes.axvline(plot.mark, color=_INK, linewidth=1.0, linestyle="--", label=plot.mark_name)
    axes.set_xlabel(plot.unit)
    axes.set_ylabel("share of rows")
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=9)


def _bars(axes: Any, plot: Bars) -> None:
    positions = range(len(plot.labels))
    axes.bar(positions, plot.values, color=COLOURS[0])
    axes.set_xticks(list(positions), plot.labels, rotation=0 if len(plot.labels) <= 12 else 90)
    axes.set_ylabel(plot.unit)


def _inline(svg: str, title: str, number: int) -> str:
    """Without the XML head, with ids of its own, with the page's text colour, and with a name for
    those who don't see it.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="([^"]+)"', rf'id="plot{number}-\1"', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\1plot{number}-", svg)
    svg = svg.replace(_INK, "currentColor")
    return svg.replace(
        "<svg ", f'<svg role="img" aria-label="{html.escape(title, quote=True)}" ', 1
    )
