"""The test between arms: false alarms at most alpha however often one looks, with the user as the
unit; thumbs as the unit would be wrong; a difference is found.
"""

import math

import numpy as np
import pytest

from rlhf.gateway import trial
from rlhf.gateway.records import Outcome
from rlhf.labels.betting import bets, capital

ALPHA = 0.05
TESTS, COUNT, TURNS = 1000, 200, 5


def users(
    rng: np.random.Generator, means: np.ndarray, turns: int = TURNS
) -> tuple[np.ndarray, np.ndarray]:
    """Thumbs of users who differ much among themselves: [N, turns] and their users' means [N]."""
    lean = rng.beta(2 * means, 2 * (1 - means))
    thumbs = rng.random((len(means), turns)) < lean[:, None]
    return thumbs, thumbs.mean(axis=1)


def ever(x: np.ndarray) -> np.ndarray:
    """Of tests [T, N]: whether each ever decides, looked at after every outcome."""
    up, down = capital(x, bets(None))
    return np.asarray(((up + down) / 2 >= 1 / ALPHA).any(axis=1))


def assigned(in_b: np.ndarray, values: np.ndarray, p: float) -> list[Outcome]:
    weights = {"a": 1 - p, "b": p}
    return [
        Outcome("b" if b else "a", weights, float(v)) for b, v in zip(in_b, values, strict=True)
    ]


@pytest.mark.parametrize("p", [0.5, 0.1])
def test_equal_arms_looked_at_after_every_user(p: float) -> None:
    """1,000 A/A tests of 200 users with 5 thumbs each. Users are not alike: their mean drifts, and
    they come in waves.
    """
    rng = np.random.default_rng(7)
    moves = []
    for _ in range(TESTS):
        means = 0.75 + 0.2 * np.sin(np.linspace(0, 9, COUNT)) * rng.choice([-1, 1])
        _, values = users(rng, np.clip(means, 0.05, 0.95))
        moves.append(trial.moves(assigned(rng.random(COUNT) < p, values, p), "a", "b"))
    x = np.array(moves)
    assert x.shape == (TESTS, COUNT) and x.min() >= 0 and x.max() <= 1
    assert abs(x.mean() - 0.5) < 4 * x.std() / math.sqrt(x.size)
    rate = float(ever(x).mean())
    assert (rate > 0) is (p == 0.5)  # unequal shares: one arm's users say little, and it is slower
    assert rate <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / TESTS), rate


def test_thumbs_in_place_of_users_raise_false_alarms() -> None:
    """What the gateway does not do: the thumbs of a user as outcomes of their own."""
    rng = np.random.default_rng(8)
    moves = []
    for _ in range(300):
        thumbs, _ = users(rng, np.full(80, 0.5), turns=20)
        in_b = np.repeat(rng.random(80) < 0.5, 20)
        moves.append(trial.moves(assigned(in_b, thumbs.ravel(), 0.5), "a", "b"))
    assert ever(np.array(moves)).mean() > 3 * ALPHA


def test_a_difference_is_found() -> None:
    rng = np.random.default_rng(9)
    found = []
    for _ in range(60):
        in_b = rng.random(400) < 0.5
        _, values = users(rng, np.where(in_b, 0.75, 0.5))
        found.append(trial.compare(assigned(in_b, values, 0.5), "a", "b", ALPHA))
    better = [each.decision == "b is better" for each in found]
    assert np.mean(better) > 0.9
    assert all(each.stopped is not None for each in found if each.decision != "not decided")
    turned = trial.compare(assigned(~in_b, values, 0.5), "a", "b", ALPHA)
    assert turned.decision in ("a is better", "not decided")


def test_outcomes_by_hand() -> None:
    """The first user against c = 1/2, the second against the mean of 1/2 and the first's 1."""
    outcomes = assigned(np.array([True, False]), np.array([1.0, 0.0]), 0.5)
    assert trial.moves(outcomes, "a", "b") == pytest.approx([1.0, 0.5 + 0.75 * 0.5 / (2 * 0.375)])
    # at p = 0.2 a user of b weighs four times one of a
    one = trial.moves(assigned(np.array([True]), np.array([1.0]), 0.2), "a", "b")
    other = trial.moves(assigned(np.array([False]), np.array([1.0]), 0.2), "a", "b")
    assert one[0] - 0.5 == pytest.approx(4 * (0.5 - other[0]))


def test_users_who_could_not_have_been_in_the_other_arm_say_nothing() -> None:
    alone = Outcome("a", {"a": 1.0, "b": 0.0}, 1.0)
    assert len(trial.moves([alone], "a", "b")) == 0
    third = Outcome("c", {"a": 0.3, "b": 0.3, "c": 0.4}, 1.0)
    assert len(trial.moves([third], "a", "b")) == 0


def test_several_arms_share_alpha() -> None:
    found = trial.comparisons([], ["c", "a", "b"], 0.05)
    assert [(each.a, each.b, each.alpha) for each in found] == [
        ("a", "b", 0.025),
        ("a", "c", 0.025),
    ]
    (standing, *_) = trial.standings([Outcome("a", {"a": 1}, 0.5)], ["a", "b"], 0.05)
    assert standing.mean == 0.5 and standing.interval[0] < 0.5 < standing.interval[1]
