"""Responses turned into what may be compared: grouped by prompt, each text once, none empty."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.labels.records import Answer, Candidates, prompt_key
from rlhf.process.files import digest
from rlhf.types import Tools


@dataclass(frozen=True, slots=True)
class Response:
    """What a policy wrote, before it is known whether it can be shown."""

    prompt: Any  # a string, or a list of messages
    text: str
    policy: str
    score: float | None = None
    spread: float | None = None  # standard deviation of an ensemble's scores
    tools: Tools | None = None  # functions that it may call
    episode: bool = False  # the text is a policy's and its environment's

    @property
    def prompt_id(self) -> str:
        """A hash of the prompt, and of its functions where it has some."""
        return prompt_key(self.prompt, self.tools)

    @property
    def text_id(self) -> str:
        """A hash of the text, equal for responses that say the same: white space around the text
        and the kind of line ends don't count.
        """
        return digest(self.text.strip())

    @property
    def empty(self) -> bool:
        """Whether the text is nothing but white space."""
        return not self.text.strip()

    @property
    def answer(self) -> Answer:
        """The response as people may be shown it."""
        return Answer(self.text, self.policy, self.score, self.spread, self.episode)


@dataclass(frozen=True, slots=True)
class Gathered:
    """What may be compared, and what became of the other responses."""

    candidates: tuple[Candidates, ...]  # in the order in which their prompts came
    # responses, prompts: all of them
    # empty: responses without text; of two policies: prompts with an empty answer
    # duplicates: responses that repeat an earlier one to their prompt
    # few: prompts with too few distinct answers
    # ties (of two policies only): prompts to which both gave the same answer
    # missing (of two policies only): prompts that only one of them answered
    counts: dict[str, int]


def by_prompt(responses: Iterable[Response]) -> dict[str, list[Response]]:
    """Responses by their prompt's hash, in the order in which they came."""
    out: dict[str, list[Response]] = {}
    for response in responses:
        out.setdefault(response.prompt_id, []).append(response)
    return out


def first_prompts(responses: Sequence[Response], count: int | None) -> list[Response]:
    """The responses to the first `count` prompts; all for None."""
    kept = set(list(by_prompt(responses))[:count])
    return [response for response in responses if response.prompt_id in kept]


def gather(responses: Sequence[Response], *, least: int) -> Gathered:
    """Each prompt with its distinct answers, where it has at least `least` of them. The first of
    several equal responses stands for all, with its policy and score.
    """
    groups = by_prompt(responses)
    counts: Counter[str] = Counter(
        responses=len(responses), prompts=len(groups), empty=0, duplicates=0, few=0
    )
    out = []
    for members in groups.values():
        written = [response for response in members if not response.empty]
        distinct: dict[str, Response] = {}
        for response in written:
            distinct.setdefault(response.text_id, response)
        counts["empty"] += len(members) - len(written)
        counts["duplicates"] += len(written) - len(distinct)
        if len(distinct) < least:
            counts["few"] += 1
            continue
        answers = tuple(response.answer for response in distinct.values())
        out.append(Candidates(members[0].prompt, answers, members[0].tools))
    return Gathered(tuple(out), dict(counts))


def gather_two(responses: Sequence[Response], policies: tuple[str, str]) -> Gathered:
    """For a comparison of two policies: the first response of each to each prompt, so that no two
    pairs share a prompt and all are independent.

    Where both gave the same answer, also where both gave none, nobody has to be asked: that is a
    tie. Where one of the two is empty the prompt is left out; reports have to mention it, since it
    may be that policy's weakness.
    """
    groups = by_prompt(responses)
    counts: Counter[str] = Counter(
        responses=len(responses),
        prompts=len(groups),
        empty=0,
        duplicates=0,
        few=0,
        ties=0,
        missing=0,
    )
    out = []
    for members in groups.values():
        first: dict[str, Response] = {}
        for response in members:
            first.setdefault(response.policy, response)
        pair = [first[policy] for policy in policies if policy in first]
        if len(pair) < len(policies):
            counts["missing"] += 1
        elif pair[0].text_id == pair[1].text_id:
            counts["ties"] += 1
        elif any(response.empty for response in pair):
            counts["empty"] += 1
        else:
            answers = tuple(response.answer for response in pair)
            out.append(Candidates(pair[0].prompt, answers, pair[0].tools))
    return Gathered(tuple(out), dict(counts))
