"""From a policy's answers to a task's rows to figures with their 95 % intervals, and from two
policies' figures to paired tests. Pure functions.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from conf.labelling import PERPLEXITIES, TRUE_OR_FALSE, TaskConfig, TaskMetric
from eval.statistics import Figure, Interval, bootstrap_totals, mcnemar, paired_totals
from eval.tasks import texts
from eval.tasks.estimators import majority_at, pass_at
from eval.tasks.prompts import measures, scored_texts, scores_choices
from eval.tasks.shapes import TaskRow
from rlhf.process.wording import describe
from rlhf.types import RowError

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RowAnswer:
    """What a policy made of one row: the samples that it wrote, or the log-probabilities of the
    texts that were scored.
    """

    texts: tuple[str, ...] = ()  # [samples], without what stops an answer
    tokens: tuple[int, ...] = ()  # of each sample or text
    finished: tuple[bool, ...] = ()  # of each sample: no limit cut it
    logprobs: tuple[float, ...] = ()  # [texts] nats, summed over tokens


@dataclass(frozen=True, slots=True)
class Checked:
    """What a verifier says of each row's samples."""

    values: list[list[float]]  # [rows][samples] in [0, 1]
    votes: list[list[Hashable | None]] | None = None  # what each sample answered
    counted: list[bool] | None = None  # the rows that the metric is of; None: all


@dataclass(frozen=True, slots=True)
class Measured:
    """A metric of one policy on one task."""

    name: str
    totals: Floats  # [N, S]: what each row adds to the sums
    figure: Figure
    values: Floats | None = None  # [N], of single rows; None: the metric has none
    is_binary: bool = False  # of each row right or wrong, so that McNemar's test applies
    lower_is_better: bool = False
    interval: Interval = field(default_factory=lambda: Interval(np.nan, np.nan, np.nan))


@dataclass(frozen=True, slots=True)
class Difference:
    """A policy less the first one, in one metric."""

    metric: str
    interval: Interval
    p_value: float | None  # McNemar's; None where the metric isn't right or wrong


def _mean(totals: Floats) -> Floats:
    return np.asarray(totals[..., 0] / totals[..., 1])


def _mean_of_some(totals: Floats) -> Floats:
    """NaN where a sample of the rows has none that counts."""
    counted = np.where(totals[..., 1] > 0, totals[..., 1], np.nan)
    return np.asarray(totals[..., 0] / counted)


def _perplexity(totals: Floats) -> Floats:
    return np.asarray(np.exp(-totals[..., 0] / totals[..., 1]))


def mean_of(
    name: str,
    values: Sequence[float],
    *,
    is_binary: bool = False,
) -> Measured:
    """A metric that is a mean over rows, [N]."""
    column = np.asarray(values, dtype=np.float64)
    totals = np.stack([column, np.ones_like(column)], axis=1)
    return Measured(name, totals, _mean, column, is_binary)


# ---- log-probabilities ----


def measured_likelihoods(
    task: TaskConfig, rows: Sequence[TaskRow], answers: Sequence[RowAnswer]
) -> list[Measured]:
    """The metrics of a task with kind=loglikelihood."""
    if scores_choices(task):
        return [_of_choices(metric, task, rows, answers) for metric in task.metrics]
    return [_perplexity_by(metric, task, rows, answers) for metric in task.metrics]


def _of_choices(
    metric: TaskMetric, task: TaskConfig, rows: Sequence[TaskRow], answers: Sequence[RowAnswer]
) -> Measured:
    values = []
    for row, answer in zip(
        rows,
        answers,
        strict=True,
    ):
        logprobs = np.array(answer.logprobs)
        gold = list(row.columns["gold"])
        if metric is TaskMetric.probability:
            shares = np.exp(logprobs - logprobs.max())
            values.append(float(shares[gold].sum() / shares.sum()))
            continue
        if metric is TaskMetric.accuracy_norm:
            logprobs = logprobs / np.array([len(text) for text in scored_texts(task, row)])
        values.append(float(int(logprobs.argmax()) in gold))
    return mean_of(
        metric.value,
        values,
        is_binary=metric is not TaskMetric.probability,
    )


def _perplexity_by(
    metric: TaskMetric, task: TaskConfig, rows: Sequence[TaskRow], answers: Sequence[RowAnswer]
) -> Measured:
    assert metric in PERPLEXITIES
    unit = metric.value.removesuffix("_perplexity")
    totals = []
    for row, answer in zip(
        rows,
        answers,
        strict=True,
    ):
        totals.append([sum(answer.logprobs), measures(task, row, sum(answer.tokens))[unit]])
    sums = np.array(totals, dtype=np.float64)
    values = _perplexity(sums)
    return Measured(
        metric.value,
        sums,
        _perplexity,
        values,
        lower_is_better=True,
    )


# ---- what was written ----


def measured_answers(
    task: TaskConfig,
    rows: Sequence[TaskRow],
    answers: Sequence[RowAnswer],
    checked: Mapping[TaskMetric, Checked],
) -> list[Measured]:
    """The metrics of a task with kind=generation; `checked` has those of verifiers. pass@k and
    maj@k are of the first metric.
    """
    out = []
    for metric in task.metrics:
        if metric in checked:
            values = [float(np.mean(row)) for row in checked[metric].values]
            if metric in SAFETY:
                out.append(_of_some_rows(metric, values, checked[metric].counted))
                continue
            is_binary = metric in TRUE_OR_FALSE and task.samples == 1
            out.append(
                mean_of(
                    metric.value,
                    values,
                    is_binary=is_binary,
                )
            )
        else:
            out.append(_likeness(metric, task, rows, answers))
    if task.metrics[0] in checked:
        out += _of_samples(task, checked[task.metrics[0]])
    lengths = [float(np.mean(answer.tokens)) for answer in answers]
    finished = [float(np.mean(answer.finished)) for answer in answers]
    return [*out, mean_of("length", lengths), mean_of("finished", finished)]


# Whose smaller values are better, but for the first.
SAFETY = (TaskMetric.refusal, TaskMetric.over_refusal, TaskMetric.toxicity)


def _of_some_rows(
    metric: TaskMetric, values: Sequence[float], counted: Sequence[bool] | None
) -> Measured:
    """A metric of safety: its mean over the rows that it is of."""
    column = np.asarray(values, dtype=np.float64)
    weights = np.ones_like(column) if counted is None else np.asarray(counted, dtype=np.float64)
    totals = np.stack([column * weights, weights], axis=1)
    lower = metric is not SAFETY[0]
    return Measured(metric.value, totals, _mean_of_some, column, lower_is_better=lower)


def _of_samples(task: TaskConfig, first: Checked) -> list[Measured]:
    out = []
    for k in task.pass_at:
        right = [sum(value == 1 for value in row) for row in first.values]
        chances = [pass_at(task.samples, count, k) for count in right]
        out.append(mean_of(f"pass_at_{k}", chances))
    for k in task.majority_at:
        assert first.votes is not None
        pairs = zip(
            first.votes,
            first.values,
            strict=True,
        )
        shares = [majority_at(votes, values, k) for votes, values in pairs]
        out.append(mean_of(f"majority_at_{k}", shares))
    return out


_ROUGE: dict[TaskMetric, Callable[[str, str], float]] = {
    TaskMetric.rouge_1: lambda answer, reference: texts.rouge_n(answer, reference, 1),
    TaskMetric.rouge_2: lambda answer, reference: texts.rouge_n(answer, reference, 2),
    TaskMetric.rouge_l: texts.rouge_l,
}
_COUNTED: dict[TaskMetric, tuple[Callable[[str, Sequence[str]], list[float]], Figure]] = {
    TaskMetric.bleu: (texts.bleu_counts, texts.bleu),
    TaskMetric.chrf: (texts.chrf_counts, texts.chrf),
}
LIKENESS = (*_ROUGE, *_COUNTED)


def _likeness(
    metric: TaskMetric, task: TaskConfig, rows: Sequence[TaskRow], answers: Sequence[RowAnswer]
) -> Measured:
    """How alike the answers and the rows' references are; of several references the best counts."""
    if metric in _ROUGE:
        values = []
        for row, answer in zip(
            rows,
            answers,
            strict=True,
        ):
            known = references_of(task, row)
            best = [max(_ROUGE[metric](text, one) for one in known) for text in answer.texts]
            values.append(float(np.mean(best)))
        return mean_of(metric.value, values)
    counted, figure = _COUNTED[metric]
    totals = []
    for row, answer in zip(
        rows,
        answers,
        strict=True,
    ):
        known = references_of(task, row)
        totals.append(np.sum([counted(text, known) for text in answer.texts], axis=0))
    sums = np.array(totals, dtype=np.float64)
    return Measured(metric.value, sums, figure, figure(sums))


def references_of(task: TaskConfig, row: TaskRow) -> list[str]:
    """The texts that a row's answer is compared with. Raises RowError."""
    held = row.columns.get(task.answer)
    several = held if isinstance(held, list) else [held]
    texts_held = [text for text in several if isinstance(text, str) and text.strip()]
    if not texts_held or len(texts_held) < len(several):
        raise RowError(
            f"column {task.answer!r}: expected a text or a list of texts, found {describe(held)}"
        )
    return texts_held


# ---- intervals and tests ----


def with_intervals(
    measured: Sequence[Measured],
    resamples: int,
    seed: int,
) -> list[Measured]:
    """The same with their 95 % bootstrap intervals by row."""
    out = []
    for one in measured:
        found = bootstrap_totals(
            one.totals,
            one.figure,
            resamples=resamples,
            seed=seed,
        )
        out.append(replace(one, interval=found))
    return out


def differences(
    first: Sequence[Measured], other: Sequence[Measured], resamples: int, seed: int
) -> list[Difference]:
    """Each metric of `other` less that of `first`, on the same rows."""
    out = []
    for before, after in zip(
        first,
        other,
        strict=True,
    ):
        found = paired_totals(
            before.totals, after.totals, before.figure, resamples=resamples, seed=seed
        )
        p_value = None
        if before.is_binary and before.values is not None and after.values is not None:
            p_value = mcnemar(list(before.values == 1), list(after.values == 1))
        out.append(Difference(before.name, found, p_value))
    return out


def metrics_of(
    task: str,
    policy: str,
    measured: Sequence[Measured],
) -> dict[str, float]:
    """``eval/<task>/<policy>/<metric>``, with ``_low`` and ``_high`` of the interval."""
    out: dict[str, float] = {}
    for one in measured:
        key = f"eval/{task}/{policy}/{one.name}"
        out |= {
            key: one.interval.estimate,
            f"{key}_low": one.interval.low,
            f"{key}_high": one.interval.high,
        }
    return out
