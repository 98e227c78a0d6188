"""Asks a judge about every pair of answers, in both orders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

from eval.pairwise.verdicts import Judged, Pair, Reply, prompt_text, question, read_verdict
from rlhf.types import Message, Rollout

IDENTICAL = "the answers are the same"
TOO_LONG = "the question is longer than the judge can read"


class Judge(Protocol):
    """Replies to questions."""

    def ask(self, questions: Sequence[list[Message]]) -> list[str | None]:
        """A reply to each conversation, in their order; None to one that is too long for the judge
        to read. Raises UserError where it doesn't reply.
        """
        ...


@dataclass(frozen=True, slots=True)
class Wording:
    """How a judge is asked."""

    template: str  # with the fields of eval.pairwise.verdicts.FIELDS
    criteria: str
    system: str | None  # None: no system message

    def messages(self, pair: Pair, *, swapped: bool) -> list[Message]:
        """The question about a pair; `swapped`: the second policy's answer comes first."""
        first, second = reversed(pair.answers) if swapped else pair.answers
        values = {
            "criteria": self.criteria,
            "prompt": pair.prompt,
            "first": first,
            "second": second,
        }
        asked: list[Message] = [{"role": "user", "content": question(self.template, values)}]
        if self.system is not None:
            asked.insert(0, {"role": "system", "content": self.system})
        return asked


def pairs_of(answers: Mapping[str, Sequence[Rollout]]) -> list[Pair]:
    """Every two policies' answers to each prompt; with several answers of a policy to a prompt the
    first with the first, and so on; of an episode the last turn. Raises ValueError unless all
    answered the same prompts in the same order.
    """
    out = []
    for one, other in combinations(answers, 2):
        ids = [rollout.prompt.id for rollout in answers[one]]
        if ids != [rollout.prompt.id for rollout in answers[other]]:
            raise ValueError(f"{one} and {other} must answer the same prompts in the same order")
        for mine, theirs in zip(answers[one], answers[other], strict=True):
            prompt = prompt_text(mine.prompt.source, mine.prompt.text)
            texts = (mine.text, theirs.text)
            out.append(Pair(mine.prompt.id, prompt, (one, other), texts))
    return out


def judge_pairs(pairs: Sequence[Pair], judge: Judge, wording: Wording) -> list[Judged]:
    """What the judge says of each pair in both orders, in the order of `pairs`. A pair of equal
    answers is not asked about: nothing could be said of it.
    """
    questions = []
    for pair in pairs:
        if pair.answers[0] != pair.answers[1]:
            questions.append(wording.messages(pair, swapped=False))
            questions.append(wording.messages(pair, swapped=True))
    replies = iter(judge.ask(questions) if questions else [])
    out = []
    for pair in pairs:
        if pair.answers[0] == pair.answers[1]:
            out.append(Judged(pair, None, None, IDENTICAL))
        else:
            out.append(_judged(pair, next(replies), next(replies)))
    return out


def _judged(pair: Pair, shown: str | None, swapped: str | None) -> Judged:
    if shown is None or swapped is None:
        return Judged(pair, None, None, TOO_LONG)
    return Judged(pair, Reply(shown, read_verdict(shown)), Reply(swapped, read_verdict(swapped)))
