"""Questions as the tasks that annotators see: sides drawn, gold and repeated ones hidden among the
others, all in one random order.

Pure, and the same for the same seed. What an annotator could notice is kept equal: gold questions
have as many answers as the others and prompts of the same shape, sides are drawn alike for all, and
neither a task's number nor its place tells its role.
"""

import logging
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from rlhf.labels.records import Answer, Role, Task, export_id
from rlhf.models.encoding import is_chat, split_answer
from rlhf.process.hashing import digest
from rlhf.types import PreferencePair

LOG = logging.getLogger("rlhf.labels")
_SHUFFLES = 200  # about one in three has no repeat beside its first, at the worst


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be asked, before it has a place."""

    prompt: Any  # a string, or a list of messages
    answers: tuple[Answer, ...]
    by: str = ""  # the method that chose it
    best: str | None = None  # of a gold question: the id of the better answer
    origin: str = ""  # of a question that goes out again: the earlier export's task

    @property
    def id(self) -> str:
        """The same for the same prompt and the same answers in any order."""
        return digest([self.prompt, sorted(answer.id for answer in self.answers)])


@dataclass(frozen=True, slots=True)
class Asked:
    """The tasks of an export, in the order in which they are shown."""

    id: str  # the export's
    tasks: tuple[Task, ...]
    # the earlier export's task by the new one's id
    origins: dict[str, str] = field(default_factory=dict)


def share_of(share: float, tasks: int) -> int:
    """How many gold or repeated tasks go with so many others: a share above 0 is at least one."""
    return math.ceil(share * tasks - 1e-9)


def ask(
    main: Sequence[Question], gold: Sequence[Question], *, repeats: int, seed: int, created: str
) -> Asked:
    """All of `main` and of `gold`, and `repeats` of `main` a second time.

    Each side gets the better half of the gold answers, and half of a policy's answers; half of the
    repeats have their sides exchanged. Raises ValueError for more repeats than can be placed: see
    `most_repeats`.
    """
    if repeats > most_repeats(len(main), len(gold)):
        raise ValueError(f"{repeats} repeats of {len(main)} questions with {len(gold)} gold ones")
    rng = random.Random(f"{seed}:ask")
    drafts = [
        _draft(question, _by_policy, side, rng)
        for question, side in zip(main, _sides(len(main), rng), strict=True)
    ]
    drafts += [
        _draft(question, _by_worth, side, rng)
        for question, side in zip(gold, _sides(len(gold), rng), strict=True)
    ]
    again = sorted(rng.sample(range(len(main)), repeats))
    drafts += [
        _again(drafts[i], exchanged, rng)
        for i, exchanged in zip(again, _sides(repeats, rng), strict=True)
    ]
    repeated = {len(main) + len(gold) + place: first for place, first in enumerate(again)}
    arranged = _arrange(len(drafts), repeated, rng)
    # Of a question that is there twice the one that comes first is the first: which of the two
    # drafts that is was drawn with the order.
    at = {draft: place for place, draft in enumerate(arranged)}
    firsts = {
        max(pair, key=at.__getitem__): min(pair, key=at.__getitem__) for pair in repeated.items()
    }
    name = export_id(
        [(d.prompt, [a.text for a in d.answers], d.order) for d in (drafts[i] for i in arranged)],
        created=created,
        seed=seed,
    )
    ids = {draft: f"{name}-{place + 1}" for draft, place in at.items()}
    tasks = []
    for i in arranged:
        second = i in firsts
        role = Role.repeat if second else drafts[i].role
        tasks.append(
            replace(drafts[i], id=ids[i], role=role, repeats=ids[firsts[i]] if second else None)
        )
    origins = {
        ids[firsts.get(i, i)]: question.origin
        for i, question in enumerate([*main, *gold])
        if question.origin
    }
    return Asked(name, tuple(tasks), origins)


def repeat_count(share: float, main: int, gold: int) -> int:
    """How many of the `main` questions are asked twice, for a `share` of them: as many as there is
    room for.
    """
    wanted, most = share_of(share, main), most_repeats(main, gold)
    if wanted > most:
        LOG.warning(
            "label.repeat_share=%g: with so few tasks a repeat would stand beside its first, so "
            "there are %d.",
            share,
            most,
        )
    return min(wanted, most)


def most_repeats(main: int, gold: int) -> int:
    """Repeats that can be placed away from their first: all, unless there is nothing else to stand
    between the two.
    """
    return main if main + gold >= 2 else 0


def _sides(count: int, rng: random.Random) -> list[bool]:
    """As many true as false (one more of either where `count` is odd), in random order."""
    out = [i % 2 == 0 for i in range(count)]
    if count % 2 and rng.random() < 0.5:
        out = [not side for side in out]
    rng.shuffle(out)
    return out


def _by_policy(question: Question, answers: Sequence[Answer]) -> int:
    return min(range(len(answers)), key=lambda i: (answers[i].policy, i))


def _by_worth(question: Question, answers: Sequence[Answer]) -> int:
    return next(i for i, answer in enumerate(answers) if answer.id == question.best)


def _draft(question: Question, reference: Any, first: bool, rng: random.Random) -> Task:
    """A task without an id. Of a pair the answer that `reference` names is shown first or second,
    as `first` says; several are shuffled.
    """
    answers = tuple(sorted(question.answers, key=lambda answer: answer.id))
    if len(answers) == 2:
        named = reference(question, answers)
        order: tuple[int, ...] = (named, 1 - named) if first else (1 - named, named)
    else:
        order = tuple(rng.sample(range(len(answers)), len(answers)))
    best = None if question.best is None else _by_worth(question, answers)
    return Task(
        "",
        question.prompt,
        answers,
        order,
        Role.main if best is None else Role.gold,
        question.by,
        best,
    )


def _again(first: Task, exchanged: bool, rng: random.Random) -> Task:
    """The same question with its sides drawn anew."""
    if len(first.order) == 2:
        return replace(first, order=first.order[::-1] if exchanged else first.order)
    return replace(first, order=tuple(rng.sample(first.order, len(first.order))))


def _arrange(count: int, repeated: dict[int, int], rng: random.Random) -> list[int]:
    """A random order of `count` drafts in which no repeat stands beside its first; every such order
    is equally likely.
    """
    order = list(range(count))
    for _ in range(_SHUFFLES):
        rng.shuffle(order)
        if all(repeated.get(a) != b and repeated.get(b) != a for a, b in pairwise(order)):
            return order
    firsts, others = (
        list(repeated.values()),
        [i for i in range(count) if i not in repeated and i not in set(repeated.values())],
    )
    # a repeat comes as many places after its first as there are repeats and others together: two or
    # more
    return [*firsts, *others, *repeated]


def gold_questions(
    pairs: Sequence[PreferencePair], *, size: int, chat: bool
) -> tuple[list[Question], dict[str, int]]:
    """Questions of `size` answers of which one is known to be the best: it was preferred to each of
    the others. At most one for a prompt.

    `chat`: whether the other questions' prompts are lists of messages; a gold prompt is brought
    into that shape, or it could be told by its looks. Second: how many pairs were left out, by
    reason.
    """
    left_out: Counter[str] = Counter()
    prompts: dict[str, Any] = {}
    texts: dict[str, dict[str, str]] = {}  # by prompt, by what they say
    beaten: dict[str, dict[str, list[str]]] = {}  # by prompt, by the better one
    for pair in pairs:
        made = _plain_pair(pair, chat)
        if isinstance(made, str):
            left_out[made] += 1
            continue
        prompt, better, worse = made
        name = digest(prompt)
        prompts.setdefault(name, prompt)
        good, bad = digest(better.strip()), digest(worse.strip())
        texts.setdefault(name, {}).update({good: better, bad: worse})
        beaten.setdefault(name, {}).setdefault(good, []).append(bad)
    out = []
    for name, prompt in prompts.items():
        best, rest = max(beaten[name].items(), key=lambda item: len(set(item[1])))
        others = list(dict.fromkeys(rest))[: size - 1]
        if any(best in beaten[name].get(other, ()) for other in others):
            left_out["pairs that contradict each other"] += 1
        elif len(others) < size - 1:
            left_out[f"prompts without an answer that was preferred to {size - 1} others"] += 1
        else:
            answers = tuple(Answer(texts[name][said]) for said in (best, *others))
            out.append(Question(prompt, answers, by="gold", best=answers[0].id))
    return out, dict(left_out)


def _plain_pair(pair: PreferencePair, chat: bool) -> tuple[Any, str, str] | str:
    """(prompt, better, worse), or why the pair can't be shown as a question."""
    given: Any = pair.prompt
    chosen: Any = pair.chosen
    rejected: Any = pair.rejected
    prompt: Any
    try:
        prompt, better = split_answer(given, chosen)
        other, worse = split_answer(given, rejected)
    except ValueError as error:
        return str(error)
    if not prompt:
        return "pairs without a prompt of their own"
    if digest(prompt) != digest(other):
        return "pairs whose answers follow different conversations"
    if not better.strip() or not worse.strip():
        return "pairs with an empty answer"
    if digest(better.strip()) == digest(worse.strip()):
        return "pairs of the same text"
    if chat and not is_chat(prompt):
        return [{"role": "user", "content": prompt}], better, worse
    if not chat and is_chat(prompt):
        if len(prompt) != 1:
            return "conversations of several turns, where the other prompts are texts"
        return str(prompt[0]["content"]), better, worse
    return prompt, better, worse
