"""Judgements checked against the ledgers of the exports that they answer: each becomes a label that
does not depend on the sides shown, or is refused.

    outcome   first, second: answers[0] or answers[1] of the task is better; the sides as shown are
              mapped through the recorded order
    ranking   indices in Task.answers, the best first, equal ones together
    ratings   of each answer in Task.answers

Nothing is repaired: a row that is not known, was edited on the way, or does not fit what was asked
is refused with its place in the file, its id and the reason.
"""

import dataclasses
import datetime
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from conf.choices import LabelKind
from rlhf.labels.records import (
    Export,
    Judgement,
    Ranking,
    Task,
    Unreadable,
    Verdict,
    as_text,
    tools_text,
)
from rlhf.process.files import digest

STARS = (1, 5)  # the least and the most of a rating


class Outcome(Enum):
    """What a label says of its task, whatever the sides shown."""

    first = "first"  # answers[0] is better
    second = "second"
    tie = "tie"
    skip = "skip"
    cancelled = "cancelled"
    ranked = "ranked"


CHOICES = (Outcome.first, Outcome.second, Outcome.tie)  # those that compare two answers


@dataclass(frozen=True, slots=True)
class Checked:
    """A label: one annotator's judgement of one task, checked."""

    export: str
    task: str
    annotator: str
    outcome: Outcome
    ranking: Ranking = ()  # outcome=ranked: indices in Task.answers
    ratings: tuple[int | None, ...] = ()  # of each answer in Task.answers; () where none was given
    comment: str = ""
    seconds: float | None = None
    time: str | None = None  # ISO 8601, as it came
    annotation: str = ""  # the tool's own number of it
    place: str = ""  # file and row that it came from

    @property
    def key(self) -> tuple[str, str, str]:
        """What two labels have in common of which the later one counts."""
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
        """A hash, equal for the same row refused for the same reason again, wherever its file
        lies.
        """
        if self.row is None:
            content = {"place": self.place}
        else:
            content = {key: value for key, value in self.row.items() if key != "place"}
        return digest([self.task, self.reason, content])


@dataclass(frozen=True, slots=True)
class Ledgers:
    """The exports whose labels are known here, and every task by its id."""

    exports: Mapping[str, Export]
    tasks: Mapping[str, tuple[Export, Task]] = field(init=False)

    def __post_init__(self) -> None:
        tasks: dict[str, tuple[Export, Task]] = {}
        for export in self.exports.values():
            tasks |= {task.id: (export, task) for task in export.tasks}
        object.__setattr__(self, "tasks", tasks)


class _Refusal(ValueError):
    """Why a judgement is refused."""


def moment(time: str) -> datetime.datetime:
    """A label's ISO 8601 time; without a zone it is UTC. Raises ValueError."""
    moment = datetime.datetime.fromisoformat(time)
    if moment.tzinfo is None:
        return moment.replace(tzinfo=datetime.UTC)
    return moment


def check(
    rows: Iterable[Judgement | Unreadable], ledgers: Ledgers, annotator: str | None = None
) -> Iterator[Checked | Refused]:
    """Check each row. `annotator`: who made the labels that name nobody."""
    for row in rows:
        if isinstance(row, Unreadable):
            yield Refused(row.place, row.task, row.reason)
        else:
            yield check_one(row, ledgers, annotator)


def check_one(
    judgement: Judgement, ledgers: Ledgers, annotator: str | None = None
) -> Checked | Refused:
    """A judgement as a label, or why it is none."""
    try:
        export, task = _task_of(judgement, ledgers)
        _check_unedited(judgement, task)
        name = judgement.annotator.strip() or (annotator or "").strip()
        if not name:
            raise _Refusal(
                "no annotator: the row must say who judged; label.annotator=NAME names who made "
                "all labels that do not say it"
            )
        _check_times(judgement)
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
    except _Refusal as refusal:
        return _refused(judgement, str(refusal))


def _refused(judgement: Judgement, reason: str) -> Refused:
    row = {**dataclasses.asdict(judgement), "verdict": judgement.verdict.value}
    return Refused(judgement.place, judgement.task, reason, row)


def _task_of(judgement: Judgement, ledgers: Ledgers) -> tuple[Export, Task]:
    """The export and the task that the judgement is about."""
    known_task = ledgers.tasks.get(judgement.task)
    if known_task is not None:
        return known_task
    export = judgement.task.rpartition("-")[0]
    known = ", ".join(sorted(ledgers.exports))
    if export in ledgers.exports:
        raise _Refusal(f"unknown task {judgement.task!r}: export {export} has no such task")
    if export:
        raise _Refusal(
            f"task {judgement.task!r} is of another export: expected one of {known}; "
            "label.export=DIRECTORY names where it was made"
        )
    raise _Refusal(
        f"unknown task {judgement.task!r}: expected an id of the export {known}, as pair_id"
    )


def _check_unedited(judgement: Judgement, task: Task) -> None:
    """What came back is what went out. Line ends may differ, and a chat and its tools may come back
    as people read them.
    """
    prompt, tools = judgement.prompt, judgement.tools
    same = (_content_of(task.prompt), _content_of(as_text(task.prompt)))
    if prompt is not None and _content_of(prompt) not in same:
        raise _Refusal(f"edited: the prompt of task {task.id} is not the one that went out")
    functions = (_content_of(task.tools), _content_of(tools_text(task.tools)))
    if tools is not None and _content_of(tools) not in functions:
        raise _Refusal(f"edited: the tools of task {task.id} are not those that went out")
    if judgement.shown is None:
        return
    back = [digest(text) for text in judgement.shown]
    out = [digest(text) for text in task.shown]
    if back == out:
        return
    if sorted(back) == sorted(out):
        raise _Refusal(
            f"edited: the answers of task {task.id} came back in another order than they were "
            "shown in"
        )
    if len(back) != len(out):
        raise _Refusal(
            f"edited: task {task.id} went out with {len(out)} answers and came back with "
            f"{len(back)}"
        )
    edited = [
        str(number) for number, (a, b) in enumerate(zip(back, out, strict=True), start=1) if a != b
    ]
    raise _Refusal(
        f"edited: answer {', '.join(edited)} of task {task.id} is not the one that went out"
    )


def _content_of(value: Any) -> str:
    """A hash of what a prompt or its tools say. A browser has one kind of number: 1.0 comes back as
    1, and a long number as the nearest that it has.
    """

    def as_in_browser(held: Any) -> Any:
        if isinstance(held, Mapping):
            return {key: as_in_browser(inner) for key, inner in held.items()}
        if isinstance(held, list):
            return [as_in_browser(inner) for inner in held]
        if isinstance(held, int) and not isinstance(held, bool):
            return float(held)
        return held

    return digest(as_in_browser(value))


def _check_times(judgement: Judgement) -> None:
    seconds = judgement.seconds
    if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
        raise _Refusal(f"it took {seconds} seconds: expected a number of at least 0")
    if judgement.time is not None:
        try:
            moment(judgement.time)
        except ValueError:
            raise _Refusal(
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
        raise _Refusal(
            f"verdict {verdict.value} on a task that asks for a {export.kind.value}: expected "
            f"{expected}"
        )
    if verdict in (Verdict.left, Verdict.right):
        side = 0 if verdict is Verdict.left else 1
        return CHOICES[task.order[side]]
    return Outcome(verdict.value)


def _ranking(judgement: Judgement, task: Task) -> Ranking:
    groups = judgement.ranking
    if judgement.verdict is not Verdict.ranked:
        if groups:
            raise _Refusal(f"verdict {judgement.verdict.value} with a ranking")
        return ()
    slots = [slot for group in groups for slot in group]
    once = len(set(slots)) == len(slots)
    known = set(slots) <= set(range(len(task.order)))
    if not slots or not all(groups) or not once or not known:
        raise _Refusal(
            f"ranking {[list(group) for group in groups]}: expected places 0 to "
            f"{len(task.order) - 1}, each once at most, at least one"
        )
    return tuple(tuple(sorted(task.order[slot] for slot in group)) for group in groups)


def _ratings(judgement: Judgement, task: Task) -> tuple[int | None, ...]:
    given = judgement.ratings
    if not given:
        return ()
    low, high = STARS
    if len(given) != len(task.order) or not all(map(_is_rating, given)):
        raise _Refusal(
            f"ratings {list(given)}: expected {len(task.order)} whole numbers from {low} to {high}"
        )
    out: list[int | None] = [None] * len(given)
    for slot, rating in enumerate(given):
        out[task.order[slot]] = rating
    return tuple(out)


def _is_rating(value: Any) -> bool:
    low, high = STARS
    if value is None:
        return True
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
