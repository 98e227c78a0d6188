"""The records of labelling.

    Candidates   a prompt and the distinct answers to it that may be compared
    Task         one question to people: two answers side by side, or several to rank. Tools and
                 annotators get its id, prompt and `shown`; all else is hidden and stays in the
                 export's ledger
    Judgement    what one annotator answered to one task, before it was checked against the ledger

Two orders of a task's answers must not be confused. `answers` are in the order of their ids, a hash
of the text, so that their position tells nothing of who wrote them. `shown` is that order shuffled:
slot i shows answers[order[i]].
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from conf.choices import LabelKind
from rlhf.models.encoding import turn_text
from rlhf.process.files import digest
from rlhf.types import Tools

# slots or indices of answers, the best first, equal ones together
Ranking = tuple[tuple[int, ...], ...]


class Role(Enum):
    """Why a task is there; hidden from annotators."""

    main = "main"
    gold = "gold"  # its answer is known
    repeat = "repeat"  # asks again what another task asked


class Verdict(Enum):
    """An annotator's answer to a task."""

    left = "left"  # the first shown is better
    right = "right"  # the second shown is better
    tie = "tie"
    skip = "skip"  # the annotator looked, and can't or won't decide
    cancelled = "cancelled"  # the tool's own skip
    ranked = "ranked"


@dataclass(frozen=True, slots=True)
class Answer:
    """One response that may be shown."""

    text: str
    policy: str = ""  # who wrote it
    score: float | None = None  # the reward model's, or the run's that the answer comes from
    spread: float | None = None  # standard deviation of an ensemble's scores
    episode: bool = False  # the text holds an environment's words too, which nobody wrote

    @property
    def id(self) -> str:
        """A hash of the text."""
        return digest(self.text)


@dataclass(frozen=True, slots=True)
class Candidates:
    """A prompt and the distinct answers to it, of which some pairs will be shown."""

    prompt: Any  # a string, or a list of messages
    answers: tuple[Answer, ...]  # no two with the same text
    tools: Tools | None = None  # functions that the answers may call

    @property
    def id(self) -> str:
        """A hash of the prompt, and of its functions where it has some."""
        return prompt_key(self.prompt, self.tools)


@dataclass(frozen=True, slots=True)
class Task:
    """One question."""

    id: str  # "<export>-<number>": what tools carry as pair_id; tells nothing else
    prompt: Any  # a string, or a list of messages
    answers: tuple[Answer, ...]  # in the order of their ids
    order: tuple[int, ...]  # slot i shows answers[order[i]]
    role: Role = Role.main
    chosen_by: str = ""  # the method that chose it
    best: int | None = None  # of a gold task: the index in `answers` of the best one
    repeats: str | None = None  # of a repeated task: the id of the first
    tools: Tools | None = None  # functions that the answers may call

    @property
    def shown(self) -> tuple[str, ...]:
        """The answers' texts as annotators see them: left and right, or from top to bottom."""
        return tuple(self.answers[i].text for i in self.order)

    @property
    def swapped(self) -> bool:
        """Whether the first of a pair's `answers` is shown second."""
        return self.order[0] != 0


@dataclass(frozen=True, slots=True)
class Export:
    """What went out: the questions, and what annotators read."""

    id: str  # 12 hexadecimal digits of what was asked
    kind: LabelKind
    title: str
    instructions: str  # the text itself
    ratings: bool
    comments: bool
    created: str  # ISO 8601, UTC
    tasks: tuple[Task, ...]  # in the order in which they are shown
    prelabel: bool = False  # whether targets get the reward model's preference as a suggestion
    overlap: int = 1  # annotators wanted for each task
    # policies, choice, seed, A/B plan ...: for the ledger and the data card
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What one annotator answered to one task. Slots are those shown."""

    task: str  # its id, as the file has it
    annotator: str  # "" where the file does not say
    verdict: Verdict
    ranking: Ranking = ()  # verdict=ranked: slots in `shown`; unranked ones are left out
    ratings: tuple[int | None, ...] = ()  # 1 to 5 of each slot; () where none was given
    comment: str = ""
    seconds: float | None = None  # that it took
    time: str | None = None  # ISO 8601, when it was made
    annotation: str = ""  # the tool's own number of it
    place: str = ""  # file and row (as SourceRow.place), for messages
    # as the file has it, None where it has none: what was edited on the way is refused
    prompt: Any = None
    shown: tuple[str, ...] | None = None  # likewise
    tools: Any = None  # likewise


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row of a file that is no judgement: file and row, its task, and why."""

    place: str
    task: str  # "" where it has no id
    reason: str


def as_text(prompt: Any) -> str:
    """A prompt as people read it: messages with their roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {turn_text(message)}" for message in prompt)


def tools_text(tools: Tools | None) -> str:
    """Functions as people read them: indented JSON, which programs read too; "" for none."""
    return json.dumps(tools, ensure_ascii=False, indent=2) if tools else ""


def prompt_key(prompt: Any, tools: Tools | None) -> str:
    """A hash of a prompt, and of the functions that its answers may call where there are some."""
    if tools is None:
        return digest(prompt)
    return digest([prompt, tools])


def export_id(
    questions: Sequence[tuple[Any, Sequence[str], Sequence[int]]], *, created: str, seed: int
) -> str:
    """A hash of (prompt, answers' texts, order) of every task, and of the time: two exports of the
    same answers are two exports. A prompt with functions is the list of both.
    """
    content = [[prompt, list(texts), list(order)] for prompt, texts, order in questions]
    return digest([content, created, seed])[:12]
