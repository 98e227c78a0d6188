"""How the labelling went: each annotator, agreement, what became of the pairs. Figures as JSON
holds them; a share without cases is null.

    annotators   one object each:
        annotator, counts (whether the labels count, label.min_gold_accuracy), labels, superseded
        verdicts     {left, right, tie, skip, cancelled, ranked}: as shown
        seconds      {known, median, total}
        gold         {n, share, low, high}: gold tasks answered, and rightly; a tie is wrong, a skip
        is no answer
        itself       {n, share, low, high}: comparisons asked twice, and answered alike
        others       {n, share, low, high}: votes on pairs that others voted on too, and equal to
        the majority of the others
        cohen        mean kappa with each other annotator, by the items shared
        left         {n, share, low, high, p}: pairs decided, and for the left one. Sides are
        random, so 1/2 is expected; p: exact binomial test
        longer       {n, share, low, high, model, verdicts}: votes between answers of unequal
        length, and for the longer; how often the scores of
                     the export and how often the pairs' results prefer the longer one in the same pairs
        model        {n, share, low, high}: votes on pairs with unequal scores, and for the higher
        score
        fast         {n, share}: labels with a time, and faster than the answers can be read (100
        characters a second)
        reliability  what label.aggregate holds of the annotator (rlhf.labels.pairs)
        suspicions   in words; [] for nothing
    agreement    rlhf.data.agreement's figures over the votes that count (first, tie, second:
    ordinal for Krippendorff's alpha)
    pairs        {judged, used, few_labels, split, unsure, tie, empty, disputed, unjudged}: by what
    became of them

low and high are Wilson's 95 % interval.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.agreement import Agreement, Label, Level, agreement
from rlhf.data.report.texts import wilson
from rlhf.labels.checking import CHOICES, Checked, Ledgers, Outcome
from rlhf.labels.pairs import Aggregated, Fate, Vote, Votes, comparisons
from rlhf.labels.records import Role, Task, Verdict
from rlhf.labels.store import Stored

READING = 100.0  # characters a second, about 1,200 words a minute: nobody reads faster
_FEW = 5  # cases below which nothing is suspected
_FAST, _SIDE, _GOLD, _ITSELF, _RELIABLE = 0.2, 0.01, 0.8, 0.7, 0.5
_SILENT = (Outcome.skip, Outcome.cancelled)  # no judgement
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
        return [one.label for one in self.stored if one.counts]


def share(right: int, n: int) -> Figures:
    """A share with its interval."""
    low, high = wilson(right, n)
    return {
        "n": n,
        "share": right / n if n else None,
        "low": low if n else None,
        "high": high if n else None,
    }


def side_shown(label: Checked, task: Task) -> Verdict:
    """A label in the places as shown."""
    if label.outcome not in (Outcome.first, Outcome.second):
        return Verdict(label.outcome.value)
    return Verdict.left if CHOICES[task.order[0]] is label.outcome else Verdict.right


def gold_right(label: Checked, task: Task) -> bool | None:
    """Whether a label finds the better answer of a gold task; None where it says nothing."""
    if task.best is None or label.outcome in _SILENT:
        return None
    if label.outcome is Outcome.ranked:
        return label.ranking[0] == (task.best,)
    return label.outcome in CHOICES[:2] and CHOICES.index(label.outcome) == task.best


def gold(ledgers: Ledgers, labels: Iterable[Checked]) -> dict[str, Figures]:
    """Gold accuracy of each annotator who has answered a gold task."""
    answered: dict[str, list[bool]] = defaultdict(list)
    for label in labels:
        task = ledgers.tasks[label.task][1]
        right = gold_right(label, task) if task.role is Role.gold else None
        if right is not None:
            answered[label.annotator].append(right)
    return {name: share(sum(rows), len(rows)) for name, rows in sorted(answered.items())}


def below_gold(accuracies: Mapping[str, Figures], least: float | None) -> frozenset[str]:
    """Annotators whose labels don't count; who has seen no gold task counts."""
    return frozenset(
        name for name, found in accuracies.items() if least is not None and found["share"] < least
    )


def itself(ledgers: Ledgers, labels: Sequence[Checked]) -> dict[str, Figures]:
    """Self-agreement of each annotator: comparisons of a task that its repetition asked again."""
    said = {(label.annotator, label.task): label for label in labels}
    same: dict[str, list[bool]] = defaultdict(list)
    for label in labels:
        task = ledgers.tasks[label.task][1]
        first = said.get((label.annotator, task.repeats)) if task.repeats is not None else None
        if first is None:
            continue
        before = {
            (i, j): outcome for i, j, outcome in comparisons(first, ledgers.tasks[first.task][1])
        }
        same[label.annotator] += [
            before[i, j] is outcome
            for i, j, outcome in comparisons(label, task)
            if (i, j) in before
        ]
    return {name: share(sum(rows), len(rows)) for name, rows in same.items()}


def with_others(votes: Iterable[Vote]) -> dict[str, Figures]:
    """Agreement of each annotator with the majority of the others, where they have one."""
    counts: dict[str, Counter[Outcome]] = defaultdict(Counter)
    for vote in votes:
        counts[vote.pair][vote.outcome] += 1
    same: dict[str, list[bool]] = defaultdict(list)
    for vote in votes:
        others = (counts[vote.pair] - Counter([vote.outcome])).most_common(2)
        if others and (len(others) == 1 or others[0][1] > others[1][1]):
            same[vote.annotator].append(others[0][0] is vote.outcome)
    return {name: share(sum(rows), len(rows)) for name, rows in same.items()}


def _left(shown: Counter[Verdict]) -> Figures:
    from scipy.stats import binomtest

    left, n = shown[Verdict.left], shown[Verdict.left] + shown[Verdict.right]
    return {**share(left, n), "p": float(binomtest(left, n).pvalue) if n else None}


def _longer(
    votes: Sequence[Vote], situation: Situation, results: Mapping[str, Outcome | None]
) -> Figures:
    own, model, settled = [], [], []
    for vote in votes:
        first, second = situation.votes.pairs[vote.pair].answers
        if vote.outcome is Outcome.tie or len(first.text) == len(second.text):
            continue
        longer = Outcome.first if len(first.text) > len(second.text) else Outcome.second
        own.append(vote.outcome is longer)
        if first.score is not None and second.score is not None and first.score != second.score:
            model.append((first.score > second.score) is (longer is Outcome.first))
        if results.get(vote.pair) in (Outcome.first, Outcome.second):
            settled.append(results[vote.pair] is longer)
    part = {
        "model": sum(model) / len(model) if model else None,
        "verdicts": sum(settled) / len(settled) if settled else None,
    }
    return {**share(sum(own), len(own)), **part}


def _model(votes: Sequence[Vote], situation: Situation) -> Figures:
    same = []
    for vote in votes:
        first, second = (answer.score for answer in situation.votes.pairs[vote.pair].answers)
        if (
            vote.outcome is not Outcome.tie
            and first is not None
            and second is not None
            and first != second
        ):
            same.append((first > second) is (vote.outcome is Outcome.first))
    return share(sum(same), len(same))


def _fast(labels: Sequence[Checked], ledgers: Ledgers) -> Figures:
    said = [label for label in labels if label.seconds is not None and label.outcome not in _SILENT]
    least = [
        sum(len(answer.text) for answer in ledgers.tasks[label.task][1].answers) / READING
        for label in said
    ]
    fast = sum((label.seconds or 0.0) < seconds for label, seconds in zip(said, least, strict=True))
    return {"n": len(said), "share": fast / len(said) if said else None}


def suspicions(figures: Figures) -> list[str]:
    """What speaks against an annotator's labels, in words."""
    out = []
    fast, left, known, itself_, reliability = (
        figures["fast"],
        figures["left"],
        figures["gold"],
        figures["itself"],
        figures["reliability"],
    )
    if fast["n"] >= _FEW and fast["share"] > _FAST:
        out.append(f"{fast['share']:.0%} of the labels came faster than the answers can be read")
    if left["n"] >= _FEW and left["p"] < _SIDE:
        out.append(
            f"prefers the {'left' if left['share'] > 0.5 else 'right'} side ({left['share']:.0%} "
            f"left, p = {left['p']:.2g})"
        )
    if known["n"] >= _FEW and known["high"] < _GOLD:
        out.append(f"gold accuracy {known['share']:.0%} (at most {known['high']:.0%})")
    if itself_["n"] >= _FEW and itself_["high"] < _ITSELF:
        out.append(
            f"answers {itself_['share']:.0%} of what is asked twice alike (at most "
            f"{itself_['high']:.0%})"
        )
    if reliability is not None and figures["others"]["n"] >= _FEW and reliability < _RELIABLE:
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
    known, twice, others = (
        gold(ledgers, labels),
        itself(ledgers, labels),
        with_others(situation.votes.votes),
    )
    superseded = Counter(one.label.annotator for one in situation.stored if not one.counts)
    out = []
    for name in sorted({label.annotator for label in labels}):
        own = [label for label in labels if label.annotator == name]
        votes = [vote for vote in situation.votes.votes if vote.annotator == name]
        shown = Counter(side_shown(label, ledgers.tasks[label.task][1]) for label in own)
        seconds = [label.seconds for label in own if label.seconds is not None]
        kappas = [
            (e.value, e.items)
            for pair, e in agreed.cohen_pairs.items()
            if name in pair and e.value is not None
        ]
        items = sum(n for _, n in kappas)
        figures: Figures = {
            "annotator": name,
            "counts": name not in situation.without,
            "labels": len(own),
            "superseded": superseded[name],
            "verdicts": {verdict.value: shown[verdict] for verdict in Verdict},
            "seconds": {
                "known": len(seconds),
                "median": statistics.median(seconds) if seconds else None,
                "total": sum(seconds),
            },
            "gold": known.get(name, share(0, 0)),
            "itself": twice.get(name, share(0, 0)),
            "others": others.get(name, share(0, 0)),
            "cohen": sum(kappa * n for kappa, n in kappas) / items if items else None,
            "left": _left(shown),
            "longer": _longer(votes, situation, results),
            "model": _model(votes, situation),
            "fast": _fast(own, ledgers),
            "reliability": situation.aggregated.reliability.get(name),
        }
        out.append({**figures, "suspicions": suspicions(figures)})
    return out


def pairs(situation: Situation) -> dict[str, int]:
    """What became of the pairs; unjudged: main tasks without a vote that counts."""
    fates = Counter(situation.fates.values())
    judged = {
        label.task
        for label in situation.labels
        if label.annotator not in situation.without and label.outcome not in _SILENT
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


# ---- on a screen ----


def _percent(found: Figures) -> str:
    if found["share"] is None:
        return ""
    interval = f" ({found['low']:.0%}-{found['high']:.0%})" if "low" in found else ""
    return f"{found['share']:.0%}{interval} of {found['n']}"


def _name(figures: Figures) -> str:
    return str(figures["annotator"]) + ("" if figures["counts"] else " (doesn't count)")


def annotator_rows(figures: Iterable[Figures]) -> list[dict[str, Any]]:
    """A table's rows: how much and how well."""
    out = []
    for one in figures:
        said, median = one["verdicts"], one["seconds"]["median"]
        row = {
            "annotator": _name(one),
            "labels": one["labels"],
            "tie/skip": f"{said['tie']}/{said['skip'] + said['cancelled']}",
            "median s": "" if median is None else f"{median:.1f}",
            "gold": _percent(one["gold"]),
            "itself": _percent(one["itself"]),
            "others": _percent(one["others"]),
            "reliability": "" if one["reliability"] is None else f"{one['reliability']:.2f}",
            "suspicions": "; ".join(one["suspicions"]) or "none",
        }
        out.append(row)
    return out


def bias_rows(figures: Iterable[Figures]) -> list[dict[str, Any]]:
    """A table's rows: what the choices go with. The longer answer: against how often the pairs' results
    and the scores prefer it in the same pairs.
    """
    out = []
    for one in figures:
        left, longer = one["left"], one["longer"]
        row = {
            "annotator": _name(one),
            "left side": _percent(left) + ("" if left["p"] is None else f", p = {left['p']:.2g}"),
            "longer answer": _percent(longer),
            "by verdicts": "" if longer["verdicts"] is None else f"{longer['verdicts']:.0%}",
            "by scores": "" if longer["model"] is None else f"{longer['model']:.0%}",
            "higher score": _percent(one["model"]),
        }
        out.append(row)
    return out


def agreement_rows(figures: Figures) -> list[dict[str, Any]]:
    """Coefficients with their intervals, then Cohen's kappa of each two annotators; none where no
    pair has two labels.
    """
    if not figures["observed"]["items"]:
        return []
    rows = [
        {
            "coefficient": name,
            "value": found["value"],
            "95 % interval": _interval(found),
            "pairs": found["items"],
        }
        for name, found in (
            ("observed agreement", figures["observed"]),
            ("Fleiss' kappa", figures["fleiss_kappa"]),
            ("Krippendorff's alpha", figures["krippendorff_alpha"]),
        )
    ]
    cohen = [
        {
            "coefficient": f"Cohen's kappa, {' and '.join(p['annotators'])}",
            "value": p["value"],
            "95 % interval": _interval(p),
            "pairs": p["items"],
        }
        for p in figures["cohen_kappa"]["pairs"]
    ]
    return rows + cohen


def _interval(found: Figures) -> str:
    return "" if found["low"] is None else f"{found['low']:.3f} to {found['high']:.3f}"
