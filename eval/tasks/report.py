"""A task's part of the report: figures of all policies, paired tests against the first, and the
rows where the policies differ most. Pure functions.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from conf.labelling import TaskConfig, TaskKind
from eval.sections import Section, Table
from eval.statistics import Interval
from eval.tasks.figures import Difference, Measured, RowAnswer
from eval.tasks.prompts import filled, scored_texts, scores_choices
from eval.tasks.shapes import TaskRow

_SHOWN = 400  # characters of a text in a table
_BAD_SHOWN = 5


def section(
    name: str,
    task: TaskConfig,
    rows: Sequence[TaskRow],
    answers: Mapping[str, Sequence[RowAnswer]],
    measured: Mapping[str, Sequence[Measured]],
    apart: Mapping[str, Sequence[Difference]],
    bad: Sequence[str],
    shown: int,
) -> Section:
    """The section of a task. answers, measured: by policy; apart: each further policy less the
    first; bad: rows that were left out; shown: rows in the table of differences.
    """
    first = next(iter(measured))
    tables = [_figures(name, measured)]
    if apart:
        tables.append(_tests(name, first, apart))
        tables += _rows_apart(name, task, rows, answers, measured, shown)
    return Section(
        f"Task {name}",
        (_about(task, rows), *_left_out(bad)),
        tuple(tables),
        figures=_as_json(measured, apart, len(rows), bad),
    )


def _about(task: TaskConfig, rows: Sequence[TaskRow]) -> str:
    how = "as a plain prompt"
    if task.chat:
        how = "by the chat template"
    examples = "without examples"
    if task.fewshot:
        examples = f"{task.fewshot} examples before each"
    text = f"{len(rows)} rows of {task.path}, asked {how}, {examples}."
    if task.kind is TaskKind.loglikelihood:
        return f"{text} Scored by log-probabilities."
    drawn = "greedily"
    if task.temperature != 0:
        drawn = f"at temperature {task.temperature:g}"
    return f"{text} {task.samples} answers to a row, written {drawn}."


def _left_out(bad: Sequence[str]) -> list[str]:
    if not bad:
        return []
    shown = "; ".join(bad[:_BAD_SHOWN])
    further = len(bad) - _BAD_SHOWN
    if further > 0:
        shown += f" and {further} more"
    return [f"{len(bad)} rows were left out: {shown}."]


def _spaced(interval: Interval, sign: str = "") -> str:
    form = f"{sign}.3f"
    estimate = format(interval.estimate, form)
    low = format(interval.low, form)
    high = format(interval.high, form)
    return f"{estimate}  [{low}, {high}]"


def _figures(name: str, measured: Mapping[str, Sequence[Measured]]) -> Table:
    """A line for each metric, a column for each policy."""
    rows = []
    for several in zip(*measured.values(), strict=True):
        first = several[0]
        label = first.name
        if first.lower_is_better:
            label += " (lower is better)"
        cells = [label]
        for one in several:
            cells.append(_spaced(one.interval))
        rows.append(tuple(cells))
    return Table(f"{name}: figures [95 %]", ("metric", *measured), tuple(rows))


def _tests(
    name: str,
    first: str,
    apart: Mapping[str, Sequence[Difference]],
) -> Table:
    rows = []
    for policy, several in apart.items():
        for one in several:
            p_value = ""
            if one.p_value is not None:
                p_value = f"{one.p_value:.3g}"
            rows.append((policy, one.metric, _spaced(one.interval, "+"), p_value))
    columns = ("policy", "metric", f"difference to {first} [95 %]", "McNemar p")
    return Table(f"{name}: each policy against {first}, paired by row", columns, tuple(rows))


def _rows_apart(
    name: str,
    task: TaskConfig,
    rows: Sequence[TaskRow],
    answers: Mapping[str, Sequence[RowAnswer]],
    measured: Mapping[str, Sequence[Measured]],
    shown: int,
) -> list[Table]:
    """The rows where the policies' values of the first metric lie furthest apart."""
    leading = [several[0].values for several in measured.values()]
    held = [values for values in leading if values is not None]
    if len(held) < len(leading):
        return []
    values = np.stack(held)  # [policies, rows]
    spread = values.max(axis=0) - values.min(axis=0)
    order = np.argsort(-spread, kind="stable")[:shown]
    lines = []
    for i in order.tolist():
        if not spread[i] > 0:  # nor is NaN
            break
        row = rows[i]
        said = []
        for number, policy in enumerate(measured):
            text = shown_answer(task, row, answers[policy][i])
            said.append(f"{values[number, i]:.3g}: {_cut(text)}")
        asked = filled(task.prompt, row) or filled(task.target, row)
        lines.append((str(row.number), _cut(asked), _expected(task, row), *said))
    if not lines:
        return []
    metric = next(iter(measured.values()))[0].name
    title = f"{name}: rows where {metric} differs most"
    columns = ("row", "asked", "expected", *measured)
    return [Table(title, columns, tuple(lines))]


def _expected(task: TaskConfig, row: TaskRow) -> str:
    """What a row takes for right, where it is a text or a few."""
    if scores_choices(task):
        texts = scored_texts(task, row)
        right = [texts[number] for number in row.columns["gold"]]
        return _cut(" / ".join(right))
    if task.kind is TaskKind.loglikelihood:
        return ""
    held = row.columns.get(task.answer)
    several = held if isinstance(held, list) else [held]
    plain = [str(one) for one in several if isinstance(one, (str, int, float))]
    return _cut(" / ".join(plain))


def shown_answer(
    task: TaskConfig,
    row: TaskRow,
    answer: RowAnswer,
) -> str:
    """What a policy said of a row: its first answer, the likeliest choice, or nothing of a text
    whose perplexity was taken.
    """
    if task.kind is TaskKind.generation:
        return answer.texts[0]
    if not scores_choices(task):
        return ""
    return scored_texts(task, row)[int(np.argmax(answer.logprobs))]


def _cut(text: str) -> str:
    if len(text) <= _SHOWN:
        return text
    return f"{text[:_SHOWN]} ..."


def _as_json(
    measured: Mapping[str, Sequence[Measured]],
    apart: Mapping[str, Sequence[Difference]],
    rows: int,
    bad: Sequence[str],
) -> dict[str, object]:
    policies: dict[str, dict[str, object]] = {}
    for policy, several in measured.items():
        policies[policy] = {one.name: _numbers(one.interval) for one in several}
    tests: dict[str, dict[str, object]] = {}
    for policy, differences in apart.items():
        tests[policy] = {}
        for one in differences:
            numbers = _numbers(one.interval)
            tests[policy][one.metric] = {**numbers, "mcnemar_p": one.p_value}
    return {"rows": rows, "left_out": list(bad), "policies": policies, "differences": tests}


def _numbers(interval: Interval) -> dict[str, float]:
    return {"estimate": interval.estimate, "low": interval.low, "high": interval.high}


def sample_rows(
    name: str,
    policy: str,
    task: TaskConfig,
    rows: Sequence[TaskRow],
    answers: Sequence[RowAnswer],
    measured: Sequence[Measured],
) -> list[dict[str, object]]:
    """Lines of samples.jsonl: one for each answer that was written, one for each row that was
    scored. A row's metrics are its own, the mean over its answers.
    """
    out = []
    pairs = zip(rows, answers, strict=True)
    for i, (row, answer) in enumerate(pairs):
        line: dict[str, object] = {
            "task": name,
            "policy": policy,
            "row": row.number,
            "prompt": filled(task.prompt, row),
        }
        values: dict[str, object] = {}
        for one in measured:
            if one.values is not None:
                values[one.name] = float(one.values[i])
        if task.kind is TaskKind.loglikelihood:
            said = shown_answer(task, row, answer)
            out.append(line | {"response": said, "logprobs": list(answer.logprobs)} | values)
            continue
        for number, text in enumerate(answer.texts):
            own = {"sample": number, "response": text, "response_length": answer.tokens[number]}
            own["finish_reason"] = "stop" if answer.finished[number] else "length"
            out.append(line | own | values)
    return out
