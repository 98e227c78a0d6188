"""What a run shows: a progress bar, sample tables and a closing panel.

Where the output is no terminal it is plain lines; ranks other than 0 show nothing.
"""

import functools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from rlhf.process import distributed

_PLAIN_WIDTH = 120  # columns where the output is no terminal (a log file)
_PLAIN_EVERY_S = 10.0  # seconds between plain progress lines
HEADLINES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss", ("loss/policy", "loss", "train_loss")),
    ("score", ("objective/scores", "reward/total")),
    ("KL", ("objective/kl",)),
    ("accuracy", ("accuracy", "rewards/accuracies", "mean_token_accuracy")),
    ("eval loss", ("eval_loss",)),
    ("length", ("rollout/response_length",)),
)


@functools.cache
def console() -> Console:
    """The console of the process. There is one, so that tables print above a running bar."""
    probe = Console()
    if probe.is_terminal or "COLUMNS" in os.environ:
        return probe
    return Console(width=_PLAIN_WIDTH)


def headline(metrics: Mapping[str, Any]) -> str:
    """The figures of a step that fit beside a bar: loss, score, KL, ... as far as there are."""
    parts = []
    for label, names in HEADLINES:
        value = next((metrics[n] for n in names if isinstance(metrics.get(n), (int, float))), None)
        if value is not None:
            parts.append(f"{label} {value:.4g}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as ``1:02:03`` or ``2:03``."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Bar:
    """A running progress display; `update` takes the step just done (1-based) and its metrics."""

    def __init__(self, total: int, title: str, progress: Progress | None, quiet: bool) -> None:
        self._total, self._title, self._quiet = total, title, quiet
        self._progress = progress
        self._task = None
        if progress is not None:
            self._task = progress.add_task(title, total=total, figures="")
        self._started = time.monotonic()
        self._first: int | None = None  # steps done before this display began (a resumed run)
        self._last_line = float("-inf")
        self._figures: dict[str, Any] = {}

    def update(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """`step` of `total` are done; figures that this step lacks keep the value they had."""
        if self._quiet:
            return
        self._figures.update(metrics or {})
        text = headline(self._figures)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, figures=text)
            return
        now = time.monotonic()
        if self._first is None:
            self._first = max(0, step - 1)
        if step < self._total and now - self._last_line < _PLAIN_EVERY_S:
            return
        self._last_line = now
        done = step - self._first
        left = (now - self._started) / done * (self._total - step) if done > 0 else 0.0
        console().print(
            Text(f"{self._title} {step}/{self._total}  {text}  left {duration(left)}"),
            soft_wrap=True,
        )


@contextmanager
def progress(total: int, title: str) -> Iterator[Bar]:
    """A bar over `total` steps with the step's loss, score, KL and the time left."""
    quiet = not distributed.is_main()
    if quiet or not console().is_terminal:
        yield Bar(total, title, None, quiet)
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console()) as shown:
        yield Bar(total, title, shown, quiet)


def _cell(value: Any) -> Text:
    """Text, never markup: a sampled response may hold square brackets."""
    if isinstance(value, float):
        return Text(f"{value:.4g}")
    return Text("" if value is None else str(value), overflow="fold")


def table(
    rows: Sequence[Mapping[str, Any]],
    title: str | None = None,
    columns: Sequence[str] | None = None,
) -> None:
    """`rows` as a table; columns in the order of first appearance unless given."""
    if not distributed.is_main() or not rows:
        return
    names = columns
    if names is None:
        names = list(dict.fromkeys(key for row in rows for key in row))
    shown = Table(title=title, show_lines=True, title_justify="left")
    for name in names:
        numeric = all(isinstance(row.get(name), (int, float, type(None))) for row in rows)
        shown.add_column(name, justify="right" if numeric else "left", no_wrap=numeric)
    for row in rows:
        shown.add_row(*(_cell(row.get(n)) for n in names))
    console().print(shown)


def samples_table(
    rows: Sequence[Mapping[str, Any]],
    title: str | None = "samples",
    limit: int = 4,
    width: int = 400,
) -> None:
    """The first `limit` samples: prompt, response and their figures; of an episode who wrote what.

    Texts are cut after `width` characters; the files hold them whole.
    """
    table([_cut_sample(row, width) for row in rows[:limit]], title=title)


def _cut_sample(row: Mapping[str, Any], width: int) -> dict[str, Any]:
    shown = {key: value for key, value in row.items() if key != "step"}
    if "turns" in shown:
        shown["turns"] = "\n".join(f"{turn['role']}: {turn['text']}" for turn in row["turns"])
    return {key: _cut(value, width) for key, value in shown.items()}


def _cut(value: Any, width: int) -> Any:
    """A text's first `width` characters; other values as they are."""
    if isinstance(value, str) and len(value) > width:
        return value[:width] + " ..."
    return value


def closing_panel(
    title: str,
    figures: Mapping[str, Any] | None = None,
    files: Mapping[str, Path | str] | None = None,
    next_command: str | None = None,
    notes: Sequence[str] = (),
) -> None:
    """The run in a box: its figures, where its files lie, what to run next."""
    if not distributed.is_main():
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in (figures or {}).items():
        grid.add_row(Text(label), _cell(value))
    for label, path in (files or {}).items():
        grid.add_row(Text(label), Text(str(path), style="cyan"))
    for note in notes:
        grid.add_row(Text("note"), Text(note))
    if next_command:
        grid.add_row(Text("next"), Text(next_command, style="green"))
    console().print(Panel(grid, title=Text(title), title_align="left", expand=False))
