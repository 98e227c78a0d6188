"""Responses as what may be compared: grouped by prompt, each text once, none empty."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.labels.records import Answer, Candidates
from rlhf.process.hashing import digest


@dataclass(frozen=True, slots=True)
class Response:
    """What a policy wrote, before it is known whether it can be shown."""

    prompt: Any  # a string, or a list of messages
    text: str
    policy: str
    score: float | None = None
    spread: float | None = None  # standard deviation of an ensemble's scores

    @property
    def said(self) -> str:
        """What two responses have in common that say the same: surrounding white space and the kind
        of line ends don't count.
        """
        return digest(self.text.strip())

    @property
    def empty(self) -> bool:
        return not self.text.strip()

    @property
    def answer(self) -> Answer:
        return Answer(self.text, self.policy, self.score, self.spread)


@dataclass(frozen=True, slots=True)
class Gathered:
    """Candidates, and what became of the responses that are not among them."""

    candidates: tuple[Candidates, ...]  # in the order in which their prompts came
    counts: dict[str, int]
    """responses, prompts; empty: responses without text; duplicates: responses that say what an earlier one to their prompt said; few: prompts
    with too few distinct answers; ties (only of two policies): prompts to which both said the same; missing: prompts that only one answered."""


def by_prompt(responses: Iterable[Response]) -> dict[str, list[Response]]:
    """Responses by their prompt's hash, in the order in which they came."""
    out: dict[str, list[Response]] = {}
    for response in responses:
        out.setdefault(digest(response.prompt), []).append(response)
    return out


def first_prompts(responses: Sequence[Response], count: int | None) -> list[Response]:
    """The responses to the first `count` prompts; all for None."""
    kept = set(list(by_prompt(responses))[:count])
    return [response for response in responses if digest(response.prompt) in kept]


def gather(responses: Sequence[Response], *, least: int) -> Gathered:
    """Each prompt with its distinct answers, where it has at least `least` of them.

    Of responses that say the same the first one stands for all, with its policy and score.
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
            distinct.setdefault(response.said, response)
        counts["empty"] += len(members) - len(written)
        counts["duplicates"] += len(written) - len(distinct)
        if len(distinct) < least:
            counts["few"] += 1
            continue
        out.append(
            Candidates(members[0].prompt, tuple(response.answer for response in distinct.values()))
        )
    return Gathered(tuple(out), dict(counts))


def gather_two(responses: Sequence[Response], policies: tuple[str, str]) -> Gathered:
    """For a comparison of two policies: the first response of each to each prompt, so that no two
    pairs share a prompt and all are independent.

    Where both said the same (nothing counts as said, too) nobody has to be asked: that is a tie.
    Where one of them is empty the prompt is left out, which a report has to say: it may be that
    policy's weakness.
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
        first = {
            policy: next((r for r in members if r.policy == policy), None) for policy in policies
        }
        pair = [response for response in first.values() if response is not None]
        if len(pair) < len(policies):
            counts["missing"] += 1
        elif pair[0].said == pair[1].said:
            counts["ties"] += 1
        elif any(response.empty for response in pair):
            counts["empty"] += 1
        else:
            out.append(Candidates(pair[0].prompt, tuple(response.answer for response in pair)))
    return Gathered(tuple(out), dict(counts))
