"""Which pairs (or groups, for rankings) are worth a person's time. Pure functions of their input
and a seed.

    random             any
    uncertainty        those whose order the reward model is least sure of (rlhf.labels.uncertainty)
    diversity          one of each cluster of prompts, at the prompt nearest to the cluster's centre
    uncertain_diverse  the most uncertain one of each cluster of prompts

Rules of every method: no two answers of a task say the same; no task is chosen twice; a prompt gets
a second task only when every prompt that has a task left has got its first. What is chosen depends
on what prompts and answers say and on the seed, not on the order of the candidates or of their
answers.

Shares let a part of the budget stay random, since uncertainty is no better than random where an
ensemble's members hardly differ.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from conf.choices import ChoiceMethod, LabelKind
from rlhf.labels.clusters import Vectors, clusters
from rlhf.labels.possible_tasks import Floats, Ints, PossibleTasks, possible_tasks
from rlhf.labels.records import Candidates, as_text
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.labels")
_CLUSTERED = (ChoiceMethod.diversity, ChoiceMethod.uncertain_diverse)
_SCORED = (ChoiceMethod.uncertainty, ChoiceMethod.uncertain_diverse)
_NOT_RANDOM = tuple(method for method in ChoiceMethod if method is not ChoiceMethod.random)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A task that is worth asking."""

    candidates: int  # index in the candidates
    answers: tuple[int, ...]  # indices in their answers, rising
    by: ChoiceMethod  # the method that chose it


def choose(
    candidates: Sequence[Candidates],
    *,
    kind: LabelKind,
    budget: int,
    shares: Mapping[ChoiceMethod, float],
    group: int,
    vectors: Vectors | None,
    across: bool,
    seed: int,
) -> list[Chosen]:
    """At most `budget` tasks: pairs, or with kind=ranking groups of `group` answers of one prompt.

    `shares` of the budget by method are rounded by largest remainder; empty means random. The
    methods choose in their order, random last, and what one of them can't fill goes to random.
    `vectors` gives [N, D] rows for the prompts' texts, for the methods with clusters. With `across`
    the answers of a pair (not all of a group) are of different policies. The best come first within
    each method. Where there are fewer tasks than the budget all of them are returned, with a
    warning.

    Raises UserError: a method that needs scores where no task has them, a score that is not finite,
    or clusters without `vectors`.
    """
    counts = split_budget(budget, shares or {ChoiceMethod.random: 1.0})
    by_score = [method.value for method in _SCORED if counts.get(method)]
    size = 2 if kind is LabelKind.pair else group
    tasks = possible_tasks(candidates, size, across=across, scored=bool(by_score), seed=seed)
    if by_score:
        _require_scores(tasks, by_score)
    points = None
    if any(counts.get(method) for method in _CLUSTERED):
        points = _prompt_vectors(candidates, len(tasks.chosen), vectors)
    chosen: list[Chosen] = []
    missing = 0
    for method in _NOT_RANDOM:
        wanted = counts.get(method, 0)
        taken = _take(tasks, method, wanted, points, seed)
        chosen += [_chosen(tasks, task, method) for task in taken]
        if len(taken) < wanted:
            LOG.warning(
                "label.choice: %s has only %d of its %d tasks; random takes over the rest.",
                method.value,
                len(taken),
                wanted,
            )
            missing += wanted - len(taken)
    wanted = counts.get(ChoiceMethod.random, 0) + missing
    for task in _take(tasks, ChoiceMethod.random, wanted, points, seed):
        chosen.append(_chosen(tasks, task, ChoiceMethod.random))
    if len(chosen) < budget:
        LOG.warning(
            "label.budget=%d, but %d prompts give %d different tasks: all of them are taken.",
            budget,
            len(candidates),
            len(chosen),
        )
    return chosen


def _require_scores(tasks: PossibleTasks, methods: Sequence[str]) -> None:
    """Some task has scores of all its answers, unless there is no task. Raises UserError."""
    if len(tasks.draw) and not tasks.scored.any():
        raise UserError(
            f"label.choice={', '.join(methods)}: no task has answers that all have scores. Set "
            "reward.path=<a reward run>/model, take samples with scores, "
            "or choose by random or diversity."
        )


def split_budget(budget: int, shares: Mapping[ChoiceMethod, float]) -> dict[ChoiceMethod, int]:
    """Whole tasks for each method by largest remainder (Hamilton's method); among equal remainders
    the earlier method wins.
    """
    methods = [method for method in ChoiceMethod if shares.get(method, 0.0) > 0]
    total = math.fsum(shares[method] for method in methods)
    if total <= 0:
        raise ValueError(f"expected a share above 0, found {dict(shares)}")
    exact = {method: budget * shares[method] / total for method in methods}
    # 0.7 x 10 is 7, whatever binary fractions make of it
    out = {method: math.floor(round(exact[method], 9)) for method in methods}
    # sorted is stable
    by_remainder = sorted(methods, key=lambda method: round(out[method] - exact[method], 9))
    for method in by_remainder[: budget - sum(out.values())]:
        out[method] += 1
    return out


def _prompt_vectors(
    candidates: Sequence[Candidates], prompts: int, vectors: Vectors | None
) -> Floats:
    """[prompts, D] by the prompt's number. Raises UserError without `vectors`."""
    if vectors is None:
        raise UserError(
            "label.choice: diversity needs vectors of the prompts (label.vectors), but there are "
            "none."
        )
    text = {entry.id: as_text(entry.prompt) for entry in candidates}
    if not text:
        return np.zeros((0, 1))
    rows = np.asarray(vectors([text[identity] for identity in sorted(text)]), dtype=np.float64)
    assert len(rows) == prompts
    return rows


def _chosen(tasks: PossibleTasks, task: int, method: ChoiceMethod) -> Chosen:
    answers = tuple(int(index) for index in tasks.answers[task])
    return Chosen(int(tasks.candidates[task]), answers, method)


def _take(
    tasks: PossibleTasks, method: ChoiceMethod, wanted: int, points: Floats | None, seed: int
) -> list[int]:
    """Up to `wanted` free tasks by `method`, the best first; they are not free any more. `points`:
    the prompts' vectors, for clusters.
    """
    if method in _CLUSTERED:
        if not wanted:
            return []
        assert points is not None
        return _one_per_cluster(tasks, method, wanted, points, seed)
    if method is ChoiceMethod.random or tasks.uncertainty is None:
        usable = tasks.free if method is ChoiceMethod.random else tasks.free & tasks.scored
        rows = np.flatnonzero(usable)
        value = np.zeros(len(rows))
    else:
        rows = np.flatnonzero(tasks.free & tasks.scored)
        value = -tasks.uncertainty[rows]
    # within each prompt: the best first
    order = np.lexsort((tasks.draw[rows], value, tasks.prompt[rows]))
    rows, value = rows[order], value[order]
    turn = _turns(tasks.prompt[rows]) + tasks.chosen[tasks.prompt[rows]]
    taken = rows[np.lexsort((tasks.draw[rows], value, turn))[:wanted]]
    tasks.take(taken)
    return taken.tolist()


def _turns(prompts: Ints) -> Ints:
    """[N] how many earlier entries each of the sorted `prompts` [N] has that are equal to it.

    That is how many tasks its prompt has had when a task's turn comes: no prompt gets a second one
    before the others have their first.
    """
    if not len(prompts):
        return np.zeros(0, dtype=np.int64)
    starts = np.flatnonzero(np.r_[True, np.diff(prompts) > 0])
    lengths = np.diff(np.r_[starts, len(prompts)])
    return np.arange(len(prompts)) - np.repeat(starts, lengths)


def _one_per_cluster(
    tasks: PossibleTasks, method: ChoiceMethod, wanted: int, points: Floats, seed: int
) -> list[int]:
    """One task of each cluster of the prompts that have had fewest tasks, as many clusters as are
    wanted; and so on for what is still wanted then.
    """
    chosen: list[int] = []
    while len(chosen) < wanted:
        usable = tasks.free
        if method is ChoiceMethod.uncertain_diverse:
            usable = usable & tasks.scored
        rows = np.flatnonzero(usable)
        if not len(rows):
            break
        had = tasks.chosen[tasks.prompt[rows]]
        rows = rows[had == had.min()]
        prompts = np.unique(tasks.prompt[rows])
        labels, distance = clusters(points[prompts], wanted - len(chosen), seed)
        at = np.searchsorted(prompts, tasks.prompt[rows])
        if method is ChoiceMethod.diversity or tasks.uncertainty is None:
            value = distance[at]
        else:
            value = -tasks.uncertainty[rows]
        order = np.lexsort((tasks.draw[rows], value, labels[at]))
        first = np.r_[True, np.diff(labels[at][order]) > 0]
        best, value = rows[order[first]], value[order[first]]
        best = best[np.lexsort((tasks.draw[best], value))]
        tasks.take(best)
        chosen += best.tolist()
    return chosen
