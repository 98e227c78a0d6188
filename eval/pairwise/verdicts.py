"""What a judge is asked about two answers, and what it says. Pure functions."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

FIRST, SECOND = "A", "B"  # what the answers are called, by their place in the question
FIELDS = ("criteria", "prompt", "first", "second")
_FIELD = re.compile(r"\{(" + "|".join(FIELDS) + r")\}")
_MARK = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE)
_ALONE = re.compile(r"(?:(?:answer|assistant|verdict)\s*:?\s*)?(A|B|tie)", re.IGNORECASE)
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


class Verdict(Enum):
    """Which of the two answers is better, by their place in the question."""

    first = "first"
    second = "second"
    tie = "tie"


_VERDICTS = {"a": Verdict.first, "b": Verdict.second, "c": Verdict.tie, "tie": Verdict.tie}


@dataclass(frozen=True, slots=True)
class Reply:
    """A judge's own words, and the verdict in them; None where they hold none."""

    text: str
    verdict: Verdict | None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two policies' answers to one prompt."""

    prompt_id: str  # answers to one prompt are not independent
    prompt: str
    policies: tuple[str, str]
    answers: tuple[str, str]  # in the order of `policies`

    @property
    def longer_by(self) -> int:
        """Characters by which the first policy's answer is longer than the second's."""
        return len(self.answers[0]) - len(self.answers[1])


@dataclass(frozen=True, slots=True)
class Judged:
    """A pair with the judge's replies: `shown` with the first policy's answer in the first place,
    `swapped` with it in the second. Both None: it was not asked, for the reason in `unasked`.
    """

    pair: Pair
    shown: Reply | None
    swapped: Reply | None
    unasked: str | None = None

    @property
    def wins(self) -> tuple[float, float] | None:
        """What the first policy gets of each order: 1 for a win, 1/2 for a tie, 0 for a loss. None
        where one of the two replies holds no verdict.
        """
        if self.shown is None or self.swapped is None:
            return None
        first, second = self.shown.verdict, self.swapped.verdict
        if first is None or second is None:
            return None
        return _WINS[first], 1 - _WINS[second]


_WINS = {Verdict.first: 1.0, Verdict.tie: 0.5, Verdict.second: 0.0}


def read_verdict(text: str) -> Verdict | None:
    """The verdict in a judge's reply; None where it isn't clear.

    Clear are marks [[A]], [[B]], [[C]] or [[tie]], all of one kind, or a reply that is nothing but
    A, B or tie, with quotes and full stops around it. What stands in <think> at the beginning
    doesn't count.
    """
    rest = _THOUGHT.sub("", text)
    marks = {mark.lower() for mark in _MARK.findall(rest)}
    if marks:
        found = {_VERDICTS[mark] for mark in marks}
        return found.pop() if len(found) == 1 else None
    alone = _ALONE.fullmatch(rest.strip(" \t\r\n\"'`*.()[]"))
    return _VERDICTS[alone[1].lower()] if alone else None


def fields_of(template: str) -> set[str]:
    """The fields in a template of the question."""
    return set(_FIELD.findall(template))


def question(template: str, values: Mapping[str, str]) -> str:
    """`template` with its fields filled in. What an answer holds stays as it is, braces too."""
    return _FIELD.sub(lambda match: values[match[1]], template)


def prompt_text(source: object, text: str) -> str:
    """A prompt as a judge reads it: a plain text as it is; of a conversation each turn behind its
    role, and a lone question without. `source`: the row's own prompt; `text`: what the policy read.
    """
    if not isinstance(source, list):
        return text if source is None else str(source)
    turns: Sequence[Mapping[str, Any]] = source
    if len(turns) == 1 and turns[0].get("role") == "user":
        return str(turns[0].get("content") or "")
    return "\n\n".join(f"{turn.get('role')}: {turn.get('content') or ''}" for turn in turns)
