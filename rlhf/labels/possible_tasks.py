"""Every task that could be asked of the gathered answers, as arrays.

Which random number a task gets depends on what its prompt and answers say and on the seed, not on
the order of the prompts or of their answers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from rlhf.labels.records import Answer, Candidates, as_text
from rlhf.labels.uncertainty import uncertainty
from rlhf.types import UserError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]
# groups of a prompt's answers that are looked at; where there are more, so many are drawn at random
_MOST_GROUPS = 256


@dataclass(slots=True)
class PossibleTasks:
    """T possible tasks of G answers each. Prompts are numbered in the order of their ids."""

    candidates: Ints  # [T] index in the candidates
    answers: Ints  # [T, G] indices in their answers, rising
    prompt: Ints  # [T] the prompt's number
    draw: Hashes  # [T] a random number
    # [T] the larger, the less sure; NaN where an answer has no score. None: no method needs it
    uncertainty: Floats | None
    free: NDArray[np.bool_]  # [T] not chosen yet
    chosen: Ints  # [prompts] tasks chosen so far

    @property
    def scored(self) -> NDArray[np.bool_]:
        """[T] whether all answers have scores."""
        if self.uncertainty is None:
            return np.zeros(len(self.draw), dtype=bool)
        return ~np.isnan(self.uncertainty)

    def take(self, tasks: Ints) -> None:
        """Choose the tasks with these indices."""
        self.free[tasks] = False
        np.add.at(self.chosen, self.prompt[tasks], 1)


def possible_tasks(
    candidates: Sequence[Candidates], group: int, *, across: bool, scored: bool, seed: int
) -> PossibleTasks:
    """All tasks of `group` answers with different texts, each once; with `across` the answers of a
    task are not all of one policy. `scored`: whether a method needs `uncertainty`.

    Raises UserError for a score that is no finite number.
    """
    start = np.array([seed % 2**64], dtype=np.uint64)
    ids = [entry.id for entry in candidates]
    numbers = {identity: number for number, identity in enumerate(sorted(set(ids)))}
    seen: dict[str, set[int]] = {}  # the tasks of a prompt that may come several times
    owner: list[Ints] = []
    members: list[Ints] = []
    draws: list[Hashes] = []
    values: list[Floats] = []  # [S, G, 2] scores and spreads
    for index, (entry, identity) in enumerate(zip(candidates, ids, strict=True)):
        answers = _distinct(entry.answers)
        if len(answers) < group:
            continue
        subsets, draw = _subsets(answers, group, identity, start, across=across)
        if len(numbers) < len(ids):
            known = seen.setdefault(identity, set())
            fresh = np.array([int(task) not in known for task in draw], dtype=bool)
            known.update(int(task) for task in draw)
            subsets, draw = subsets[fresh], draw[fresh]
        positions = np.array([position for position, _ in answers])
        owner.append(np.full(len(subsets), index))
        members.append(np.sort(positions[subsets], axis=1))
        draws.append(draw)
        if scored:
            scores = [_scores(entry, answer) for _, answer in answers]
            values.append(np.array(scores)[subsets])
    of_tasks = np.concatenate([np.zeros(0, dtype=np.int64), *owner])
    both = np.concatenate([np.zeros((0, group, 2)), *values])
    number_of = np.array([numbers[identity] for identity in ids], dtype=np.int64)
    return PossibleTasks(
        candidates=of_tasks,
        answers=np.concatenate([np.zeros((0, group), dtype=np.int64), *members]),
        prompt=number_of[of_tasks],
        draw=np.concatenate([np.zeros(0, dtype=np.uint64), *draws]),
        uncertainty=uncertainty(both[..., 0], both[..., 1]) if scored else None,
        free=np.ones(len(of_tasks), dtype=bool),
        chosen=np.zeros(len(numbers), dtype=np.int64),
    )


def _distinct(answers: Sequence[Answer]) -> list[tuple[int, Answer]]:
    """Index and answer, one of each id, in the order of the ids."""
    first: dict[str, tuple[int, Answer]] = {}
    for index, answer in enumerate(answers):
        first.setdefault(answer.id, (index, answer))
    return [first[identity] for identity in sorted(first)]


def _subsets(
    answers: Sequence[tuple[int, Answer]],
    group: int,
    prompt: str,
    start: Hashes,
    *,
    across: bool,
) -> tuple[Ints, Hashes]:
    """[S, group] indices in `answers` of a prompt's tasks, and [S] their random numbers.

    Every subset, or _MOST_GROUPS of them drawn where there are more. prompt: its id; start: the
    seed.
    """
    keys = np.array([int(answer.id, 16) for _, answer in answers], dtype=np.uint64)
    count = len(keys)
    if group == 2 or math.comb(count, group) <= _MOST_GROUPS:
        subsets = np.array(list(combinations(range(count), group)), dtype=np.int64)
        subsets = subsets.reshape(-1, group)
    else:
        # seeded by what the answers say, so that their order doesn't matter
        rng = np.random.default_rng([int(key) for key in _mixed(start, keys)])
        drawn: set[tuple[int, ...]] = set()
        while len(drawn) < _MOST_GROUPS:
            drawn.add(tuple(sorted(rng.choice(count, group, replace=False).tolist())))
        subsets = np.array(sorted(drawn), dtype=np.int64)
    if across:
        _, policy = np.unique([answer.policy for _, answer in answers], return_inverse=True)
        policies = policy[subsets]
        subsets = subsets[(policies != policies[:, :1]).any(axis=1)]
    of_prompt = np.array([int(prompt, 16)], dtype=np.uint64)
    return subsets, _mixed(start, of_prompt, *(keys[subsets[:, i]] for i in range(group)))


def _mixed(*parts: Hashes) -> Hashes:
    """One well-spread 64-bit number out of several, by the finaliser of splitmix64 (Steele et al.
    2014) after each.
    """
    out = np.zeros(1, dtype=np.uint64)
    for part in parts:
        out = (out ^ part) + np.uint64(0x9E3779B97F4A7C15)
        out = (out ^ (out >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        out = (out ^ (out >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        out = out ^ (out >> np.uint64(31))
    return out


def _scores(entry: Candidates, answer: Answer) -> tuple[float, float]:
    """Score and spread, NaN where there is none. Raises UserError for one that is not finite."""
    known = []
    for name, value in (("score", answer.score), ("spread", answer.spread)):
        if value is not None and not math.isfinite(value):
            raise UserError(
                f"prompt {as_text(entry.prompt)[:120]!r}: the {name} of an answer is {value}, "
                "expected a finite number."
            )
        known.append(math.nan if value is None else value)
    return known[0], known[1]
