"""Tasks that annotators don't agree on, to go out again (label.mode=export
label.review=.../review.jsonl).

A line is a line of the export's tasks.jsonl (ledger.task_row) and, beside it,

    why      reasons in words
    labels   the labels so far: {export, task, annotator, counts, outcome, ranking, comment,
             time}; the ranking's slots are indices of `answers`

A task is in the queue while its result is split or below label.min_confidence. For mere
disagreement it goes out again once only: with labels of a second export the result stands. Of a
ranking, disagreement is about the best answer only: orders of several answers are hardly ever
equal.
"""

from collections import defaultdict
from typing import Any

from conf.choices import LabelKind
from rlhf.labels.checking import Checked, Outcome
from rlhf.labels.ledger import task_row
from rlhf.labels.pairs import Fate, PairResult
from rlhf.labels.records import Role, Task, prompt_key
from rlhf.labels.report import Situation
from rlhf.process.files import digest


def question_id(task: Task) -> str:
    """A hash, the same for tasks that ask the same about the same answers."""
    key = prompt_key(task.prompt, task.tools)
    return digest([key, *sorted(answer.id for answer in task.answers)])


def review_rows(situation: Situation) -> list[dict[str, Any]]:
    """The queue, in the order of the exports and their tasks."""
    results: dict[str, list[PairResult]] = defaultdict(list)
    for result in situation.aggregated.results:
        results[result.pair.task].append(result)
    labels: dict[str, list[Checked]] = defaultdict(list)
    for label in situation.labels:
        labels[question_id(situation.ledgers.tasks[label.task][1])].append(label)
    rows = []
    for export in sorted(situation.ledgers.exports.values(), key=lambda e: (e.created, e.id)):
        for task in export.tasks:
            if task.role is not Role.main or task.id not in results:
                continue
            own = labels[question_id(task)]
            why = _reasons(results[task.id], situation, export.kind, own)
            if why:
                entries = [_label_entry(label, situation) for label in own]
                rows.append({**task_row(task), "why": why, "labels": entries})
    return rows


def _reasons(
    results: list[PairResult], situation: Situation, kind: LabelKind, labels: list[Checked]
) -> list[str]:
    """Why a task goes out again, in words; `results` of its pairs, `labels` of its question."""
    reasons = []
    for result in results:
        counts = sorted(result.votes.items(), key=lambda item: item[0].value)
        votes = ", ".join(f"{n} {outcome.value}" for outcome, n in counts)
        fate = situation.fates[result.pair.id]
        asked_once = situation.votes.asked[result.pair.id] == 1
        if fate is Fate.split:
            reasons.append(f"split: {votes}")
        elif fate is Fate.unsure:
            reasons.append(f"confidence {result.confidence:.3f}: {votes}")
        elif fate is Fate.few_labels or kind is not LabelKind.pair:
            continue
        elif result.disputed and asked_once:
            reasons.append(f"annotators differ: {votes}")
    if kind is LabelKind.ranking and not reasons and _best_disputed(labels, situation):
        reasons.append("annotators differ on the best one")
    return reasons


def _best_disputed(labels: list[Checked], situation: Situation) -> bool:
    """Whether rankings of one export put different answers first."""
    best, exports = set(), set()
    for label in labels:
        if label.annotator in situation.without:
            continue
        if label.outcome is Outcome.ranked:
            best.add(label.ranking[0])
        elif label.outcome is Outcome.tie:
            best.add(())
        else:
            continue
        exports.add(label.export)
    return len(best) > 1 and len(exports) == 1


def _label_entry(label: Checked, situation: Situation) -> dict[str, Any]:
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
