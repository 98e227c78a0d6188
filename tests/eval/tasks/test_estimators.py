"""pass@k and maj@k against every subset."""

import itertools
import random
from collections import Counter
from collections.abc import Hashable, Sequence

import pytest

from eval.episodes import pass_at_k
from eval.tasks.estimators import majority_at, pass_at


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_mean_over_all_subsets(n: int) -> None:
    for right in range(n + 1):
        samples = [1] * right + [0] * (n - right)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(samples, k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at(n, right, k) == pytest.approx(expected, abs=1e-12)


def test_episodes_take_the_same_rule() -> None:
    found = pass_at_k(["a"] * 4, [True, False, False, True])
    assert found["pass_at_2"] == [pass_at(4, 2, 2)] * 4 == [pytest.approx(5 / 6)] * 4


@pytest.mark.parametrize(("n", "right", "k"), [(3, 1, 4), (3, 4, 1), (3, 1, 0)])
def test_impossible_numbers_are_an_error(n: int, right: int, k: int) -> None:
    with pytest.raises(ValueError, match="expected 1 <= k <= n"):
        pass_at(n, right, k)


def by_subsets(answers: Sequence[Hashable | None], right: Sequence[float], k: int) -> float:
    """Every subset by itself; ties as the mean of those that tie."""
    shares: dict[Hashable, float] = {}
    for answer in set(answers) - {None}:
        values = [r for a, r in zip(answers, right, strict=True) if a == answer]
        shares[answer] = sum(values) / len(values)
    total = 0.0
    subsets = list(itertools.combinations(answers, k))
    for subset in subsets:
        votes = Counter(answer for answer in subset if answer is not None)
        most = [answer for answer, count in votes.items() if count == max(votes.values())]
        total += sum(shares[answer] for answer in most) / len(most) if most else 0.0
    return total / len(subsets)


@pytest.mark.parametrize("seed", range(12))
def test_majority_is_the_mean_over_all_subsets(seed: int) -> None:
    drawn = random.Random(seed)
    answers = [drawn.choice(["4", "5", "6", None]) for _ in range(drawn.randint(1, 8))]
    right = [float(answer == "4") for answer in answers]
    for k in range(1, len(answers) + 1):
        expected = by_subsets(answers, right, k)
        assert majority_at(answers, right, k) == pytest.approx(expected, abs=1e-12)


def test_majority_by_hand() -> None:
    assert majority_at(["4", "4", "5"], [1, 1, 0], 3) == 1.0
    # of the three pairs one is right, two tie
    assert majority_at(["4", "4", "5"], [1, 1, 0], 2) == pytest.approx(2 / 3)
    assert majority_at([None, None], [0, 0], 2) == 0.0
    with pytest.raises(ValueError, match="expected 1 <= k <= n"):
        majority_at(["4"], [1], 2)
