"""The rows of tasks: files read, their shape told, rows that don't fit counted."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from conf.labelling import RowShape, TaskConfig, TaskKind, TaskMetric
from eval.tasks.figures import LIKENESS, references_of
from eval.tasks.prompts import prompt_of, scored_texts, scores_choices
from eval.tasks.shapes import (
    MMLU_COLUMNS,
    SHAPES,
    TaskRow,
    check_columns,
    has_no_header,
    renamed,
    shape_of,
)
from eval.tasks.texts import check_bleu
from rlhf.data.files import check_file, scan
from rlhf.data.opening import SourceRow, kind_of
from rlhf.data.tables import csv_header, csv_rows
from rlhf.stages.evaluation.checkers import AnyChecker, checkers_of
from rlhf.stages.evaluation.safety import check_rows
from rlhf.types import RowError, UserError

LOG = logging.getLogger("rlhf.stages.eval")


@dataclass(frozen=True, slots=True)
class TaskRows:
    """A task with its rows, all of which fit."""

    name: str
    task: TaskConfig
    rows: list[TaskRow]
    pool: list[TaskRow]  # examples are drawn from them
    shape: RowShape
    bad: list[str]  # rows that don't fit: where, and why
    files: list[Path]
    checkers: list[AnyChecker]

    @property
    def key(self) -> str:
        """Its option."""
        return f"tasks.{self.name}"


def read_task(name: str, task: TaskConfig) -> TaskRows:
    """A task's rows. Raises UserError: no file, a metric that can't be had here, more rows that
    don't fit than tasks.<name>.max_bad_rows.
    """
    key = f"tasks.{name}"
    if task.path is None:
        raise UserError(f"{key}.path is not set: expected a file of rows.")
    check_columns(f"{key}.columns", task.columns)
    if TaskMetric.bleu in task.metrics:
        check_bleu(f"{key}.metrics")
    checkers = checkers_of(name, task)
    files = [check_file(task.path, f"{key}.path")]
    bad: list[str] = []
    shape, rows = _read(files[0], f"{key}.path", task, task.rows, bad)
    pool = rows
    if task.fewshot_path is not None:
        files.append(check_file(task.fewshot_path, f"{key}.fewshot_path"))
        pool = _read(files[1], f"{key}.fewshot_path", task, None, bad)[1]
    good = []
    for row in rows:
        try:
            _check(task, row, pool, checkers)
        except RowError as error:
            bad.append(f"{row.place}: {error}")
        else:
            good.append(row)
    _tell(key, task, shape, bad, good)
    check_rows(name, task, good)
    return TaskRows(name, task, good, pool, shape, bad, files, checkers)


def _tell(
    key: str, task: TaskConfig, shape: RowShape, bad: Sequence[str], good: Sequence[TaskRow]
) -> None:
    if len(bad) > task.max_bad_rows:
        raise UserError(
            f"{key}: {len(bad)} rows don't fit (read as {shape.value}; {key}.max_bad_rows="
            f"{task.max_bad_rows}). The first: {bad[0]}."
        )
    if not good:
        raise UserError(f"{key}.path={task.path} has no row that fits: expected one at least.")
    if bad:
        LOG.warning(
            "%s: %d of %d rows don't fit and are left out; the first: %s.",
            key,
            len(bad),
            len(bad) + len(good),
            bad[0],
        )
    LOG.info("%s: %d rows, read as %s.", key, len(good), shape.value)


def _read(
    file: Path, key: str, task: TaskConfig, most: int | None, bad: list[str]
) -> tuple[RowShape, list[TaskRow]]:
    """The rows of a file and their shape; those that don't fit go into `bad`."""
    shape, rows = task.shape, []
    for source in islice(_sources(file, key), most):
        if source.problem is not None:
            bad.append(f"{source.place}: {source.problem}")
            continue
        try:
            columns = renamed(source.columns, task.columns)
            if shape is RowShape.auto:
                shape = shape_of(columns)
            made = SHAPES[shape](columns)
        except RowError as error:
            bad.append(f"{source.place}: {error}")
            continue
        rows.append(TaskRow(source.place, source.number, columns | made))
    return shape, rows


def _sources(file: Path, key: str) -> Iterator[SourceRow]:
    """The rows of a file, a CSV file of MMLU without its header too."""
    if kind_of(file) == ".csv" and has_no_header(csv_header(file)):
        return csv_rows(file, MMLU_COLUMNS)
    return scan(file, key=key)


def _check(
    task: TaskConfig, row: TaskRow, pool: Sequence[TaskRow], checkers: Sequence[AnyChecker]
) -> None:
    """A row has all that its prompt and its metrics need. Raises RowError."""
    prompt_of(task, row, pool)
    for checker in checkers:
        checker.reference(row)
    if any(metric in LIKENESS for metric in task.metrics):
        references_of(task, row)
    if task.kind is TaskKind.loglikelihood:
        _check_scored(task, row)


def _check_scored(task: TaskConfig, row: TaskRow) -> None:
    if any(not text.strip() for text in scored_texts(task, row)):
        raise RowError("a text that is to be scored is empty")
    if scores_choices(task) and not row.columns.get("gold"):
        raise RowError("expected a right choice, found none")
