"""Curves as SVG, made here: no library, no script. The picture follows the reader's light or dark
look, and tells its lines apart by dashes as well as by colours.
"""

import base64
import hashlib
import math
from array import array
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape, quoteattr

from rlhf.board.runs.metrics import Series
from rlhf.run.plots import running_mean

MOST_POINTS = 400  # of a line
LINES = 8  # of a picture: so many looks there are
_SMOOTH_FROM = 60  # points from which a running mean is drawn over the pale raw line
_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 68, 28, 44, 48  # around the axes
_ROW = 20  # a row of the legend
_CHARACTERS = 60  # of a legend's text

# The colours keep 3:1 against the card in each look.
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1e242c}"
    ".t{font-weight:600;font-size:15px}.g{stroke:#d8d5ce;stroke-width:1}"
    ".a{stroke:#767c86;stroke-width:1}.l{fill:none;stroke-width:2;stroke-linejoin:round}"
    ".r{stroke-width:1;opacity:.35}"
    ".c0{stroke:#24588c}.c1{stroke:#b3431e}.c2{stroke:#2b6a45}.c3{stroke:#7a4a9e}"
    ".c4{stroke:#8a6a00}.c5{stroke:#5a6270}.c6{stroke:#0f7285}.c7{stroke:#b03060}"
    "@media (prefers-color-scheme:dark){"
    "text{fill:#e3e6ea}.g{stroke:#353b44}.a{stroke:#7b8491}"
    ".c0{stroke:#8fbdec}.c1{stroke:#ff9d7a}.c2{stroke:#8ad0a6}.c3{stroke:#cfa6ee}"
    ".c4{stroke:#e0c050}.c5{stroke:#a1a9b5}.c6{stroke:#6cccdd}.c7{stroke:#f59ab8}}"
)
_DASHES = ("", "7 4", "2 3", "10 3 2 3", "14 4", "4 2", "1 4", "8 2 1 2 1 2")
_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
# The picture's own policy: its one style, known by its hash, and nothing else.
POLICY = f"default-src 'none'; style-src 'sha256-{_HASH}'; sandbox"


def downsample(series: Series, most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """At most `most` points of a series: of each stretch of it the lowest and the highest, so that
    a spike stays to be seen.
    """
    points = list(series.points())
    if len(points) <= most:
        return points
    buckets = most // 2
    out = []
    for number in range(buckets):
        start = number * len(points) // buckets
        end = (number + 1) * len(points) // buckets
        stretch = points[start:end]
        low = min(stretch, key=lambda point: point[1])
        high = max(stretch, key=lambda point: point[1])
        out.extend(sorted({low, high}))
    return out


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about as many as wanted."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / wanted))
    distance = next(
        (power * factor for factor in (1, 2, 5) if span / (power * factor) <= wanted), power * 10
    )
    first = math.ceil(low / distance - 1e-9)
    last = math.floor(high / distance + 1e-9)
    return [number * distance for number in range(first, last + 1)]


def label(value: float) -> str:
    """A number on an axis."""
    return f"{value + 0.0:.4g}"


class _Axes:
    """From steps and values to places in the picture."""

    def __init__(self, series: Mapping[str, Series]) -> None:
        steps = [step for held in series.values() for step in (held.steps[0], held.steps[-1])]
        values = [value for held in series.values() for value in held.values]
        self.first, self.last = min(steps), max(steps)
        self.low, self.high = min(values), max(values)
        if self.low == self.high:
            margin = abs(self.low) * 0.1 or 1.0
            self.low, self.high = self.low - margin, self.high + margin

    def x(self, step: float) -> float:
        share = (step - self.first) / max(1, self.last - self.first)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def draw(series: Mapping[str, Series], *, title: str, unit: str, steps: str, empty: str) -> str:
    """The picture of `series` by their names. title, unit: over the picture; steps: the word under
    the horizontal axis; empty: the words where there is nothing to draw.
    """
    held = {name: line for name, line in series.items() if line.steps}
    height = _HEIGHT + _ROW * len(held)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'role="img" aria-label={quoteattr(_printable(title))}><style>{STYLE}</style>',
        _text(_LEFT, 20, title, kind="t"),
    ]
    if held:
        axes = _Axes(held)
        parts += _grid(axes, unit, steps)
        for number, line in enumerate(held.values()):
            parts += _line(axes, line, number)
        parts += _legend(list(held))
    else:
        parts.append(_text(_LEFT, _HEIGHT // 2, empty))
    return "".join([*parts, "</svg>"])


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    style = f' class="{kind}"' if kind else ""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}'
    return f"<text {place}>{escape(_printable(words))}</text>"


def _printable(words: str) -> str:
    """Text as XML can hold it."""
    return "".join(letter for letter in words if letter.isprintable())


def _grid(axes: _Axes, unit: str, steps: str) -> list[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [_text(_LEFT, 38, unit)]
    for value in ticks(axes.low, axes.high):
        y = axes.y(value)
        parts.append(f'<path class="g" d="M{_LEFT} {y:.1f}H{right}"/>')
        parts.append(_text(_LEFT - 6, y + 4, label(value), anchor="end"))
    whole = {round(step) for step in ticks(axes.first, axes.last, 6)}
    for step in sorted(whole):
        parts.append(_text(axes.x(step), bottom + 18, label(step), anchor="middle"))
    parts.append(f'<path class="a" fill="none" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
    parts.append(_text(right, bottom + 38, steps, anchor="end"))
    return parts


def _line(axes: _Axes, series: Series, number: int) -> list[str]:
    if len(series.steps) < _SMOOTH_FROM:
        return [_path(axes, downsample(series), number, "l")]
    raw = _path(axes, downsample(series), number, "l r", dashed=False)
    mean = array("d", running_mean(series.values, len(series.values) // 20))
    return [raw, _path(axes, downsample(Series(series.steps, mean)), number, "l")]


def _path(
    axes: _Axes, points: Sequence[tuple[int, float]], number: int, kind: str, dashed: bool = True
) -> str:
    places = [f"{axes.x(step):.1f} {axes.y(value):.1f}" for step, value in points]
    if len(places) == 1:  # a line needs two ends; round ones make a dot of it
        places.append(places[0])
        kind += '" stroke-linecap="round'
    return f'<path class="{kind} c{number % 8}"{_dash(number, dashed)} d="M{"L".join(places)}"/>'


def _dash(number: int, dashed: bool = True) -> str:
    pattern = _DASHES[number % len(_DASHES)]
    return f' stroke-dasharray="{pattern}"' if dashed and pattern else ""


def _legend(names: Sequence[str]) -> list[str]:
    parts = []
    for number, name in enumerate(names):
        y = _HEIGHT + _ROW * number + 4
        dash = _dash(number)
        parts.append(f'<path class="l c{number % 8}"{dash} d="M{_LEFT} {y - 4}H{_LEFT + 36}"/>')
        short = name if len(name) <= _CHARACTERS else name[: _CHARACTERS - 1] + "…"
        parts.append(_text(_LEFT + 44, y, short))
    return parts
