"""Tasks that annotators don't agree on, to go out again (label.mode=export
label.review=.../review.jsonl).

A line is a line of the export's tasks.jsonl (ledger.task_row) and, beside it,

    why      reasons in words
    labels   who said what so far: {export, task, annotator, counts, outcome, ranking, comment,
    time}; places are those of `answers`

A task is in the queue while its result is split or below label.min_confidence; for mere
disagreement it goes out again once only: when labels of a second export have come, the result
stands. Of a ranking, disagreement is who the best one is: orders of several answers are hardly ever
equal.
"""

from collections import defaultdict
from typing import Any

from conf.choices import LabelKind
from rlhf.labels.checking import Checked, Outcome
from rlhf.labels.ledger import task_row
from rlhf.labels.pairs import Fate, PairResult
from rlhf.labels.records import Role, Task
from rlhf.labels.report import Situation
from rlhf.process.hashing import digest


def question_id(task: Task) -> str:
    """The same for tasks that ask the same of the same answers."""
    return digest([digest(task.prompt), *sorted(answer.id for answer in task.answers)])


def _best(label: Checked) -> object:
    return label.ranking[0] if label.outcome is Outcome.ranked else label.outcome


def _why(
    results: list[PairResult], situation: Situation, kind: LabelKind, labels: list[Checked]
) -> list[str]:
    out = []
    for result in results:
        votes = ", ".join(
            f"{n} {outcome.value}"
            for outcome, n in sorted(result.votes.items(), key=lambda pair: pair[0].value)
        )
        fate = situation.fates[result.pair.id]
        if fate is Fate.split:
            out.append(f"split: {votes}")
        elif fate is Fate.unsure:
            out.append(f"confidence {result.confidence:.3f}: {votes}")
        elif (
            fate is not Fate.few_labels
            and result.disputed
            and situation.votes.asked[result.pair.id] == 1
            and kind is LabelKind.pair
        ):
            out.append(f"annotators differ: {votes}")
    said = [
        label
        for label in labels
        if label.annotator not in situation.without
        and label.outcome in (Outcome.ranked, Outcome.tie)
    ]
    once = len({label.export for label in said}) == 1
    if kind is LabelKind.ranking and not out and once and len({_best(label) for label in said}) > 1:
        out.append("annotators differ on the best one")
    return out


def review_rows(situation: Situation) -> list[dict[str, Any]]:
    """The queue, in the order of the exports and their tasks."""
    by_task: dict[str, list[PairResult]] = defaultdict(list)
    for result in situation.aggregated.results:
        by_task[result.pair.task].append(result)
    said: dict[str, list[Checked]] = defaultdict(list)
    for label in situation.labels:
        said[question_id(situation.ledgers.tasks[label.task][1])].append(label)
    out = []
    for export in sorted(situation.ledgers.exports.values(), key=lambda e: (e.created, e.id)):
        for task in export.tasks:
            if task.role is not Role.main or task.id not in by_task:
                continue
            labels = said[question_id(task)]
            why = _why(by_task[task.id], situation, export.kind, labels)
            if why:
                out.append(
                    {
                        **task_row(task),
                        "why": why,
                        "labels": [_said(label, situation) for label in labels],
                    }
                )
    return out


def _said(label: Checked, situation: Situation) -> dict[str, Any]:
    return {
        "export": label.export,
        "task": label.task,
        "annotator": label.annotator,
        "counts": label.annotator not in situation.without,
        "outcome": label.outcome.value,
        "ranking": [list(group) for group in label.ranking],
        "comment": label.comment,
        "time": label.time,
    }
