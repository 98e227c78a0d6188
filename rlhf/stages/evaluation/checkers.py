"""The metrics of tasks that verifiers give: answers, code, constraints (reward/verifiers/)."""

from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Protocol

from conf.choices import TermKind
from conf.labelling import TaskConfig, TaskMetric
from conf.schema import RewardTerm
from eval.tasks.answers import compile_pattern, counted_text, loosened, whole_code
from eval.tasks.figures import SAFETY, Checked, RowAnswer
from eval.tasks.shapes import TaskRow
from reward.base import Verifier
from reward.terms import VERIFIERS
from reward.verifiers.extract import answer_of, boxed, fenced_or_all, letter_of, normalise
from reward.verifiers.text import Numeric
from rlhf.stages.evaluation.safety import safety_checker
from rlhf.types import RowError, UserError

_KINDS = {
    TaskMetric.exact: TermKind.exact,
    TaskMetric.numeric: TermKind.numeric,
    TaskMetric.math: TermKind.math,
    TaskMetric.choice: TermKind.choice,
    TaskMetric.code: TermKind.code,
    TaskMetric.instructions: TermKind.instructions,
    TaskMetric.instructions_loose: TermKind.instructions,
    TaskMetric.instructions_share: TermKind.instructions,
}


def term_of(metric: TaskMetric, task: TaskConfig) -> RewardTerm:
    """What a verifier is made of, for a metric of a task."""
    return RewardTerm(
        kind=_KINDS[metric],
        column=task.answer,
        marker=task.marker,
        ignore_case=task.ignore_case,
        ignore_punctuation=task.ignore_punctuation,
        tolerance=task.tolerance,
        all_or_nothing=metric is not TaskMetric.instructions_share,
        time_limit_s=task.time_limit_s,
        memory_mb=task.memory_mb,
        isolation=task.isolation,
    )


class AnyChecker(Protocol):
    """What checks the answers to a task's rows for one metric."""

    metric: TaskMetric

    def reference(self, row: TaskRow) -> Any: ...
    def check(self, rows: Sequence[TaskRow], answers: Sequence[RowAnswer]) -> Checked: ...


class Checker:
    """One metric of one task."""

    def __init__(
        self,
        name: str,
        metric: TaskMetric,
        task: TaskConfig,
    ) -> None:
        """Raises UserError for what the metric lacks on this machine."""
        self.metric, self._task = metric, task
        self._pattern = compile_pattern(f"tasks.{name}.pattern", task.pattern)
        self._where = f"tasks.{name}.metrics: {metric.value}"
        try:
            self.verifier: Verifier = VERIFIERS[_KINDS[metric]](term_of(metric, task))
        except (ValueError, ImportError) as error:
            raise UserError(f"{self._where}: {error}.") from error

    def reference(self, row: TaskRow) -> Any:
        """What a row's answers are compared with. Raises RowError."""
        columns = self.verifier.columns
        for column in columns:
            if row.columns.get(column) is None:
                there = ", ".join(row.columns)
                raise RowError(f"{self.metric.value} needs the column {column!r}, found {there}")
        try:
            return self.verifier.reference(*(row.columns[column] for column in columns))
        except ValueError as error:
            named = " and ".join(map(repr, columns))
            raise RowError(f"{self.metric.value}, column {named}: {error}") from error

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.verifier.workers, f"check-{self.metric.value}")

    def check(
        self,
        rows: Sequence[TaskRow],
        answers: Sequence[RowAnswer],
    ) -> Checked:
        """The values of every row's answers, and what they answered where a majority is asked for.
        Raises UserError where checking fails through no fault of an answer.
        """
        futures = []
        for row, answer in zip(
            rows,
            answers,
            strict=True,
        ):
            reference = self.reference(row)
            futures.append(
                [self._threads.submit(self._value, row, text, reference) for text in answer.texts]
            )
        values = [[future.result() for future in several] for several in futures]
        votes = None
        if self._task.majority_at:
            votes = [[self._vote(text) for text in answer.texts] for answer in answers]
        return Checked(values, votes)

    def _value(
        self,
        row: TaskRow,
        text: str,
        reference: Any,
    ) -> float:
        try:
            part = counted_text(self._task, self._pattern, text)
            if part is None:
                return 0.0
            return max(self.verifier.score(one, reference) for one in self._readings(row, part))
        except Exception as error:
            raise UserError(
                f"{self._where}, {row.place}: {type(error).__name__}: {error}."
            ) from error

    def _readings(
        self,
        row: TaskRow,
        text: str,
    ) -> list[str]:
        """The texts of which the best one counts."""
        if self.metric is TaskMetric.code:
            return [whole_code(row, fenced_or_all(text, ("python", "py", "python3")))]
        if self.metric is TaskMetric.instructions_loose:
            return loosened(text)
        return [text]

    def _vote(self, text: str) -> Hashable | None:
        """What an answer answers, by which answers are counted; None where it answers nothing."""
        task = self._task
        part = counted_text(task, self._pattern, text)
        if part is None:
            return None
        if self.metric is TaskMetric.numeric:
            number: Hashable | None = Numeric.answer_in(part, task.marker)
            return number
        if self.metric is TaskMetric.choice:
            return letter_of(part, term_of(self.metric, task).letters, task.marker)
        said = boxed(part) if self.metric is TaskMetric.math else answer_of(part, task.marker)
        if said is None:
            return None
        plain = normalise(
            said, ignore_case=task.ignore_case, ignore_punctuation=task.ignore_punctuation
        )
        return plain or None


def checkers_of(name: str, task: TaskConfig) -> list[AnyChecker]:
    """What checks the answers for a task's metrics. Raises UserError."""
    found: list[AnyChecker] = []
    for metric in task.metrics:
        if metric in _KINDS:
            found.append(Checker(name, metric, task))
        elif metric in SAFETY:
            found.append(safety_checker(name, metric, task))
    return found
