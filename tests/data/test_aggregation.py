"""Aggregation: ties stay ties, planted annotators are found out, and an order of rows changes
nothing.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.aggregation import dawid_skene, majority
from rlhf.data.agreement import Label


def triples(**rows: str) -> list[Label]:
    return [
        Label(str(i), name, mark)
        for name, marks in rows.items()
        for i, mark in enumerate(marks)
        if mark != "."
    ]


def test_majority_keeps_ties() -> None:
    found = majority(triples(a="yyn.", b="ynny", c="ynyn", d="ny.."))
    one, two, three, four = found.labels
    assert (one.label, one.confidence, one.votes, one.tied) == ("y", 0.75, {"y": 3, "n": 1}, ())
    assert (two.label, two.confidence, two.tied) == (None, 0.5, ("n", "y"))
    assert (three.label, three.confidence) == ("n", pytest.approx(2 / 3))
    assert (four.label, four.tied) == (None, ("n", "y"))


def test_nobody_agrees_with_himself() -> None:
    """Each annotator is held against the majority of the others; where these tie or are none the
    item says nothing.
    """
    found = {a.name: a for a in majority(triples(a="yyyy", b="yyny", c="yyn.")).annotators}
    # of the last item b alone judges him
    assert found["a"].accuracy == pytest.approx(3 / 4) and found["a"].judgements == 4
    assert found["a"].confusion == {"n": {"y": 1.0}, "y": {"y": 1.0}}
    assert found["b"].accuracy == 1.0, "of item 2 the others tie"
    assert majority([Label("0", "a", "y")]).annotators[0].accuracy is None


def planted(items: int, seed: int = 0) -> tuple[list[Label], list[bool]]:
    """Two good annotators, three that guess with a leaning to yes."""
    rng = random.Random(seed)
    truth = [rng.random() < 0.5 for _ in range(items)]
    out = []
    for i, true in enumerate(truth):
        out += [
            Label(str(i), name, true if rng.random() < 0.95 else not true)
            for name in ("good1", "good2")
        ]
        out += [Label(str(i), f"guess{j}", rng.random() < 0.6) for j in range(3)]
    return out, truth


def right(labels: list, truth: list[bool]) -> float:
    return sum(v.label is true for v, true in zip(labels, truth, strict=True)) / len(truth)


def test_dawid_skene_finds_who_guesses() -> None:
    labels, truth = planted(400)
    model, votes = dawid_skene(labels), majority(labels)
    assert model.converged
    assert right(model.labels, truth) > 0.93 > right(votes.labels, truth) + 0.05
    accuracy = {a.name: a.accuracy for a in model.annotators}
    assert all(abs((accuracy[name] or 0) - 0.95) < 0.04 for name in ("good1", "good2"))
    assert all(abs((accuracy[f"guess{j}"] or 0) - 0.5) < 0.08 for j in range(3))
    guesser = next(a for a in model.annotators if a.name == "guess0")
    assert (
        abs(guesser.confusion[True][True] - 0.6) < 0.1
        and abs(guesser.confusion[False][True] - 0.6) < 0.1
    )
    assert all(sum(row.values()) == pytest.approx(1.0) for row in guesser.confusion.values())


def test_dawid_skene_is_sure_where_it_should_be() -> None:
    labels, truth = planted(400)
    sure = [
        (v, true)
        for v, true in zip(dawid_skene(labels).labels, truth, strict=True)
        if v.confidence > 0.99
    ]
    assert len(sure) > 200 and sum(v.label is true for v, true in sure) / len(sure) > 0.98


def test_dawid_skene_keeps_ties_and_refuses_nothing() -> None:
    tied = dawid_skene(triples(a="y", b="n")).labels[0]
    assert tied.label is None and tied.tied == ("n", "y") and tied.confidence == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no labels"):
        dawid_skene([])
    for aggregate in (majority, dawid_skene):
        with pytest.raises(ValueError, match="more than once"):
            aggregate([Label("0", "a", "y"), Label("0", "a", "n")])


marks = st.lists(
    st.lists(st.sampled_from([None, True, False, "x", 3]), min_size=3, max_size=3),
    min_size=1,
    max_size=8,
)


@settings(deadline=None, max_examples=15)
@given(marks, st.randoms(use_true_random=False))
def test_order_changes_nothing(rows: list[list], rng: random.Random) -> None:
    labels = [
        Label(str(i), "abc"[j], value)
        for i, row in enumerate(rows)
        for j, value in enumerate(row)
        if value is not None
    ]
    if not labels:
        return
    shuffled = rng.sample(labels, len(labels))
    for aggregate in (majority, dawid_skene):
        one, other = ({v.item: v for v in aggregate(rows).labels} for rows in (labels, shuffled))
        assert one.keys() == other.keys()
        for item, found in one.items():
            assert found.votes == other[item].votes and sum(found.votes.values()) == sum(
                label.item == item for label in labels
            )
            assert found.confidence == pytest.approx(other[item].confidence, abs=1e-6)
            if aggregate is majority:
                assert found == other[item]
