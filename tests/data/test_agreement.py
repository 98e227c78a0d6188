"""Agreement: published worked examples, libraries as a second opinion, and what must not change
anything.
"""

import dataclasses
import math
import random
import string
import tracemalloc

import numpy as np
import pytest
from crowdkit.metrics.data import alpha_krippendorff
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.metrics.agreement import AnnotationTask
from pandas import DataFrame
from sklearn.metrics import cohen_kappa_score

from rlhf.data.agreement import (
    Label,
    Level,
    agreement,
    cohen_kappa,
    cohen_pairs,
    count,
    fleiss_kappa,
    krippendorff_alpha,
    mean_cohen,
    observed_agreement,
    sorted_labels,
)


def triples(**rows: str) -> list[Label]:
    """One string an annotator, one character an item; a dot is missing."""
    return [
        Label(str(i), name, mark)
        for name, marks in rows.items()
        for i, mark in enumerate(marks.replace(" ", ""))
        if mark != "."
    ]


def as_numbers(labels: list[Label]) -> list[Label]:
    return [Label(i, a, int(str(mark))) for i, a, mark in labels]


# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability": section A (two observers,
# binary), B (two observers, nominal), and the
# reliability data of C to E (four observers, 12 units, missing values). Gwet's package irrCAC has
# the last as cac.raw4raters.
BINARY = triples(meg="0100000010", owen="1110010000")
NOMINAL = triples(ben="aabbdcccedda", gerry="babbbccceddd")
FOUR = as_numbers(
    triples(a="12332141 2...", b="12332241 25.3", c=".3332342 251.", d="12332441 251.")
)


def test_published_alphas() -> None:
    assert agreement(BINARY).krippendorff.value == pytest.approx(0.095, abs=5e-4)
    assert agreement(NOMINAL).krippendorff.value == pytest.approx(0.692, abs=5e-4)
    assert agreement(FOUR).krippendorff.value == pytest.approx(0.743, abs=5e-4)
    assert agreement(FOUR, level=Level.ordinal).krippendorff.value == pytest.approx(0.815, abs=5e-4)
    assert agreement(FOUR, level=Level.interval).krippendorff.value == pytest.approx(
        0.849, abs=5e-4
    )


def test_published_fleiss_kappas() -> None:
    # The worked example of Wikipedia's article on Fleiss' kappa (ten items, 14 annotators): 0.210,
    # from agreement 0.378 and chance 0.213.
    table = np.array(
        [
            [0, 0, 0, 0, 14],
            [0, 2, 6, 4, 2],
            [0, 0, 3, 5, 6],
            [0, 3, 9, 2, 0],
            [2, 2, 8, 1, 1],
            [7, 7, 0, 0, 0],
            [3, 2, 6, 3, 0],
            [2, 5, 3, 2, 2],
            [6, 5, 2, 1, 0],
            [0, 2, 2, 3, 7],
        ]
    )
    times = np.ones((1, len(table)), dtype=np.int64)
    assert fleiss_kappa(table, times)[0] == pytest.approx(0.210, abs=5e-4)
    assert observed_agreement(table, times)[0] == pytest.approx(0.378, abs=5e-4)
    # unequal numbers of labels: irrCAC's vignette gives 0.76117 for these data, from agreement
    # 0.81818
    found = agreement(FOUR)
    assert found.fleiss.value == pytest.approx(0.76117, abs=5e-6)
    assert found.observed.value == pytest.approx(0.8181818, abs=5e-7) and found.observed.items == 11


def test_published_cohen_kappa() -> None:
    # Cohen 1960, table 2: 0.70 agreement, 0.41 by chance, kappa 0.492
    table = np.array([[88, 14, 18], [10, 40, 10], [2, 6, 12]])
    cells = np.argwhere(table)
    assert cohen_kappa(cells, table.reshape(1, -1))[0] == pytest.approx(0.29 / 0.59, abs=1e-12)


def test_many_different_labels_cost_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    # grades with decimals: hardly two are equal. A table of all labels by all labels had 64,000,000
    # numbers in 100 resamples
    grades = [
        (str(i), who, round((i * 7919 % 800) / 80 + shift, 3))
        for i in range(400)
        for who, shift in (("a", 0.0), ("b", i % 3 / 1000))
    ]
    labels = [Label(*grade) for grade in grades]
    tracemalloc.start()
    sparse = agreement(labels, level=Level.interval, resamples=100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 2**20
    monkeypatch.setattr("rlhf.data.agreement._weighted", lambda weights, rows: weights @ rows)
    dense = agreement(labels, level=Level.interval, resamples=100)
    for ours, theirs in ((sparse.krippendorff, dense.krippendorff), (sparse.fleiss, dense.fleiss)):
        assert dataclasses.astuple(ours) == pytest.approx(dataclasses.astuple(theirs), abs=1e-9)
    assert sparse.cohen == pytest.approx(dense.cohen, abs=1e-9)


def test_hand_computed_pairs_of_annotators() -> None:
    labels = triples(a="1100", b="1110", c="..00")
    pairs = cohen_pairs(labels)
    assert list(pairs) == [("a", "b"), ("a", "c"), ("b", "c")]
    # 3/4 observed, 2/4 * 3/4 + 2/4 * 1/4 = 1/2 by chance
    assert pairs["a", "b"].value == pytest.approx(0.5) and pairs["a", "b"].items == 4
    assert pairs["a", "c"].value is None, "both gave one label only: 0/0"
    # 1/2 observed, 1/2 by chance
    assert pairs["b", "c"].value == pytest.approx(0.0) and pairs["b", "c"].items == 2
    assert mean_cohen(pairs.values()) == pytest.approx((0.5 * 4 + 0.0 * 2) / 6)


def test_what_is_undefined_is_none() -> None:
    same = agreement(triples(a="111", b="111"))
    assert same.observed.value == 1.0
    assert same.fleiss.value is same.krippendorff.value is same.cohen is None
    alone = agreement(triples(a="10"))
    assert (
        alone.observed.value is None
        and alone.krippendorff.value is None
        and alone.observed.items == 0
    )
    assert agreement([]).observed.value is None


def test_repeated_judgements_and_strange_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="'a' has judged item '0' more than once"):
        count([Label("0", "a", "x"), Label("0", "a", "x")])
    with pytest.raises(ValueError, match="interval labels: expected numbers, found 'a'"):
        agreement(NOMINAL, level=Level.interval)
    with pytest.raises(ValueError, match="'e' are not in the order"):
        agreement(NOMINAL, level=Level.ordinal, order=["a", "b", "c", "d"])


def test_order_makes_words_ordinal() -> None:
    words = {1: "awful", 2: "bad", 3: "fair", 4: "good", 5: "great"}
    named = [Label(i, a, words[n]) for i, a, n in FOUR]
    order = [words[n] for n in sorted(words)]
    assert (
        agreement(named, level=Level.ordinal, order=order).krippendorff.value
        == agreement(FOUR, level=Level.ordinal).krippendorff.value
    )
    assert agreement(
        named, level=Level.ordinal, order=order[::-1]
    ).krippendorff.value == pytest.approx(agreement(FOUR, level=Level.ordinal).krippendorff.value)


def test_labels_are_sorted_by_size_or_text() -> None:
    assert sorted_labels([10, 9.5, 2]) == (2, 9.5, 10)
    assert sorted_labels(["b", "a", "b"]) == ("a", "b")
    assert sorted_labels([True, False]) == (False, True)


# ---- second opinions ----

ratings = st.lists(
    st.lists(st.sampled_from([None, 0, 1, 2, 5]), min_size=3, max_size=3), min_size=1, max_size=12
)


def from_rows(rows: list[list[int | None]]) -> list[Label]:
    return [
        Label(str(i), string.ascii_lowercase[j], value)
        for i, row in enumerate(rows)
        for j, value in enumerate(row)
        if value is not None
    ]


@settings(deadline=None, max_examples=150)
@given(ratings)
def test_alpha_is_crowd_kits(rows: list[list[int | None]]) -> None:
    labels = from_rows(rows)
    pairable = [label for label in labels if sum(other.item == label.item for other in labels) > 1]
    if len({label.label for label in pairable}) < 2:  # 0/0, which crowd-kit calls 1
        assert agreement(labels, resamples=2).krippendorff.value is None
        return
    table = DataFrame(labels, columns=["task", "worker", "label"])
    assert agreement(labels, resamples=2).krippendorff.value == pytest.approx(
        alpha_krippendorff(table), abs=1e-9
    )
    squared = alpha_krippendorff(table, distance=lambda a, b: float(a - b) ** 2)  # type: ignore[operator]
    assert agreement(labels, level=Level.interval, resamples=2).krippendorff.value == pytest.approx(
        squared, abs=1e-9
    )


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.sampled_from("xyz"), min_size=3, max_size=3), min_size=1, max_size=10))
def test_kappas_are_scikit_learns_and_nltks(rows: list[list[str]]) -> None:
    labels = from_rows(rows)  # type: ignore[arg-type]
    found = agreement(labels, resamples=2)
    for (first, second), pair in found.cohen_pairs.items():
        sides = [[row["abc".index(name)] for row in rows] for name in (first, second)]
        if len({*sides[0], *sides[1]}) == 1:
            assert pair.value is None
        else:
            assert pair.value == pytest.approx(cohen_kappa_score(*sides), abs=1e-9)
    if len({label.label for label in labels}) > 1:
        assert found.fleiss.value == pytest.approx(
            AnnotationTask([(a, i, x) for i, a, x in labels]).pi(), abs=1e-9
        )


@settings(deadline=None, max_examples=50)
@given(ratings, st.randoms(use_true_random=False))
def test_order_and_names_change_nothing(rows: list[list[int | None]], rng: random.Random) -> None:
    labels = from_rows(rows)
    renamed = [Label(f"item {i}", {"a": "c", "b": "a", "c": "b"}[a], x) for i, a, x in labels]
    rng.shuffle(renamed)
    for level in Level:
        one, other = (
            agreement(labels, level=level, resamples=20),
            agreement(renamed, level=level, resamples=20),
        )
        for name in ("observed", "fleiss", "krippendorff"):
            a, b = getattr(one, name), getattr(other, name)
            assert a.items == b.items and (a.value is None) == (b.value is None)
            if a.value is not None:
                assert a.value == pytest.approx(b.value, abs=1e-9) and (a.low, a.high) == (
                    pytest.approx(b.low),
                    pytest.approx(b.high),
                )


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.lists(st.sampled_from([None, 3, 7]), min_size=4, max_size=4), min_size=1, max_size=12
    )
)
def test_two_labels_have_one_alpha_at_every_level(rows: list[list[int | None]]) -> None:
    values = [
        agreement(from_rows(rows), level=level, resamples=2).krippendorff.value for level in Level
    ]
    assert values == [None] * 3 or values == [pytest.approx(values[0], abs=1e-9)] * 3


# ---- intervals ----


def simulated(items: int, right: float, seed: int) -> list[Label]:
    """Two annotators that each give the item's true label (a fair coin) with probability
    `right`.
    """
    rng = random.Random(seed)
    out = []
    for i in range(items):
        true = rng.randrange(2)
        out += [Label(str(i), name, true if rng.random() < right else 1 - true) for name in "ab"]
    return out


def test_intervals_cover_the_truth() -> None:
    observed, kappa = 0.8**2 + 0.2**2, 2 * (0.8**2 + 0.2**2) - 1  # chance is one half
    covered = {"observed": 0, "cohen": 0, "fleiss": 0, "krippendorff": 0}
    runs = 200
    for seed in range(runs):
        found = agreement(simulated(120, 0.8, seed), resamples=300, seed=seed)
        for name, estimate, truth in (
            ("observed", found.observed, observed),
            ("cohen", found.cohen_pairs["a", "b"], kappa),
            ("fleiss", found.fleiss, kappa),
            ("krippendorff", found.krippendorff, kappa),
        ):
            assert (
                estimate.low is not None
                and estimate.high is not None
                and estimate.value is not None
            )
            assert estimate.low <= estimate.value <= estimate.high
            covered[name] += estimate.low <= truth <= estimate.high
    assert all(0.90 <= hits / runs <= 0.985 for hits in covered.values()), covered


def test_the_seed_fixes_the_interval_and_rows_narrow_it() -> None:
    few, many = simulated(50, 0.8, 1), simulated(5000, 0.8, 1)
    assert agreement(few, seed=3) == agreement(few, seed=3)
    assert agreement(few, seed=3).fleiss != agreement(few, seed=4).fleiss

    def width(labels: list[Label]) -> float:
        found = agreement(labels).fleiss
        return (found.high or math.nan) - (found.low or math.nan)

    assert width(many) < 0.2 * width(few)


def test_blocks_of_resamples_change_nothing_but_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = agreement(FOUR, level=Level.ordinal, resamples=2000).krippendorff
    monkeypatch.setattr("rlhf.data.agreement._BLOCK", 64)
    pieces = agreement(FOUR, level=Level.ordinal, resamples=2000).krippendorff
    assert pieces.value == whole.value
    assert pieces.low == pytest.approx(whole.low, abs=0.05) and pieces.high == pytest.approx(
        whole.high, abs=0.05
    )


def test_a_resample_is_weighed_as_its_rows() -> None:
    """A row that is drawn twice counts as two rows."""
    patterns = np.array([[2, 1, 0], [0, 3, 0], [1, 1, 1]])
    times = np.array([[2, 0, 1]])
    rows = patterns[[0, 0, 2]]
    once = np.ones((1, 3), dtype=np.int64)
    assert fleiss_kappa(patterns, times)[0] == pytest.approx(fleiss_kappa(rows, once)[0])
    for level in Level:
        values = np.array([0.0, 1.0, 4.0])
        assert krippendorff_alpha(patterns, times, level, values)[0] == pytest.approx(
            krippendorff_alpha(rows, once, level, values)[0]
        )


def test_figures_are_json() -> None:
    import json

    figures = json.loads(json.dumps(agreement(FOUR).figures()))
    assert (
        figures["items"] == 12
        and figures["annotators"] == 4
        and figures["judgements"] == 41
        and figures["labels"] == [1, 2, 3, 4, 5]
    )
    assert (
        figures["krippendorff_alpha"]["value"] == pytest.approx(0.743, abs=5e-4)
        and len(figures["cohen_kappa"]["pairs"]) == 6
    )
