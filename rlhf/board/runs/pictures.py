"""Curves as a page shows them: the picture's address, its alternative text, and its figures as a
table.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlencode

from rlhf.board.runs.drawing import downsample, label
from rlhf.board.runs.metrics import Series
from rlhf.board.runs.panels import Chosen

Translate = Callable[..., str]
ROWS = 25  # of the short table beside a picture


@dataclass(frozen=True, slots=True)
class Picture:
    """A curve on a page. rows: a step and, for each of `names`, the value there, "" for none."""

    title: str
    source: str
    alt: str
    names: tuple[str, ...]
    rows: tuple[tuple[int, tuple[str, ...]], ...]
    table: str  # address of all its figures
    left_out: int


def title_of(panel: Chosen, t: Translate) -> str:
    """A panel's title in the reader's language; a metric's own name for one by itself."""
    return t("panel." + panel.title) if panel.key else panel.title


def unit_of(panel: Chosen, t: Translate) -> str:
    """The same of its unit."""
    return t("unit." + panel.unit) if panel.unit else ""


def query_of(panel: Chosen) -> str:
    """What names a panel in an address."""
    return urlencode({"panel": panel.key} if panel.key else {"metric": panel.title})


def picture(base: str, panel: Chosen, series: Mapping[str, Series], t: Translate) -> Picture:
    """The picture of a panel on the page `base`; series: the panel's."""
    query = query_of(panel)
    title = title_of(panel, t)
    return Picture(
        title=title,
        source=f"{base}/curve.svg?{query}",
        alt=alternative(title, series, t),
        names=tuple(series),
        rows=table(series),
        table=f"{base}/table?{query}",
        left_out=panel.left_out,
    )


def alternative(title: str, series: Mapping[str, Series], t: Translate) -> str:
    """What a picture shows, in words."""
    parts = [title + ":"]
    for name, held in series.items():
        if not held.steps:
            continue
        parts.append(
            t(
                "runs.curve.alt",
                name=name,
                first=label(held.values[0]),
                start=held.steps[0],
                last=label(held.values[-1]),
                end=held.steps[-1],
                low=label(min(held.values)),
                high=label(max(held.values)),
            )
        )
    return " ".join(parts)


def table(
    series: Mapping[str, Series], most: int = ROWS
) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """At most `most` rows of the series, evenly over the steps, the first and the last among
    them.
    """
    by_step = [dict(held.points()) for held in series.values()]
    steps = sorted({step for held in series.values() for step in held.steps})
    rows = []
    for step in evenly(steps, most):
        values = [label(held[step]) if step in held else "" for held in by_step]
        rows.append((step, tuple(values)))
    return tuple(rows)


def evenly(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of the steps, at even distances, both ends among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(number * (len(steps) - 1) / (most - 1))] for number in range(most)]


def drawn(series: Mapping[str, Series]) -> list[tuple[str, int, str]]:
    """Every point that a picture draws: metric, step, value."""
    out = []
    for name, held in series.items():
        out += [(name, step, label(value)) for step, value in downsample(held)]
    return out
