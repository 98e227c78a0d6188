"""Judgements against the ledgers of the exports that they answer: a label in places that do not
depend on the sides shown, or a refusal.

    verdict   first, second: answers[0] or answers[1] of the task is better; the sides as shown are
    mapped through the recorded order
    ranking   places in Task.answers, the best first, equal ones together
    ratings   of each place in Task.answers

Nothing is repaired: what is not known, was edited on the way, or does not fit what was asked is
refused with its place, its id and why.
"""

import dataclasses
import datetime
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from conf.choices import LabelKind
from rlhf.labels.records import Export, Judgement, Task, Unreadable, Verdict, as_text
from rlhf.process.hashing import digest

STARS = (1, 5)  # the least and the most of a rating


class Outcome(Enum):
    """What a label says of its task."""

    first = "first"  # answers[0] is better
    second = "second"
    tie = "tie"
    skip = "skip"
    cancelled = "cancelled"
    ranked = "ranked"


CHOICES = (Outcome.first, Outcome.second, Outcome.tie)  # what compares two answers


@dataclass(frozen=True, slots=True)
class Checked:
    """What one annotator said of one task."""

    export: str
    task: str
    annotator: str
    outcome: Outcome
    ranking: tuple[tuple[int, ...], ...] = ()  # outcome=ranked: places in Task.answers
    ratings: tuple[int | None, ...] = ()  # of each place in Task.answers; () where none was given
    comment: str = ""
    seconds: float | None = None
    time: str | None = None  # ISO 8601, as it came
    annotation: str = ""  # the tool's own number of it
    place: str = ""  # file and row that it came from

    @property
    def key(self) -> tuple[str, str, str]:
        """Of which an annotator's later label counts."""
        return self.export, self.task, self.annotator


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that is no label, with all that is known of it."""

    place: str
    task: str
    reason: str
    # the judgement as it came; None where the row could not be read at all
    row: dict[str, Any] | None = None

    @property
    def id(self) -> str:
        """Equal for the same row refused for the same reason again, wherever its file lies."""
        content = {
            k: v
            for k, v in (self.row or {"place": self.place}).items()
            if self.row is None or k != "place"
        }
        return digest([self.task, self.reason, content])


@dataclass(frozen=True, slots=True)
class Ledgers:
    """The exports whose labels are known here, and every task by its id."""

    exports: Mapping[str, Export]
    tasks: Mapping[str, tuple[Export, Task]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(
            self,
            "tasks",
            {task.id: (export, task) for export in self.exports.values() for task in export.tasks},
        )


class _Unfit(ValueError):
    """Why a judgement is refused."""


def moment(time: str) -> datetime.datetime:
    """A label's time; without a zone it is UTC. Raises ValueError."""
    found = datetime.datetime.fromisoformat(time)
    return found if found.tzinfo is not None else found.replace(tzinfo=datetime.UTC)


def check(
    rows: Iterable[Judgement | Unreadable], ledgers: Ledgers, annotator: str | None = None
) -> Iterator[Checked | Refused]:
    """Each row checked. `annotator`: who made the labels that do not say so."""
    for row in rows:
        yield (
            _refused(row, row.reason)
            if isinstance(row, Unreadable)
            else check_one(row, ledgers, annotator)
        )


def check_one(
    judgement: Judgement, ledgers: Ledgers, annotator: str | None = None
) -> Checked | Refused:
    """One judgement as a label, or why it is none."""
    try:
        export, task = _asked(judgement, ledgers)
        _check_unedited(judgement, task)
        name = judgement.annotator.strip() or (annotator or "").strip()
        if not name:
            raise _Unfit(
                "no annotator: the row must say who judged; label.annotator=NAME names who made "
                "all labels that do not say it"
            )
        _check_when(judgement)
        return Checked(
            export=export.id,
            task=task.id,
            annotator=name,
            outcome=_outcome(judgement, export, task),
            ranking=_ranking(judgement, task),
            ratings=_ratings(judgement, task),
            comment=judgement.comment,
            seconds=judgement.seconds,
            time=judgement.time,
            annotation=judgement.annotation,
            place=judgement.place,
        )
    except _Unfit as problem:
        return _refused(judgement, str(problem))


def _refused(row: Judgement | Unreadable, reason: str) -> Refused:
    if isinstance(row, Unreadable):
        return Refused(row.place, row.task, reason)
    content = {**dataclasses.asdict(row), "verdict": row.verdict.value}
    return Refused(row.place, row.task, reason, content)


def _asked(judgement: Judgement, ledgers: Ledgers) -> tuple[Export, Task]:
    found = ledgers.tasks.get(judgement.task)
    if found is not None:
        return found
    export = judgement.task.rpartition("-")[0]
    known = ", ".join(sorted(ledgers.exports))
    if export in ledgers.exports:
        raise _Unfit(f"unknown task {judgement.task!r}: export {export} has no such task")
    if export:
        raise _Unfit(
            f"task {judgement.task!r} is of another export: expected one of {known}; "
            "label.export=DIRECTORY names where it was made"
        )
    raise _Unfit(
        f"unknown task {judgement.task!r}: expected an id of the export {known}, as pair_id"
    )


def _check_unedited(judgement: Judgement, task: Task) -> None:
    """What came back must be what went out; line ends may differ, and a chat may come back as
    people read it.
    """
    prompt = judgement.prompt
    if prompt is not None and digest(prompt) not in (
        digest(task.prompt),
        digest(as_text(task.prompt)),
    ):
        raise _Unfit(f"edited: the prompt of task {task.id} is not the one that went out")
    if judgement.shown is None:
        return
    back, out = [digest(text) for text in judgement.shown], [digest(text) for text in task.shown]
    if back == out:
        return
    if sorted(back) == sorted(out):
        raise _Unfit(
            f"edited: the answers of task {task.id} came back in another order than they were "
            "shown in"
        )
    if len(back) != len(out):
        raise _Unfit(
            f"edited: task {task.id} went out with {len(out)} answers and came back with "
            f"{len(back)}"
        )
    places = ", ".join(
        str(place) for place, (a, b) in enumerate(zip(back, out, strict=True), start=1) if a != b
    )
    raise _Unfit(f"edited: answer {places} of task {task.id} is not the one that went out")


def _check_when(judgement: Judgement) -> None:
    seconds = judgement.seconds
    if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
        raise _Unfit(f"it took {seconds} seconds: expected a number of at least 0")
    if judgement.time is not None:
        try:
            moment(judgement.time)
        except ValueError:
            raise _Unfit(
                f"time {judgement.time!r}: expected ISO 8601, such as 2026-01-31T12:00:00+00:00"
            ) from None


_OF_KIND = {
    LabelKind.pair: (Verdict.left, Verdict.right, Verdict.tie, Verdict.skip, Verdict.cancelled),
    # tie: all are equal
    LabelKind.ranking: (Verdict.ranked, Verdict.tie, Verdict.skip, Verdict.cancelled),
}


def _outcome(judgement: Judgement, export: Export, task: Task) -> Outcome:
    verdict = judgement.verdict
    if verdict not in _OF_KIND[export.kind]:
        expected = ", ".join(v.value for v in _OF_KIND[export.kind])
        raise _Unfit(
            f"verdict {verdict.value} on a task that asks for a {export.kind.value}: expected "
            f"{expected}"
        )
    if verdict in (Verdict.left, Verdict.right):
        return CHOICES[task.order[0 if verdict is Verdict.left else 1]]
    return Outcome(verdict.value)


def _ranking(judgement: Judgement, task: Task) -> tuple[tuple[int, ...], ...]:
    groups = judgement.ranking
    if judgement.verdict is not Verdict.ranked:
        if groups:
            raise _Unfit(f"verdict {judgement.verdict.value} with a ranking")
        return ()
    places = [place for group in groups for place in group]
    if (
        not places
        or not all(groups)
        or len(set(places)) != len(places)
        or not set(places) <= set(range(len(task.order)))
    ):
        raise _Unfit(
            f"ranking {[list(group) for group in groups]}: expected places 0 to "
            f"{len(task.order) - 1}, each once at most, at least one"
        )
    return tuple(tuple(sorted(task.order[place] for place in group)) for group in groups)


def _ratings(judgement: Judgement, task: Task) -> tuple[int | None, ...]:
    given = judgement.ratings
    if not given:
        return ()
    low, high = STARS
    fits = len(given) == len(task.order) and all(
        r is None or (isinstance(r, int) and not isinstance(r, bool) and low <= r <= high)
        for r in given
    )
    if not fits:
        raise _Unfit(
            f"ratings {list(given)}: expected {len(task.order)} whole numbers from {low} to {high}"
        )
    out: list[int | None] = [None] * len(given)
    for place, rating in enumerate(given):
        out[task.order[place]] = rating
    return tuple(out)
