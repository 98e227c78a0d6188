"""Pictures of reward models: PNG files, readable without colours."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.rewards.best_of import Curve
from eval.rewards.calibration import Calibrated, Calibration
from eval.rewards.fitting import Fit
from eval.statistics import Interval

_BLUE, _ORANGE, _GREY = "#3366aa", "#cc5533", "#555555"


def _canvas(panels: int) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * panels, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Any, columns: int, number: int, title: str, x: str, y: str) -> Any:
    axes = figure.add_subplot(1, columns, number)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _points(
    axes: Any, x: Sequence[float], y: Sequence[Interval], label: str, style: Mapping[str, Any]
) -> None:
    """Estimates with whiskers from low to high."""
    middle, below, above = [], [], []
    for one in y:
        middle.append(one.estimate)
        below.append(max(0.0, one.estimate - one.low))
        above.append(max(0.0, one.high - one.estimate))
    axes.errorbar(x, middle, yerr=[below, above], capsize=3, label=label, **style)


def plot_reliability(models: Mapping[str, Calibrated], path: Path) -> Path:
    """A panel for each model: share of right pairs over confidence, as it is and with the fitted
    temperature.
    """
    plain = {"color": _BLUE, "marker": "o", "linestyle": "-"}
    tempered = {"color": _ORANGE, "marker": "s", "linestyle": "--"}
    panels = len(models)
    figure = _canvas(panels)
    for number, (name, found) in enumerate(models.items(), start=1):
        axes = _axes(figure, panels, number, name, "confidence", "share of pairs right")
        axes.plot([0.5, 1], [0.5, 1], color=_GREY, linestyle=":", label="calibrated")
        _reliability(axes, found.plain, "as it is", plain)
        label = f"temperature {found.tempered.temperature:.2g}"
        _reliability(axes, found.tempered, label, tempered)
        axes.legend(fontsize=8, frameon=False, loc="lower right")
    return _save(figure, path)


def _reliability(axes: Any, found: Calibration, label: str, style: Mapping[str, Any]) -> None:
    x = [one.confidence for one in found.bins]
    y = [one.right for one in found.bins]
    _points(axes, x, y, label, style)


def plot_best_of(curve: Curve, proxy: str, judge: str, path: Path) -> Path:
    """Two panels over n: what the best by the proxy is worth to the proxy, and to the judge."""
    figure = _canvas(2)
    ticks = [str(n) for n in curve.n]
    values = ((proxy, curve.proxy, _BLUE, "o"), (judge, curve.judge, _ORANGE, "s"))
    for number, (name, points, colour, marker) in enumerate(values, start=1):
        axes = _axes(figure, 2, number, name, "n, the best of which is taken", "mean score")
        _points(axes, curve.n, points, name, {"color": colour, "marker": marker})
        axes.set_xscale("log", base=2)
        axes.set_xticks(curve.n, ticks)
    return _save(figure, path)


def plot_laws(
    series: Mapping[str, tuple[Sequence[float], Sequence[float], Fit | None]], path: Path
) -> Path:
    """A panel for each score over sqrt(KL), with the fitted law. `series`: KL in nats, scores and
    the fit by name.
    """
    figure = _canvas(len(series))
    for number, (name, (kl, scores, fit)) in enumerate(series.items(), start=1):
        axes = _axes(figure, len(series), number, name, "sqrt(KL in nats)", "mean score")
        roots = [nats**0.5 for nats in kl]
        axes.plot(roots, scores, "o", color=_BLUE, label="measured")
        if fit is not None:
            _draw_law(axes, fit, max(roots))
        axes.legend(fontsize=8, frameon=False)
    return _save(figure, path)


def _draw_law(axes: Any, fit: Fit, furthest: float) -> None:
    """The law from the start to the furthest distance, sqrt(nats)."""
    x, y = [], []
    for hundredths in range(101):
        distance = furthest * hundredths / 100
        x.append(distance)
        y.append(fit.at(distance**2))
    axes.plot(x, y, "--", color=_ORANGE, label="law")
