"""The figures of the proof of stage=search."""

from collections.abc import Sequence

import pytest

from benchmarks.proofs import search
from rlhf.search.trials import State, Trial


def trials(losses: Sequence[float | None], steps: int = 10) -> list[Trial]:
    """A trial for each loss; None: it was stopped."""
    return [
        Trial(
            number=number,
            state=State.pruned if loss is None else State.complete,
            setting={"x": number},
            values=() if loss is None else (loss,),
            steps=4 if loss is None else steps,
        )
        for number, loss in enumerate(losses)
    ]


def seed(tpe: float, pruned: Sequence[float | None]) -> search.Seed:
    return search.Seed(trials([3.0, 2.0, 2.5]), trials([3.0, tpe, 4.0]), trials(pruned))


def test_the_figures_of_a_seed() -> None:
    found = seed(1.5, [3.0, 2.0, None])
    assert found.gain == pytest.approx(0.5) and found.saved == pytest.approx(0.2)
    assert found.keeps_best and not seed(1.5, [3.0, None, 2.5]).keeps_best


def test_each_bound_can_fail() -> None:
    good = {0: seed(1.5, [3.0, 2.0, None]), 1: seed(1.9, [None, 2.0, None])}
    repeated = {"tpe": True}
    assert all(check.passed for check in search.checks(good, repeated))  # saves just 30 %
    bad = {0: seed(2.5, [3.0, None, None]), 1: seed(2.5, [3.0, None, None])}
    passed = [check.passed for check in search.checks(bad, {"tpe": False})]
    assert passed == [False, False, False, True, False]


def test_the_same_trials_are_the_same() -> None:
    assert search.same(trials([1.0, None]), trials([1.0, None]))
    assert not search.same(trials([1.0, 2.0]), trials([1.0, None]))
    assert not search.same(trials([1.0]), trials([1.0, None]))
