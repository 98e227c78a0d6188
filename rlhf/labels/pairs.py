"""What all labels of a pair of answers come to, and preference rows out of that.

What is judged is a pair: a prompt and two answers, whatever task or export asked for it. A ranking
stands for all pairs of the answers that it names; it says nothing of those that it leaves out. An
annotator has one vote on a pair: that of the newest export, and there that of the task rather than
of its repetition (which then serves self-agreement alone). Skips and cancelled tasks are no votes.
Gold tasks are not aggregated: their answer was known.

    majority        the most frequent vote; equally frequent ones decide nothing
    dawid_skene     each annotator's confusion matrix (rlhf.data.aggregation)
    bradley_terry   strengths of answers and reliabilities of annotators
                    (rlhf.labels.bradley_terry); a tie counts half for each answer. A pair is a
                    tie where most votes are

`first_better` is the probability that a new careful annotator prefers the first answer. For
majority and dawid_skene it is the share w of n votes (a tie is half a vote; dawid_skene: the
posterior's) under a uniform prior, (n w + 1) / (n + 2) (Laplace): one vote of one gives 2/3.
Bradley-Terry has a prior of its own.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import combinations
from typing import Any

from conf.choices import Strength
from conf.labelling import LabelAggregate
from rlhf.data import aggregation
from rlhf.data.agreement import Label
from rlhf.data.formats.base import assistant
from rlhf.labels import bradley_terry
from rlhf.labels.checking import Checked, Ledgers, Outcome
from rlhf.labels.records import Answer, Role, Task, prompt_key
from rlhf.process.files import digest
from rlhf.types import Tools

_EVEN = 1e-3  # Bradley-Terry probabilities closer to 1/2 than this decide nothing
_OTHER = {Outcome.first: Outcome.second, Outcome.second: Outcome.first, Outcome.tie: Outcome.tie}


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to a prompt. They are in the order of their ids, so that the pair is the same in
    every export.
    """

    prompt: Any
    answers: tuple[Answer, Answer]
    export: str  # the newest one that asked for it
    task: str  # of that export
    tools: Tools | None = None  # functions that the answers may call

    @property
    def id(self) -> str:
        return pair_id(prompt_key(self.prompt, self.tools), *self.answers)


@dataclass(frozen=True, slots=True)
class Vote:
    """One annotator's judgement of one pair."""

    pair: str
    annotator: str
    outcome: Outcome  # first, second or tie of Pair.answers
    first_shown: bool  # answers[0] stood on the left, or further up


@dataclass(frozen=True, slots=True)
class Votes:
    """All pairs that somebody has compared, and the votes on them."""

    pairs: dict[str, Pair]
    votes: tuple[Vote, ...]
    asked: dict[str, int]  # by pair: exports in which somebody has voted on it


class Fate(Enum):
    """What becomes of a pair."""

    used = "used"  # a preference row
    few_labels = "few_labels"  # waits for more
    split = "split"  # as many for one as for the other
    unsure = "unsure"  # below label.min_confidence
    tie = "tie"  # neither is better, and no soft label says so
    empty = "empty"  # an answer without text, which no stage reads
    episode = "episode"  # an answer with an environment's words, which no policy may learn to write


@dataclass(frozen=True, slots=True)
class PairResult:
    """What the votes on a pair come to."""

    pair: Pair
    outcome: Outcome | None  # None: split
    confidence: float  # of `outcome`
    first_better: float  # probability, smoothed
    votes: dict[Outcome, int]

    @property
    def labels(self) -> int:
        """How many votes there are."""
        return sum(self.votes.values())

    @property
    def disputed(self) -> bool:
        """Whether annotators voted differently."""
        return len(self.votes) > 1


@dataclass(frozen=True, slots=True)
class Aggregated:
    """The results of all pairs, and how good the method takes each annotator to be."""

    results: tuple[PairResult, ...]
    # majority: agreement with the others' majority; dawid_skene: accuracy; bradley_terry: r
    reliability: dict[str, float | None]
    # iterations, converged, ... of the method
    figures: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def pair_id(prompt: str, a: Answer, b: Answer) -> str:
    """A hash of the pair, the same for both orders of the answers. `prompt`: its `prompt_key`."""
    return digest([prompt, *sorted((a.id, b.id))])


def comparisons(label: Checked, task: Task) -> Iterable[tuple[int, int, Outcome]]:
    """Every two answers that a label compares: their indices in Task.answers, the smaller first,
    and which is better.
    """
    if label.outcome in (Outcome.first, Outcome.second):
        yield 0, 1, label.outcome
        return
    ranking = label.ranking
    if label.outcome is Outcome.tie:
        ranking = (tuple(range(len(task.answers))),)
    rank = {answer: number for number, group in enumerate(ranking) for answer in group}
    for i, j in combinations(sorted(rank), 2):
        if rank[i] == rank[j]:
            yield i, j, Outcome.tie
        else:
            yield i, j, Outcome.first if rank[i] < rank[j] else Outcome.second


def collect(
    ledgers: Ledgers, labels: Iterable[Checked], without: frozenset[str] = frozenset()
) -> Votes:
    """The votes of the labels on main and repeated tasks, one for each annotator and pair. Those of
    the annotators `without` are left out.
    """
    # each with a key that says which of several is the newest
    best: dict[tuple[str, str], tuple[tuple[Any, ...], Vote]] = {}
    pairs: dict[str, tuple[tuple[str, str, str], Pair]] = {}
    asked: dict[str, set[str]] = defaultdict(set)
    for label in labels:
        export, task = ledgers.tasks[label.task]
        if task.role is Role.gold or label.annotator in without:
            continue
        source = task.repeats or task.id
        newest = (export.created, export.id, source)
        rank = (export.created, export.id, task.role is Role.main, task.id)
        for i, j, given in comparisons(label, task):
            first, second, outcome = i, j, given
            if task.answers[i].id > task.answers[j].id:
                first, second, outcome = j, i, _OTHER[given]
            answers = (task.answers[first], task.answers[second])
            key = pair_id(prompt_key(task.prompt, task.tools), *answers)
            asked[key].add(export.id)
            if key not in pairs or newest > pairs[key][0]:
                pair = Pair(task.prompt, answers, export.id, source, task.tools)
                pairs[key] = newest, pair
            first_shown = task.order.index(first) < task.order.index(second)
            earlier = best.get((key, label.annotator))
            if earlier is None or rank > earlier[0]:
                vote = Vote(key, label.annotator, outcome, first_shown)
                best[key, label.annotator] = rank, vote
    votes = tuple(vote for _, (_, vote) in sorted(best.items()))
    return Votes(
        {key: pairs[key][1] for key in sorted(pairs)},
        votes,
        {key: len(exports) for key, exports in asked.items()},
    )


# ---- aggregation ----


def aggregate(method: LabelAggregate, votes: Votes) -> Aggregated:
    """Results in the order of the pairs' ids."""
    if not votes.votes:
        return Aggregated((), {})
    counts: dict[str, Counter[Outcome]] = defaultdict(Counter)
    for vote in votes.votes:
        counts[vote.pair][vote.outcome] += 1
    if method is LabelAggregate.bradley_terry:
        return _by_strength(votes, counts)
    labels = [Label(vote.pair, vote.annotator, vote.outcome.value) for vote in votes.votes]
    notes: list[str] = []
    figures: dict[str, Any] = {}
    if method is LabelAggregate.majority:
        aggregated = aggregation.majority(labels)
    else:
        aggregated = aggregation.dawid_skene(labels)
        figures = {"iterations": aggregated.iterations, "converged": aggregated.converged}
        notes = _dawid_skene_notes(aggregated, counts)
    results = [
        _result(label, votes.pairs[label.item], counts[label.item]) for label in aggregated.labels
    ]
    reliability = {annotator.name: annotator.accuracy for annotator in aggregated.annotators}
    ordered = sorted(results, key=lambda result: result.pair.id)
    return Aggregated(tuple(ordered), reliability, figures, tuple(notes))


def _result(label: aggregation.ItemLabel, pair: Pair, votes: Counter[Outcome]) -> PairResult:
    shares = label.probabilities
    won = shares.get(Outcome.first.value, 0.0) + shares.get(Outcome.tie.value, 0.0) / 2
    n = votes.total()
    outcome = None if label.label is None else Outcome(label.label)
    return PairResult(pair, outcome, label.confidence, (n * won + 1) / (n + 2), dict(votes))


def _dawid_skene_notes(
    aggregated: aggregation.Aggregation, counts: Mapping[str, Counter[Outcome]]
) -> list[str]:
    notes = []
    if all(counted.total() < 3 for counted in counts.values()):
        notes.append(
            "no pair has three labels, so Dawid-Skene can't tell who is right: majority says "
            "the same"
        )
    if not aggregated.converged:
        notes.append(f"Dawid-Skene has not converged after {aggregated.iterations} iterations")
    return notes


def _by_strength(votes: Votes, counts: Mapping[str, Counter[Outcome]]) -> Aggregated:
    """By the Bradley-Terry model of answers' strengths."""
    better = {Outcome.first: 1.0, Outcome.second: 0.0, Outcome.tie: 0.5}
    rows = []
    for vote in votes.votes:
        first, second = _names(votes.pairs[vote.pair])
        won = better[vote.outcome]
        if vote.first_shown:
            rows.append(bradley_terry.Comparison(vote.annotator, first, second, won))
        else:
            rows.append(bradley_terry.Comparison(vote.annotator, second, first, 1 - won))
    fit = bradley_terry.fit(rows)
    results = []
    for key in sorted(counts):
        first, second = _names(votes.pairs[key])
        p = 1 / (1 + math.exp(fit.strength[second] - fit.strength[first]))
        outcome: Outcome | None = Outcome.first if p > 0.5 else Outcome.second
        confidence, ties = max(p, 1 - p), counts[key][Outcome.tie]
        # the model knows no ties, so the votes decide
        if ties > max(counts[key][Outcome.first], counts[key][Outcome.second]):
            outcome, confidence = Outcome.tie, ties / counts[key].total()
        elif abs(p - 0.5) < _EVEN:
            outcome = None
        results.append(PairResult(votes.pairs[key], outcome, confidence, p, dict(counts[key])))
    figures = {
        "iterations": fit.iterations,
        "converged": fit.converged,
        "first_side": fit.first_side,
    }
    notes: tuple[str, ...] = ()
    if not fit.converged:
        notes = (f"the Bradley-Terry model has not converged after {fit.iterations} iterations",)
    return Aggregated(tuple(results), dict(fit.reliability), figures, notes)


def _names(pair: Pair) -> tuple[str, str]:
    """The answers' names in the model: equal texts to two prompts are two answers."""
    prompt = prompt_key(pair.prompt, pair.tools)
    return f"{prompt} {pair.answers[0].id}", f"{prompt} {pair.answers[1].id}"


# ---- preference rows ----


def fate(result: PairResult, *, min_labels: int, min_confidence: float, strength: Strength) -> Fate:
    """What becomes of a pair."""
    if result.labels < min_labels:
        return Fate.few_labels
    if result.outcome is None:
        return Fate.split
    if result.confidence < min_confidence:
        return Fate.unsure
    if result.outcome is Outcome.tie and strength is not Strength.soft_label:
        return Fate.tie
    if isinstance(result.pair.prompt, str) and not all(
        answer.text for answer in result.pair.answers
    ):
        return Fate.empty
    if any(answer.episode for answer in result.pair.answers):
        return Fate.episode
    return Fate.used


def preference_row(result: PairResult, strength: Strength) -> dict[str, Any]:
    """A used pair in TRL's columns, with what it is based on. Of a tie the first answer is chosen,
    at 1/2.

    soft_label: probability that chosen is better, in [0.5, 1); margin: its log-odds.
    """
    chosen, rejected = result.pair.answers
    p = result.first_better
    if result.outcome is Outcome.tie:
        p = 0.5
    elif result.outcome is Outcome.second:
        chosen, rejected, p = rejected, chosen, 1 - p
    text = isinstance(result.pair.prompt, str)
    row: dict[str, Any] = {
        "prompt": result.pair.prompt,
        "chosen": chosen.text if text else assistant(chosen.text),
        "rejected": rejected.text if text else assistant(rejected.text),
    }
    if result.pair.tools is not None:
        row["tools"] = result.pair.tools
    if strength is Strength.margin:
        row["margin"] = math.log(p / (1 - p))
    elif strength is Strength.soft_label:
        row["soft_label"] = p
    return {
        **row,
        "confidence": result.confidence,
        "annotators": result.labels,
        "task": result.pair.task,
        "export": result.pair.export,
    }


def held_out(prompt: Any, fraction: float) -> bool:
    """Whether a prompt's pairs are in eval.jsonl. A hash of the prompt alone decides, so that the
    prompt never changes sides as labels come in.
    """
    return int(digest(["held out", digest(prompt)]), 16) / 16**16 < fraction
