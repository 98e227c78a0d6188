"""Runs the steps of data.pipeline over rows: streaming as far as the steps allow, counted, every
rejected row written, results kept for a resume.

    steps = plan(pipeline, kind=Use.sft, seed=0)
    done: list[StepReport] = []
    for item in stream(source, steps, kind=Use.sft, folder=folder, done=done): ...

Consecutive streaming steps pass one row at a time; those of single rows (`rowwise`) pass parts of
the rows, which are shared out among processes. A step that needs all rows gets them, and its own
structures are freed before the next step begins. Each step's rows are written to `folder`/steps
as they pass; the directory gets its name when the step is complete.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from conf.preparation.base import StepOptions
from rlhf.data.formats import Use
from rlhf.data.prepare import store
from rlhf.data.prepare.held import gathered
from rlhf.data.prepare.items import Context, Item, ScorePairs, shown_in
from rlhf.data.prepare.plan import Planned, digest, keys, option_values, plan
from rlhf.data.prepare.rowwise import PART, StepPart, Steps
from rlhf.data.prepare.steps import FIGURES, STEPS
from rlhf.data.prepare.store import StepReport
from rlhf.process import parallel
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.data.prepare")
REJECTED_FILE = "rejected.jsonl"
READ = "read"  # the name of the reading among the steps

# Gives the rows, and rejects through the context those that don't fit; a row that can't be read at
# all is rejected as an item that holds what the file has there.
ReadItems = Callable[[Context], Iterator[Item]]
Alive = Callable[[], None]  # told of every row that a step takes or gives


def _nobody() -> None:
    """No watchdog is told."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `run` gives back."""

    items: list[Item]
    steps: list[StepReport]  # the reading first
    rejected: Path  # JSON lines: step, reason, file, row, content


class _Running:
    """A step at work: counts the rows that go in, come out and are rejected, and its own time."""

    def __init__(
        self,
        report: StepReport,
        context: Context,
        target: Path,
        keep: bool,
        apply: Callable[[Iterator[Item]], Iterator[Item]],
        alive: Alive,
        options: StepOptions | None = None,
    ) -> None:
        self.report, self.context, self.alive = report, context, alive
        self._apply, self._options = apply, options
        self._passes = options is not None and options.passes
        self._waited = 0.0  # seconds that the steps before took
        self._complete = False  # the rows that came in have ended
        self._writer = store.Writer(target, items=keep)
        context.rejected = self._reject

    def _reject(self, item: Item, reason: str) -> None:
        self.report.count(reason)
        self._writer.reject(
            store.rejected_row(self.report.step, reason, item.origin, item.number, item.columns)
        )

    def _incoming(self, rows: Iterator[Item]) -> Iterator[Item]:
        while True:
            began = time.perf_counter()
            item = next(rows, None)
            self._waited += time.perf_counter() - began
            if item is None:
                self._complete = True
                return
            self.report.rows_in += 1
            self.alive()
            self._refuse_pictures(item)
            yield item

    def _refuse_pictures(self, item: Item) -> None:
        why = "" if self._options is None else self._options.without_pictures
        if why and shown_in(item.columns):
            raise UserError(
                f"step {self.report.step}: {item.place} shows pictures, and {why}. Leave the step "
                "out, or prepare rows with pictures by themselves."
            )

    def stream(self, rows: Iterator[Item]) -> Iterator[Item]:
        """The rows that come out, one at a time."""
        spent, began = 0.0, time.perf_counter()
        inner = iter(self._apply(self._incoming(rows)))
        spent += time.perf_counter() - began
        while True:
            began = time.perf_counter()
            item = next(inner, None)
            spent += time.perf_counter() - began
            if item is None:
                break
            self.report.rows_out += 1
            self.alive()
            if not self._passes:
                item.written = None
            self._writer.item(item)
            yield item
        self.report.seconds = round(spent - self._waited, 3)

    def add(self, part: StepPart) -> None:
        """What the step did to a part of the rows."""
        self.report.rows_in += part.rows_in
        self.report.rows_out += part.rows_out
        self.report.seconds += part.seconds
        for reason in part.reasons:
            self.report.count(reason)
        self.context.tallies.update(part.tallies)
        self._writer.lines(part.kept, part.rejected)

    def complete(self) -> None:
        """All parts of the rows are through."""
        self._complete = True
        self.report.seconds = round(self.report.seconds, 3)

    def finish(self) -> StepReport:
        """Close the step. Raises RuntimeError for a step that left rows unread or dropped some
        without a reason.
        """
        report = self.report
        if report.number == 0:
            report.rows_in = report.rows_out + report.rejected
        elif not self._complete:
            raise RuntimeError(
                f"step {report.step} ended before its rows did ({report.rows_in} read)"
            )
        if report.rows_out < report.rows_in - report.rejected:
            missing = report.rows_in - report.rejected - report.rows_out
            raise RuntimeError(
                f"step {report.step}: {missing} rows are gone without a reason: every one has to "
                "pass context.rejected"
            )
        figures = self.context.figures
        if report.step in FIGURES:
            figures = FIGURES[report.step](self._options, self.context.tallies)
        report.figures = store.plain(figures)
        self._writer.close(report)
        LOG.info(
            "%s: %d rows in, %d out (%.1f s)",
            report.step,
            report.rows_in,
            report.rows_out,
            report.seconds,
        )
        return report

    def abandon(self) -> None:
        """The step failed: nothing of it stays."""
        self._writer.abandon()


@dataclass(slots=True)
class _Chain:
    """The steps of a pipeline that are open: their rows pass from one to the next."""

    kind: Use
    folder: Path
    keep: bool  # whether a step's rows are written
    score_pairs: ScorePairs | None
    alive: Alive
    done: list[StepReport]
    split_done: bool
    processes: int | None
    open_steps: list[_Running] = field(default_factory=list)

    def read(self, source: ReadItems, key: str | None) -> Iterator[Item]:
        """The rows of the reading, step 0."""
        context = Context(self.kind, seed=0, folder=self.folder, split_done=self.split_done)
        report = StepReport(0, READ, {}, key)
        target = store.step_folder(self.folder, 0, READ)
        running = _Running(report, context, target, False, lambda rows: source(context), self.alive)
        self.open_steps.append(running)
        return running.stream(iter(()))

    def _open(self, step: Planned, number: int, key: str | None) -> _Running:
        """A step whose rows are about to come."""
        context = Context(
            self.kind,
            seed=step.seed,
            folder=self.folder,
            split_done=self.split_done,
            score_pairs=self.score_pairs,
        )
        options, function = step.options, STEPS[step.name]
        report = StepReport(number, step.name, option_values(options), key)
        running = _Running(
            report,
            context,
            store.step_folder(self.folder, number, step.name),
            self.keep,
            lambda rows: function(options, rows, context),
            self.alive,
            options,
        )
        self.open_steps.append(running)
        return running

    def apply(
        self, step: Planned, number: int, key: str | None, rows: Iterator[Item]
    ) -> Iterator[Item]:
        """The rows that come out of a step. A step that needs all rows runs to its end, so that
        what it held is freed before the next step begins.
        """
        out = self._open(step, number, key).stream(rows)
        self.split_done = self.split_done or step.options.splits
        if not step.options.streaming:
            out = iter(gathered(out, self.folder))
            self.finish()
        return out

    def apply_rowwise(
        self,
        steps: Sequence[Planned],
        number: int,
        known: Sequence[str | None],
        rows: Iterator[Item],
        following: Planned | None,
    ) -> Iterator[Item]:
        """The rows that come out of neighbouring steps of single rows, the first of which has this
        number: parts of the rows pass through all of them, shared out among processes. following:
        the step after them.
        """
        open_steps = [
            self._open(step, at, known[at]) for at, step in enumerate(steps, start=number)
        ]
        work = Steps(steps, self.kind, self.folder, self.keep, self.split_done, following)
        return self._parts(work, open_steps, rows)

    def _parts(
        self, work: Steps, open_steps: Sequence[_Running], rows: Iterator[Item]
    ) -> Iterator[Item]:
        pieces = parallel.parts(rows, PART)
        for items, done in parallel.in_order(work, pieces, processes=self.processes):
            for running, part in zip(open_steps, done, strict=True):
                running.add(part)
            self.alive()
            yield from items
        for running in open_steps:
            running.complete()

    def finish(self) -> None:
        """Every open step is through."""
        while self.open_steps:
            self.done.append(self.open_steps[0].finish())
            self.open_steps.pop(0)

    def abandon(self) -> None:
        """A step failed, or whoever reads stopped early: nothing of the open steps stays."""
        for running in self.open_steps:
            running.abandon()


def stream(
    source: ReadItems,
    steps: Sequence[Planned],
    *,
    kind: Use,
    folder: Path,
    done: list[StepReport],
    identity: str | None = None,
    held_out: bool = False,
    keep: bool = True,
    score_pairs: ScorePairs | None = None,
    alive: Alive = _nobody,
    processes: int | None = None,
) -> Iterator[Item]:
    """The rows that come out of the last step; `done` gets a report for the reading and for each
    step, complete when the iterator is exhausted.

    identity: what the source's rows are, such as its files' hashes; steps whose results for it are
    in `folder` are not run again. None: all run, and nothing is kept. keep: False writes no rows,
    only what was rejected. held_out: rows of split eval come in. score_pairs: what loads a reward
    model and scores pairs, for step label_noise. alive: called at every row of every step.
    processes: that steps of single rows are shared out among; None: as many as there are cores.
    """
    names = [READ, *(step.name for step in steps)]
    targets = [store.step_folder(folder, number, name) for number, name in enumerate(names)]
    known: Sequence[str | None] = [None] * len(names)
    first = 0  # steps that need not run
    if identity is not None:
        keyed = keys(steps, identity, kind)
        known, first = keyed, store.reusable(targets, keyed)
    store.remove_others(folder, targets)
    if first:
        LOG.info("%d of %d steps are taken from %s", first, len(steps), folder / store.FOLDER)
        done += _reused(targets[: first + 1])
    split_done = held_out or any(step.options.splits for step in steps[:first])
    keep = keep and identity is not None
    chain = _Chain(kind, folder, keep, score_pairs, alive, done, split_done, processes)
    try:
        rows = store.read_items(targets[first]) if first else chain.read(source, known[0])
        number = first + 1
        for rowwise, group in groupby(steps[first:], key=lambda step: step.options.rowwise):
            together = list(group)
            if rowwise:
                later = iter(steps[number - 1 + len(together) :])
                following = next(later, None)
                rows = chain.apply_rowwise(together, number, known, rows, following)
            else:
                for at, step in enumerate(together, start=number):
                    rows = chain.apply(step, at, known[at], rows)
            number += len(together)
        yield from rows
        chain.finish()
    finally:
        chain.abandon()


def _reused(targets: Sequence[Path]) -> Iterator[StepReport]:
    """The reports of steps that are taken from an earlier run."""
    for target in targets:
        report = store.read_report(target)
        assert report is not None
        report.reused = True
        yield report


def write_rejected(folder: Path, done: Sequence[StepReport]) -> Path:
    """Write rejected.jsonl into `folder`: every row that the reading and the steps left out."""
    return store.gather_rejected(
        [store.step_folder(folder, report.number, report.step) for report in done],
        folder / REJECTED_FILE,
    )


def run(
    items: Iterable[Item],
    pipeline: Sequence[object],
    *,
    kind: Use | str,
    seed: int = 0,
    folder: Path | str,
    identity: str | None = None,
    processes: int | None = None,
) -> Prepared:
    """A whole pipeline over items in memory, for use as a library.

    pipeline: as data.pipeline, [{"step": "length", "low": 10}, "exact_duplicates"]; kind: sft,
    preference, unpaired or prompt; folder: where rejected rows (and steps' own files) go; identity:
    a name for these items, under which results are kept there for later runs; processes: as for
    `stream`. Raises UserError
    before the first item is taken where the pipeline can't run.
    """
    if not isinstance(kind, Use) and kind not in {use.value for use in Use}:
        raise UserError(f"kind={kind!r}: expected one of {', '.join(use.value for use in Use)}.")
    use, target = Use(kind), Path(folder).expanduser()
    steps = plan(pipeline, kind=use, seed=seed)
    done: list[StepReport] = []
    key = None if identity is None else digest(identity)
    rows = stream(
        lambda context: iter(items),
        steps,
        kind=use,
        folder=target,
        done=done,
        identity=key,
        processes=processes,
    )
    kept = list(rows)
    return Prepared(kept, done, write_rejected(target, done))
