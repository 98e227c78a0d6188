"""Simulated annotators: their statistics are those that their fields say."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.proofs.annotator import Annotator, judge
from rlhf.labels.records import Answer, Task, Verdict


def task(number: int, order: tuple[int, ...] = (0, 1)) -> Task:
    return Task(f"t-{number}", "p", tuple(Answer(f"answer {i}") for i in range(len(order))), order)


def share(
    annotator: Annotator,
    verdict: Verdict,
    worth: tuple[float, float],
    order: tuple[int, int] = (0, 1),
    count: int = 4000,
) -> float:
    return (
        sum(judge(annotator, task(i, order), worth).verdict is verdict for i in range(count))
        / count
    )


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("worth", "order", "left"),
    [((1.0, 0.0), (0, 1), 2.0), ((1.0, 0.0), (1, 0), -2.0), ((0.3, 0.3), (0, 1), 0.0)],
)
def test_pairs_by_bradley_and_terry_in_the_places_as_shown(
    worth: tuple[float, float], order: tuple[int, int], left: float
) -> None:
    found = share(Annotator("a", 0, temperature=0.5), Verdict.left, worth, order)
    assert found == pytest.approx(logistic(left), abs=0.03), "four standard errors of 4,000 draws"


def test_flips_turn_the_judgement_round() -> None:
    assert share(
        Annotator("a", 0, temperature=1e-6, flip=0.2), Verdict.left, (1.0, 0.0)
    ) == pytest.approx(0.8, abs=0.03)
    assert (
        share(Annotator("a", 0, temperature=1e-6, flip=1.0), Verdict.left, (1.0, 0.0), count=50)
        == 0.0
    )


def test_ties_by_rao_and_kupper_and_a_bias_to_the_left() -> None:
    tied = share(Annotator("a", 0, tie=0.7), Verdict.tie, (0.5, 0.0))
    assert tied == pytest.approx(logistic(0.7 - 0.5) - logistic(-0.7 - 0.5), abs=0.03)
    assert share(Annotator("a", 0, side_bias=1.0), Verdict.left, (0.0, 0.0)) == pytest.approx(
        logistic(1.0), abs=0.03
    )


def test_rankings_by_plackett_and_luce() -> None:
    worth = (2.0, 1.0, 0.0)
    firsts = Counter(
        judge(Annotator("a", 0), task(i, (2, 0, 1)), worth).ranking[0][0] for i in range(4000)
    )
    total = sum(math.exp(w) for w in worth)
    for place, index in enumerate((2, 0, 1)):  # place shows answers[index]
        assert firsts[place] / 4000 == pytest.approx(math.exp(worth[index]) / total, abs=0.03)
    sure = judge(Annotator("a", 0, temperature=1e-6), task(0, (2, 0, 1)), worth)
    assert sure.verdict is Verdict.ranked and sure.ranking == ((1,), (2,), (0,))
    assert judge(
        Annotator("a", 0, temperature=1e-6, flip=1.0), task(0, (2, 0, 1)), worth
    ).ranking == ((0,), (2,), (1,))


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 100), st.integers(0, 3), st.sampled_from(["a", "b"]), st.permutations(range(2))
)
def test_a_judgement_is_of_the_task_annotator_and_seed_alone(
    number: int, seed: int, name: str, order: list[int]
) -> None:
    one = task(number, (order[0], order[1]))
    annotator = Annotator(name, seed, temperature=2.0, flip=0.1, tie=0.3)
    found = judge(annotator, one, (0.2, 0.0))
    judge(annotator, task(number + 1), (0.0, 1.0))
    assert found == judge(annotator, one, (0.2, 0.0))
    assert (found.task, found.annotator, found.shown, found.prompt) == (
        one.id,
        name,
        one.shown,
        "p",
    )


def test_annotators_and_seeds_differ() -> None:
    def series(annotator: Annotator) -> list[Verdict]:
        return [judge(annotator, task(i), (0.0, 0.0)).verdict for i in range(60)]

    assert (
        len({tuple(series(a)) for a in (Annotator("a", 0), Annotator("b", 0), Annotator("a", 1))})
        == 3
    )


def test_what_does_not_fit_is_refused() -> None:
    for worth in ((1.0,), (1.0, math.nan)):
        with pytest.raises(ValueError, match="task t-0: expected 2 finite numbers"):
            judge(Annotator("a", 0), task(0), worth)
    for fields in ({"temperature": 0.0}, {"flip": 1.5}, {"tie": -1.0}):
        with pytest.raises(ValueError, match="expected a temperature"):
            Annotator("a", 0, **fields)
