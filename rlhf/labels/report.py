"""How the labelling went: each annotator, agreement, what became of the pairs. Figures are as JSON
holds them; a share of no cases is null.

    annotators   one object each:
        annotator, counts (whether the labels count, label.min_gold_accuracy), labels, superseded
        verdicts     {left, right, tie, skip, cancelled, ranked}: as shown
        seconds      {known, median, total}
        gold         {n, share, low, high}: gold tasks answered, and those answered rightly; a tie
                     is wrong, a skip is no answer
        itself       {n, share, low, high}: comparisons asked twice, and those answered alike
        others       {n, share, low, high}: votes on pairs that others voted on too, and those
                     equal to the majority of the others
        cohen        mean kappa with each other annotator, weighted by the items shared
        left         {n, share, low, high, p}: pairs decided, and those for the left answer. Sides
                     are random, so 1/2 is expected; p: exact binomial test
        longer       {n, share, low, high, model, verdicts}: votes between answers of unequal
                     length, and those for the longer one; how often the scores of the export
                     (model) and the pairs' results (verdicts) prefer the longer one in the same
                     pairs
        model        {n, share, low, high}: votes on pairs with unequal scores, and those for the
                     higher score
        fast         {n, share}: labels with a time, and those made faster than the answers can be
                     read (100 characters a second)
        reliability  what label.aggregate thinks of the annotator (rlhf.labels.pairs)
        suspicions   in words; [] for nothing
    agreement    rlhf.data.agreement's figures over the votes that count (first, tie, second:
                 ordinal for Krippendorff's alpha)
    pairs        {judged, used, few_labels, split, unsure, tie, empty, episode, disputed, unjudged}:
                 by what became of them

low and high are Wilson's 95 % interval.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.agreement import Agreement, Label, Level, agreement, mean_cohen
from rlhf.data.report.texts import wilson
from rlhf.labels.checking import CHOICES, Checked, Ledgers, Outcome
from rlhf.labels.pairs import Aggregated, Fate, Pair, Vote, Votes, comparisons
from rlhf.labels.records import Role, Task, Verdict
from rlhf.labels.store import Stored

READING = 100.0  # characters a second, about 1,200 words a minute: nobody reads faster
# what makes an annotator suspicious
_FEW = 5  # cases below which nothing is suspected
_MOST_FAST = 0.2  # share of labels that came faster than the answers can be read
_SIDE_P = 0.01  # p-value of choosing the left answer as often as the right one
_LEAST_GOLD = 0.8  # accuracy on gold tasks
_LEAST_ITSELF = 0.7  # agreement with the same annotator's earlier answer
_LEAST_RELIABLE = 0.5
_NO_JUDGEMENT = (Outcome.skip, Outcome.cancelled)
Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Situation:
    """All that a report is made of."""

    ledgers: Ledgers
    stored: Sequence[Stored]
    votes: Votes  # of everybody, also of those who don't count
    aggregated: Aggregated
    fates: Mapping[str, Fate]  # by pair
    without: frozenset[str]  # annotators whose labels don't count

    @property
    def labels(self) -> list[Checked]:
        return [entry.label for entry in self.stored if entry.counts]


def share(right: int, n: int) -> Figures:
    """A share of `n` cases with its interval."""
    if not n:
        return {"n": 0, "share": None, "low": None, "high": None}
    low, high = wilson(right, n)
    return {"n": n, "share": right / n, "low": low, "high": high}


def _share_of(cases: Sequence[bool]) -> Figures:
    return share(sum(cases), len(cases))


def _mean(cases: Sequence[bool]) -> float | None:
    return sum(cases) / len(cases) if cases else None


def side_shown(label: Checked, task: Task) -> Verdict:
    """A label in the slots as shown."""
    if label.outcome not in (Outcome.first, Outcome.second):
        return Verdict(label.outcome.value)
    return Verdict.left if CHOICES[task.order[0]] is label.outcome else Verdict.right


def gold_right(label: Checked, task: Task) -> bool | None:
    """Whether a label prefers the better answer of a gold task; None where it is no judgement, or
    the task is no gold task.
    """
    if task.best is None or label.outcome in _NO_JUDGEMENT:
        return None
    if label.outcome is Outcome.ranked:
        return label.ranking[0] == (task.best,)
    return label.outcome in CHOICES[:2] and CHOICES.index(label.outcome) == task.best


def gold(ledgers: Ledgers, labels: Iterable[Checked]) -> dict[str, Figures]:
    """Gold accuracy of each annotator who has answered a gold task."""
    answered: dict[str, list[bool]] = defaultdict(list)
    for label in labels:
        task = ledgers.tasks[label.task][1]
        if task.role is not Role.gold:
            continue
        right = gold_right(label, task)
        if right is not None:
            answered[label.annotator].append(right)
    return {name: _share_of(cases) for name, cases in sorted(answered.items())}


def below_gold(accuracies: Mapping[str, Figures], least: float | None) -> frozenset[str]:
    """Annotators whose labels don't count, since their gold accuracy is below `least`. An
    annotator without a gold task counts.
    """
    if least is None:
        return frozenset()
    return frozenset(name for name, accuracy in accuracies.items() if accuracy["share"] < least)


def itself(ledgers: Ledgers, labels: Sequence[Checked]) -> dict[str, Figures]:
    """Self-agreement of each annotator: comparisons of a task that its repetition asked again."""
    by_task = {(label.annotator, label.task): label for label in labels}
    same: dict[str, list[bool]] = defaultdict(list)
    for label in labels:
        task = ledgers.tasks[label.task][1]
        first = by_task.get((label.annotator, task.repeats or ""))
        if first is None:
            continue
        first_task = ledgers.tasks[first.task][1]
        before = {(i, j): outcome for i, j, outcome in comparisons(first, first_task)}
        for i, j, outcome in comparisons(label, task):
            if (i, j) in before:
                same[label.annotator].append(before[i, j] is outcome)
    return {name: _share_of(cases) for name, cases in same.items()}


def with_others(votes: Iterable[Vote]) -> dict[str, Figures]:
    """Agreement of each annotator with the majority of the others, where they have one."""
    counts: dict[str, Counter[Outcome]] = defaultdict(Counter)
    for vote in votes:
        counts[vote.pair][vote.outcome] += 1
    same: dict[str, list[bool]] = defaultdict(list)
    for vote in votes:
        others = (counts[vote.pair] - Counter([vote.outcome])).most_common(2)
        majority = len(others) == 1 or (len(others) == 2 and others[0][1] > others[1][1])
        if majority:
            same[vote.annotator].append(others[0][0] is vote.outcome)
    return {name: _share_of(cases) for name, cases in same.items()}


def _left(shown: Counter[Verdict]) -> Figures:
    from scipy.stats import binomtest

    left = shown[Verdict.left]
    n = left + shown[Verdict.right]
    p = float(binomtest(left, n).pvalue) if n else None
    return {**share(left, n), "p": p}


def _higher_score(pair: Pair) -> Outcome | None:
    """The answer that the scores prefer; None where they are equal or missing."""
    first, second = pair.answers
    if first.score is None or second.score is None or first.score == second.score:
        return None
    return Outcome.first if first.score > second.score else Outcome.second


def _longer_answer(pair: Pair) -> Outcome | None:
    """The longer answer; None where both have as many characters."""
    first, second = (len(answer.text) for answer in pair.answers)
    if first == second:
        return None
    return Outcome.first if first > second else Outcome.second


def _longer(
    votes: Sequence[Vote], situation: Situation, results: Mapping[str, Outcome | None]
) -> Figures:
    """Figures of one annotator's votes; `results`: what all labels together say, by pair."""
    own, by_scores, by_results = [], [], []
    for vote in votes:
        pair = situation.votes.pairs[vote.pair]
        longer = _longer_answer(pair)
        if vote.outcome is Outcome.tie or longer is None:
            continue
        own.append(vote.outcome is longer)
        higher = _higher_score(pair)
        if higher is not None:
            by_scores.append(higher is longer)
        if results.get(vote.pair) in (Outcome.first, Outcome.second):
            by_results.append(results[vote.pair] is longer)
    return {**_share_of(own), "model": _mean(by_scores), "verdicts": _mean(by_results)}


def _model(votes: Sequence[Vote], situation: Situation) -> Figures:
    same = []
    for vote in votes:
        higher = _higher_score(situation.votes.pairs[vote.pair])
        if vote.outcome is not Outcome.tie and higher is not None:
            same.append(higher is vote.outcome)
    return _share_of(same)


def _fast(labels: Sequence[Checked], ledgers: Ledgers) -> Figures:
    fast = []
    for label in labels:
        if label.seconds is None or label.outcome in _NO_JUDGEMENT:
            continue
        characters = sum(len(answer.text) for answer in ledgers.tasks[label.task][1].answers)
        fast.append(label.seconds < characters / READING)
    return {"n": len(fast), "share": _mean(fast)}


def suspicions(figures: Figures) -> list[str]:
    """What speaks against an annotator's labels, in words."""
    out = []
    fast, left, known, twice = (figures[name] for name in ("fast", "left", "gold", "itself"))
    if fast["n"] >= _FEW and fast["share"] > _MOST_FAST:
        out.append(f"{fast['share']:.0%} of the labels came faster than the answers can be read")
    if left["n"] >= _FEW and left["p"] < _SIDE_P:
        side = "left" if left["share"] > 0.5 else "right"
        out.append(f"prefers the {side} side ({left['share']:.0%} left, p = {left['p']:.2g})")
    if known["n"] >= _FEW and known["high"] < _LEAST_GOLD:
        out.append(f"gold accuracy {known['share']:.0%} (at most {known['high']:.0%})")
    if twice["n"] >= _FEW and twice["high"] < _LEAST_ITSELF:
        out.append(
            f"answers {twice['share']:.0%} of what is asked twice alike (at most "
            f"{twice['high']:.0%})"
        )
    reliability = figures["reliability"]
    compared = figures["others"]["n"] >= _FEW
    if reliability is not None and compared and reliability < _LEAST_RELIABLE:
        out.append(f"reliability {reliability:.2f}")
    return out


def agreement_of(votes: Iterable[Vote], seed: int) -> Agreement:
    """Of the votes, first < tie < second."""
    names = [Outcome.first.value, Outcome.tie.value, Outcome.second.value]
    labels = [Label(vote.pair, vote.annotator, vote.outcome.value) for vote in votes]
    return agreement(labels, level=Level.ordinal, order=names, seed=seed)


def annotators(situation: Situation, agreed: Agreement) -> list[Figures]:
    """Each annotator's figures, by name."""
    ledgers, labels = situation.ledgers, situation.labels
    results = {result.pair.id: result.outcome for result in situation.aggregated.results}
    known = gold(ledgers, labels)
    twice = itself(ledgers, labels)
    others = with_others(situation.votes.votes)
    superseded = Counter(entry.label.annotator for entry in situation.stored if not entry.counts)
    out = []
    for name in sorted({label.annotator for label in labels}):
        own = [label for label in labels if label.annotator == name]
        votes = [vote for vote in situation.votes.votes if vote.annotator == name]
        shown = Counter(side_shown(label, ledgers.tasks[label.task][1]) for label in own)
        figures: Figures = {
            "annotator": name,
            "counts": name not in situation.without,
            "labels": len(own),
            "superseded": superseded[name],
            "verdicts": {verdict.value: shown[verdict] for verdict in Verdict},
            "seconds": _seconds(own),
            "gold": known.get(name, share(0, 0)),
            "itself": twice.get(name, share(0, 0)),
            "others": others.get(name, share(0, 0)),
            "cohen": _mean_kappa(name, agreed),
            "left": _left(shown),
            "longer": _longer(votes, situation, results),
            "model": _model(votes, situation),
            "fast": _fast(own, ledgers),
            "reliability": situation.aggregated.reliability.get(name),
        }
        out.append({**figures, "suspicions": suspicions(figures)})
    return out


def _seconds(labels: Sequence[Checked]) -> Figures:
    seconds = [label.seconds for label in labels if label.seconds is not None]
    median = statistics.median(seconds) if seconds else None
    return {"known": len(seconds), "median": median, "total": sum(seconds)}


def _mean_kappa(name: str, agreed: Agreement) -> float | None:
    """Of the annotator `name` with each other one, weighted by the items that both judged."""
    return mean_cohen(estimate for pair, estimate in agreed.cohen_pairs.items() if name in pair)


def pairs(situation: Situation) -> dict[str, int]:
    """How many pairs there are, by what became of them; `unjudged` are main tasks without a vote
    that counts.
    """
    fates = Counter(situation.fates.values())
    judged = {
        label.task
        for label in situation.labels
        if label.annotator not in situation.without and label.outcome not in _NO_JUDGEMENT
    }
    asked = {task.id for _, task in situation.ledgers.tasks.values() if task.role is Role.main}
    disputed = sum(result.disputed for result in situation.aggregated.results)
    return {
        "judged": len(situation.fates),
        **{fate.value: fates[fate] for fate in Fate},
        "disputed": disputed,
        "unjudged": len(asked - judged),
    }


def report(situation: Situation, seed: int) -> Figures:
    """annotators, agreement, pairs and the aggregation's own figures."""
    everybody = agreement_of(situation.votes.votes, seed)
    counted = [vote for vote in situation.votes.votes if vote.annotator not in situation.without]
    agreed = agreement_of(counted, seed) if situation.without else everybody
    return {
        "annotators": annotators(situation, everybody),
        "agreement": agreed.figures(),
        "pairs": pairs(situation),
        "aggregation": situation.aggregated.figures,
        "notes": list(situation.aggregated.notes),
    }
