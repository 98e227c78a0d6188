"""One label for each item out of several annotators' labels, how sure it is, and how good each
annotator is.

    majority      the most frequent label. A tie stays a tie: the item has no label and names the
    tied ones; nothing is drawn by chance
    dawid_skene   each annotator's confusion matrix and each item's label by
    expectation-maximisation (Dawid and Skene 1979), crowd-kit's

Pure functions of rlhf.data.agreement's triples. With two labels an item Dawid-Skene can't tell
which annotator is right other than by how often each label occurs; it needs three or more on many
items to be worth its name.
"""

import warnings
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.data.agreement import Label, check_single, sorted_labels
from rlhf.process.libraries import require

_SAME = 1e-9  # probabilities closer than this are a tie
_ITERATIONS = 200  # at most, of expectation-maximisation


@dataclass(frozen=True, slots=True)
class ItemLabel:
    """The label that an item's annotators give it together, and how sure it is."""

    item: str
    label: Any  # None: a tie
    confidence: float  # majority: share of the labels; dawid_skene: probability
    votes: dict[Any, int]  # labels given, the most frequent first
    tied: tuple[Any, ...] = ()  # the labels that tie
    # of each label: majority: its share of the labels; dawid_skene: the posterior
    probabilities: dict[Any, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Annotator:
    """How good one annotator is.

    majority: against the majority of an item's other annotators, so that nobody agrees with
    himself; dawid_skene: the model's estimate for an item drawn like those of the data.
    """

    name: str
    judgements: int
    accuracy: float | None  # None: no item where it can be told
    # label of the item -> label given -> probability
    confusion: dict[Any, dict[Any, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Aggregation:
    """Labels in the items' order, annotators by name."""

    labels: list[ItemLabel]
    annotators: list[Annotator]
    iterations: int | None = None  # of dawid_skene
    converged: bool | None = None


def leading(votes: Counter[Any]) -> tuple[Any, ...]:
    """The most frequent labels, sorted: a single label, or those that tie."""
    most = max(votes.values())
    return sorted_labels(label for label, times in votes.items() if times == most)


def votes_by_item(labels: Sequence[Label]) -> dict[str, Counter[Any]]:
    """Counts of the labels of each item, in order of appearance. Raises ValueError for a repeated
    judgement.
    """
    check_single(labels)
    out: dict[str, Counter[Any]] = {}
    for label in labels:
        out.setdefault(label.item, Counter())[label.label] += 1
    return out


def _ordered(votes: Counter[Any]) -> dict[Any, int]:
    order = {name: i for i, name in enumerate(sorted_labels(votes))}
    return dict(sorted(votes.items(), key=lambda pair: (-pair[1], order[pair[0]])))


def _shares(table: dict[Any, Counter[Any]]) -> dict[Any, dict[Any, float]]:
    out = {}
    for true, row in sorted(table.items(), key=str):
        total = sum(row.values())
        out[true] = {given: times / total for given, times in sorted(row.items(), key=str)}
    return out


def majority(labels: Sequence[Label]) -> Aggregation:
    """The most frequent label of each item. Raises ValueError for a repeated judgement."""
    votes = votes_by_item(labels)
    decided = []
    for item, counted in votes.items():
        first = leading(counted)
        decided.append(
            ItemLabel(
                item=item,
                label=first[0] if len(first) == 1 else None,
                confidence=counted[first[0]] / counted.total(),
                votes=_ordered(counted),
                tied=first if len(first) > 1 else (),
                probabilities={
                    label: times / counted.total() for label, times in _ordered(counted).items()
                },
            )
        )
    judged: Counter[str] = Counter()
    tables: dict[str, dict[Any, Counter[Any]]] = defaultdict(lambda: defaultdict(Counter))
    for item, name, given in labels:
        judged[name] += 1
        others = votes[item] - Counter([given])
        first = leading(others) if others else ()
        if len(first) == 1:
            tables[name][first[0]][given] += 1
    annotators = []
    for name in sorted(judged):
        rows = tables[name]
        compared = sum(row.total() for row in rows.values())
        right = sum(row[true] for true, row in rows.items())
        annotators.append(
            Annotator(name, judged[name], right / compared if compared else None, _shares(rows))
        )
    return Aggregation(decided, annotators)


def _item_label(
    item: str, votes: Counter[Any], names: Sequence[Hashable], probabilities: Sequence[float]
) -> ItemLabel:
    best = max(probabilities)
    first = tuple(name for name, p in zip(names, probabilities, strict=True) if best - p <= _SAME)
    tied = first if len(first) > 1 else ()
    shares = {name: float(p) for name, p in zip(names, probabilities, strict=True)}
    return ItemLabel(item, None if tied else first[0], float(best), _ordered(votes), tied, shares)


def dawid_skene(labels: Sequence[Label], iterations: int = _ITERATIONS) -> Aggregation:
    """Labels, probabilities and confusion matrices by crowd-kit's DawidSkene. It starts at the
    shares of the votes, so nothing is drawn at random.

    Raises ValueError for a repeated judgement and without labels.
    """
    import pandas

    classification = require("crowdkit.aggregation.classification", "labels")
    votes = votes_by_item(labels)
    if not votes:
        raise ValueError("no labels to aggregate")
    names = sorted_labels(label.label for label in labels)
    index = {name: i for i, name in enumerate(names)}
    items = {item: i for i, item in enumerate(votes)}
    who = sorted({label.annotator for label in labels})
    people = {name: i for i, name in enumerate(who)}
    # numbers instead of names: crowd-kit treats true/false labels and mixed kinds apart
    table = pandas.DataFrame(
        [(items[i], people[a], index[label]) for i, a, label in labels],
        columns=["task", "worker", "label"],
    )
    # crowd-kit's own calls that a later pandas will refuse; the lock has a pandas that takes them
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"crowdkit\.")
        model = classification.DawidSkene(n_iter=iterations).fit(table)
    assert model.probas_ is not None and model.priors_ is not None and model.errors_ is not None
    probabilities = model.probas_.reindex(
        index=range(len(items)), columns=range(len(names)), fill_value=0.0
    ).to_numpy()
    decided = [
        _item_label(item, counted, names, probabilities[items[item]])
        for item, counted in votes.items()
    ]
    priors = model.priors_.reindex(range(len(names)), fill_value=0.0).to_numpy()
    judged = Counter(label.annotator for label in labels)
    annotators = []
    for name, number in people.items():
        # [given, true]
        errors = (
            model.errors_.loc[number]
            .reindex(index=range(len(names)), columns=range(len(names)), fill_value=0.0)
            .to_numpy()
        )
        confusion = {
            true: dict(zip(names, map(float, errors[:, k]), strict=True))
            for k, true in enumerate(names)
        }
        accuracy = float((priors * errors.diagonal()).sum() / priors.sum())
        annotators.append(Annotator(name, judged[name], accuracy, confusion))
    done = len(model.loss_history_)
    return Aggregation(decided, annotators, iterations=done, converged=done < iterations)
