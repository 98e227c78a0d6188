"""Questions turned into the tasks that annotators see: sides drawn, gold and repeated tasks hidden
among the others, all in one random order.

Pure functions, with the same result for the same seed. Nothing that an annotator could notice tells
tasks apart: gold questions have as many answers as the others and prompts of the same shape, sides
are drawn alike for all, and neither a task's number nor its position tells its role.
"""

import logging
import math
import random
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from rlhf.labels.records import Answer, Role, Task, export_id, prompt_key
from rlhf.models.encoding import is_chat, split_answer, turn_text
from rlhf.process.files import digest
from rlhf.types import PreferencePair, Tools

LOG = logging.getLogger("rlhf.labels")
# orders tried at random; at worst about one in three has no repeat beside its first
_SHUFFLES = 200
# why a gold pair with tools (true) or without (false) is left out
_UNLIKE = {
    True: "pairs with tools, where no other prompt has some",
    False: "pairs without tools, where every other prompt has some",
}


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be asked, before its sides and its number are drawn."""

    prompt: Any  # a string, or a list of messages
    answers: tuple[Answer, ...]
    by: str = ""  # the method that chose it
    best: str | None = None  # of a gold question: the id of the better answer
    origin: str = ""  # of a question that goes out again: the earlier export's task
    tools: Tools | None = None  # functions that the answers may call

    @property
    def id(self) -> str:
        """A hash, the same for the same prompt and the same answers in any order."""
        key = prompt_key(self.prompt, self.tools)
        return digest([key, sorted(answer.id for answer in self.answers)])


@dataclass(frozen=True, slots=True)
class Asked:
    """The tasks of an export, in the order in which they are shown."""

    id: str  # the export's
    tasks: tuple[Task, ...]
    # the earlier export's task by the new one's id
    origins: dict[str, str] = field(default_factory=dict)


def share_of(share: float, tasks: int) -> int:
    """How many gold or repeated tasks go with so many other `tasks`: at least 1 for a share above
    0.
    """
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
    repeated = {len(main) + len(gold) + number: first for number, first in enumerate(again)}
    arranged = _arrange(len(drafts), repeated, rng)
    position = {draft: number for number, draft in enumerate(arranged)}
    # Of two drafts of one question the first is the one that is shown first, whichever that is.
    firsts: dict[int, int] = {}
    for pair in repeated.items():
        first, second = sorted(pair, key=position.__getitem__)
        firsts[second] = first
    name = _export_name([drafts[i] for i in arranged], created, seed)
    ids = {draft: f"{name}-{number + 1}" for draft, number in position.items()}
    tasks = []
    for i in arranged:
        task = replace(drafts[i], id=ids[i])
        if i in firsts:
            task = replace(task, role=Role.repeat, repeats=ids[firsts[i]])
        tasks.append(task)
    origins = {
        ids[firsts.get(i, i)]: question.origin
        for i, question in enumerate([*main, *gold])
        if question.origin
    }
    return Asked(name, tuple(tasks), origins)


def _export_name(drafts: Sequence[Task], created: str, seed: int) -> str:
    content = []
    for draft in drafts:
        texts = [answer.text for answer in draft.answers]
        prompt = draft.prompt if draft.tools is None else [draft.prompt, draft.tools]
        content.append((prompt, texts, draft.order))
    return export_id(content, created=created, seed=seed)


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
    """How many of the `main` questions can be asked twice with something else between the two: all,
    unless there is nothing else.
    """
    return main if main + gold >= 2 else 0


def _sides(count: int, rng: random.Random) -> list[bool]:
    """As many true as false (one more of either where `count` is odd), in random order."""
    out = [i % 2 == 0 for i in range(count)]
    if count % 2 and rng.random() < 0.5:
        out = [not side for side in out]
    rng.shuffle(out)
    return out


# which of a question's answers its sides are balanced by
def _by_policy(question: Question, answers: Sequence[Answer]) -> int:
    return min(range(len(answers)), key=lambda i: (answers[i].policy, i))


def _by_worth(question: Question, answers: Sequence[Answer]) -> int:
    return next(i for i, answer in enumerate(answers) if answer.id == question.best)


def _draft(question: Question, reference: Any, first: bool, rng: random.Random) -> Task:
    """A task without an id. The answer of a pair that `reference` picks is shown first where
    `first` is true, else second. More than two answers are shuffled.
    """
    answers = tuple(sorted(question.answers, key=lambda answer: answer.id))
    if len(answers) == 2:
        named = reference(question, answers)
        order: tuple[int, ...] = (named, 1 - named) if first else (1 - named, named)
    else:
        order = tuple(rng.sample(range(len(answers)), len(answers)))
    task = Task("", question.prompt, answers, order, Role.main, question.by, tools=question.tools)
    if question.best is None:
        return task
    return replace(task, role=Role.gold, best=_by_worth(question, answers))


def _again(first: Task, exchanged: bool, rng: random.Random) -> Task:
    """The same question with its sides drawn anew."""
    if len(first.order) > 2:
        return replace(first, order=tuple(rng.sample(first.order, len(first.order))))
    if exchanged:
        return replace(first, order=first.order[::-1])
    return first


def _arrange(count: int, repeated: dict[int, int], rng: random.Random) -> list[int]:
    """A random order of `count` drafts in which no repeat stands beside its first; every such order
    is equally likely.
    """
    order = list(range(count))
    for _ in range(_SHUFFLES):
        rng.shuffle(order)
        if all(repeated.get(a) != b and repeated.get(b) != a for a, b in pairwise(order)):
            return order
    firsts = list(repeated.values())
    others = [i for i in range(count) if i not in repeated and i not in set(firsts)]
    # so that each repeat comes after its first by the number of repeats and others together, which
    # is 2 or more
    return [*firsts, *others, *repeated]


@dataclass(slots=True)
class _Known:
    """What preference pairs say of one prompt's answers, which are named by a hash of the text."""

    prompt: Any
    tools: Tools | None
    texts: dict[str, str] = field(default_factory=dict)
    beaten: dict[str, list[str]] = field(default_factory=dict)  # by the better answer


def gold_questions(
    pairs: Sequence[PreferencePair], *, size: int, chat: bool, with_tools: Container[bool]
) -> tuple[list[Question], dict[str, int]]:
    """Questions of `size` answers of which one is known to be the best: it was preferred to each of
    the others. At most one question for a prompt.

    `chat`: whether the other questions' prompts are lists of messages. Gold prompts are brought
    into that shape, since otherwise they could be told by their looks. `with_tools`: whether the
    other questions have functions to call; a gold one is like one of them. Second: how many pairs
    were left out, by reason.
    """
    left_out: Counter[str] = Counter()
    known: dict[str, _Known] = {}
    for pair in pairs:
        plain = _plain_pair(pair, chat)
        if bool(pair.tools) not in with_tools:
            plain = _UNLIKE[bool(pair.tools)]
        if isinstance(plain, str):
            left_out[plain] += 1
            continue
        prompt, better, worse = plain
        tools = pair.tools or None
        of_prompt = known.setdefault(prompt_key(prompt, tools), _Known(prompt, tools))
        good, bad = digest(better.strip()), digest(worse.strip())
        of_prompt.texts |= {good: better, bad: worse}
        of_prompt.beaten.setdefault(good, []).append(bad)
    questions = []
    for of_prompt in known.values():
        question = _gold_question(of_prompt, size)
        if isinstance(question, str):
            left_out[question] += 1
        else:
            questions.append(question)
    return questions, dict(left_out)


def _gold_question(known: _Known, size: int) -> Question | str:
    """A question about the answer that was preferred to most others, or why there is none."""
    best, worse = max(known.beaten.items(), key=lambda item: len(set(item[1])))
    others = list(dict.fromkeys(worse))[: size - 1]
    if any(best in known.beaten.get(other, ()) for other in others):
        return "pairs that contradict each other"
    if len(others) < size - 1:
        return f"prompts without an answer that was preferred to {size - 1} others"
    answers = tuple(Answer(known.texts[name]) for name in (best, *others))
    best_id = answers[0].id
    return Question(known.prompt, answers, by="gold", best=best_id, tools=known.tools)


def _plain_pair(pair: PreferencePair, chat: bool) -> tuple[Any, str, str] | str:
    """(prompt, better answer, worse answer), or why the pair can't be a question."""
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
        return turn_text(prompt[0]), better, worse
    return prompt, better, worse
