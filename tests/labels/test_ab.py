"""The A/B test: its error rate however often one looks, its power as planned, numbers by hand, and
what it refuses.
"""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from rlhf.labels import ab, betting
from rlhf.labels.ab import ABPlan, outcomes, plan, plan_of, sequential_test
from rlhf.types import UserError

PLAN = plan(0.1, 0.05, 0.8, 0.2)  # the defaults of label.ab


def draw(win_rate: float, ties: float, shape: tuple[int, int], seed: int) -> np.ndarray:
    """Outcomes [runs, N]: a tie with probability `ties`, else a win of b with probability
    `win_rate`.
    """
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < ties, 0.5, (rng.random(shape) < win_rate).astype(float))


def ever_stopped(values: np.ndarray, chosen: betting.Bets, alpha: float = 0.05) -> np.ndarray:
    """Of each run, [runs]: 0 where it never stops, 1 for b, -1 for a, at its first e-value of 1 /
    alpha; looks after every outcome.
    """
    up, down = betting.capital(values, chosen)
    crossed = (up + down) / 2 >= 1 / alpha
    first, runs = crossed.argmax(axis=1), np.arange(len(values))
    return np.where(crossed.any(axis=1), np.sign(up - down)[runs, first], 0)


# ---- error and power ----


@pytest.mark.parametrize("effect", [0.1, None])
def test_looking_after_every_label_errs_at_most_alpha(effect: float | None) -> None:
    """1,000 tests of equal policies, 400 looks each. A naive test with as many looks errs in a
    third of them and more.
    """
    values = draw(0.5, 0.2, (1000, 400), seed=1)
    rate = float(np.mean(ever_stopped(values, betting.bets(effect)) != 0))
    assert 0.005 < rate <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)
    means, counts = np.cumsum(values - 0.5, axis=1), np.cumsum(values != 0.5, axis=1)
    naive = np.abs(means) * 2 > 1.96 * np.sqrt(np.maximum(counts, 1))
    assert np.mean(naive[:, 20:].any(axis=1)) > 0.3


def test_outcomes_between_win_and_loss_err_at_most_alpha() -> None:
    """Means of three labels of one prompt, correlated as labels of one prompt are."""
    rng = np.random.default_rng(2)
    lean = rng.beta(0.5, 0.5, (800, 300))
    values = rng.binomial(3, lean) / 3
    assert np.mean(ever_stopped(values, betting.bets(0.1)) != 0) <= 0.05 + 3 * math.sqrt(
        0.05 * 0.95 / 800
    )


@pytest.mark.parametrize(("effect", "ties"), [(0.1, 0.2), (0.2, 0.0), (0.2, 0.6)])
def test_the_planned_number_has_the_planned_power(effect: float, ties: float) -> None:
    """The exact figures against simulation: found with the stated power, stopped half way at the
    median, wrong as rarely as stated.
    """
    planned = plan(effect, 0.05, 0.8, ties)
    runs, error = 800, 3 * math.sqrt(0.2 * 0.8 / 800)
    found = ever_stopped(
        draw(0.5 + effect, ties, (runs, planned.pairs), seed=3), betting.bets(effect)
    )
    assert (
        np.mean(found == 1) == pytest.approx(planned.reached, abs=error)
        and 0.8 <= planned.reached < 0.83
    )
    half = ever_stopped(
        draw(0.5 + effect, ties, (runs, planned.median), seed=4), betting.bets(effect)
    )
    assert np.mean(half == 1) == pytest.approx(0.5, abs=3 * math.sqrt(0.25 / runs))
    none = ever_stopped(draw(0.5, ties, (runs, planned.pairs), seed=5), betting.bets(effect))
    assert (
        np.mean(none != 0) == pytest.approx(planned.error, abs=3 * math.sqrt(0.05 * 0.95 / runs))
        and planned.error <= 0.05
    )
    assert planned.fixed < planned.pairs < 2 * planned.fixed and planned.median < planned.fixed


def test_one_pair_less_has_less_power() -> None:
    limits = betting.boundaries(PLAN.pairs, 0.05, betting.bets(0.1))
    found, wrong = betting.stopping(limits, 0.6)
    assert ab._after(PLAN.pairs - 1, found, 0.2) < 0.8 <= ab._after(PLAN.pairs, found, 0.2)
    assert wrong[-1] < 0.005


def test_the_random_walk_is_every_sequence_summed() -> None:
    """All 2^12 sequences, each tested as labels arrive, with their probabilities."""
    chosen, count, win_rate = betting.bets(0.3), 12, 0.7
    values = np.array(list(itertools.product((0.0, 1.0), repeat=count)))
    chance = np.prod(np.where(values == 1, win_rate, 1 - win_rate), axis=1)
    stopped = ever_stopped(values, chosen, alpha=0.2)
    for_b, for_a = betting.stopping(betting.boundaries(count, 0.2, chosen), win_rate)
    assert (
        for_b[-1] == pytest.approx(float(chance[stopped == 1].sum()), abs=1e-12) and for_b[-1] > 0.3
    )
    assert (
        for_a[-1] == pytest.approx(float(chance[stopped == -1].sum()), abs=1e-12)
        and for_a[-1] > 0.001
    )


def test_the_confidence_sequence_holds_the_truth_at_all_times() -> None:
    """Of 60 runs of mean 0.65 at most about 5 % ever lose it; looked at after every 40th
    outcome.
    """
    chosen, lost = betting.bets(None), 0
    for values in draw(0.75, 0.4, (60, 200), seed=6):
        ends = [betting.confidence_interval(values[:n], 0.05, chosen) for n in range(40, 201, 40)]
        lost += any(not low <= 0.65 <= high for low, high in ends)
    assert lost <= 0.05 * 60 + 3 * math.sqrt(0.05 * 0.95 * 60)
    assert ends[-1][1] - ends[-1][0] < 0.25, "an interval that says nothing would hold everything"


# ---- numbers by hand ----


def test_capital_by_hand() -> None:
    """One fraction of 1/2: a win multiplies by 3/2, a loss by 1/2, a tie by 1."""
    chosen = (np.array([0.5]), np.array([1.0]))
    up, down = betting.capital(np.array([1.0, 1.0, 0.5, 0.0, 0.75]), chosen)
    assert up == pytest.approx([1.5, 2.25, 2.25, 1.125, 1.125 * 1.25])
    assert down == pytest.approx([0.5, 0.25, 0.25, 0.375, 0.375 * 0.75])


def test_the_e_value_of_a_few_wins_by_hand() -> None:
    """With bets c and weights w: (sum w (1 + c)^3 + sum w (1 - c)^3) / 2."""
    fractions, weights = betting.bets(None)
    expected = (np.sum(weights * (1 + fractions) ** 3) + np.sum(weights * (1 - fractions) ** 3)) / 2
    assert sequential_test([1, 1, 1], alpha=0.05).e_value == pytest.approx(expected)
    assert weights.sum() == pytest.approx(1) and betting.bets(0.1)[1].sum() == pytest.approx(1)


def test_the_fixed_number_by_hand() -> None:
    # without ties d = 0.1, sd_0 = 0.5, sd_1 = sqrt(0.24): ((1.959964 * 0.5 + 0.841621 * 0.489898) /
    # 0.1)^2 = 193.85
    assert ab.fixed_pairs(0.1, 0.05, 0.8, 0.0) == 194
    # a share t of ties: d and the variance shrink by 1 - t, so n grows by 1 / (1 - t) but for the
    # small d^2 in sd_1
    assert ab.fixed_pairs(0.1, 0.05, 0.8, 0.5) == pytest.approx(194 * 2, rel=0.02)


def test_wilson_without_ties_is_wilsons_and_ties_narrow_it() -> None:
    values = np.array([1.0] * 30 + [0.0] * 12)
    theirs = binomtest(30, 42).proportion_ci(0.95, method="wilson")
    assert betting.wilson_interval(values, 0.05) == pytest.approx((theirs.low, theirs.high))
    assert (
        betting.wilson_interval(np.ones(5), 0.05)[0] < 0.6
        and betting.wilson_interval(np.ones(5), 0.05)[1] == 1.0
    )
    tied = np.concatenate([values, np.full(42, 0.5)])
    low, high = betting.wilson_interval(tied, 0.05)
    for m in (low, high):  # the ends solve (mean - m)^2 = z^2 (m (1 - m) - ties / 4) / n
        assert (tied.mean() - m) ** 2 == pytest.approx(
            1.959964**2 * (m * (1 - m) - 0.125) / 84, rel=1e-5
        )
    assert betting.wilson_interval(np.full(9, 0.5), 0.05) == pytest.approx(
        (0.5, 0.5)
    ) and betting.wilson_interval(np.array([]), 0.05) == (0.0, 1.0)


def test_wilson_covers_at_one_look() -> None:
    covered = [
        low <= 0.6 <= high
        for low, high in (
            betting.wilson_interval(v, 0.05) for v in draw(0.7, 0.5, (2000, 80), seed=7)
        )
    ]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


# ---- the decision ----


def test_a_clear_winner_stops_the_test_and_later_labels_do_not_undo_it() -> None:
    result = sequential_test([1.0] * 30, PLAN)
    assert result.decision == "b is better" and result.stopped is not None and result.stopped < 30
    assert result.e_value >= 20 > sequential_test([1.0] * (result.stopped - 1), PLAN).e_value
    assert sequential_test([1.0] * 9000, alpha=0.05).e_value < math.inf
    later = sequential_test([1.0] * 30 + [0.0] * 30, PLAN)
    assert (later.decision, later.stopped, later.e_value) == (
        result.decision,
        result.stopped,
        result.e_value,
    )
    assert later.win_rate == 0.5 and (later.a_wins, later.b_wins) == (30, 30)


def test_it_goes_on_until_the_planned_number() -> None:
    even = [1.0, 0.0] * PLAN.pairs
    assert sequential_test(even[:100], PLAN).decision == f"not decided: 100 of {PLAN.pairs} pairs"
    assert sequential_test(even[: PLAN.pairs], PLAN).decision == "no difference shown"
    late = even[: PLAN.pairs] + [1.0] * 500  # the rule said to stop there
    assert (
        sequential_test(late, PLAN).decision == "no difference shown"
        and sequential_test(late, alpha=0.05).decision == "b is better"
    )
    assert sequential_test(even[:100], alpha=0.05).decision == "not decided: 100 pairs"
    nothing = sequential_test([], PLAN)
    assert (nothing.win_rate, nothing.e_value, nothing.interval, nothing.decision) == (
        None,
        1.0,
        (0, 1),
        f"not decided: 0 of {PLAN.pairs} pairs",
    )
    assert (
        "1/alpha = 20" in PLAN.rule
        and f"after {PLAN.pairs} prompts" in nothing.rule
        and "however often" in nothing.rule
    )


def test_half_leaves_the_interval_when_the_test_stops() -> None:
    values = list(draw(0.7, 0.3, (1, 400), seed=8)[0])
    stopped = sequential_test(values, PLAN).stopped
    assert stopped is not None
    assert (
        sequential_test(values[:stopped], PLAN).interval[0]
        > 0.5
        >= sequential_test(values[: stopped - 1], PLAN).interval[0]
    )


def test_ties_and_identical_answers_change_the_win_rate_and_not_the_evidence() -> None:
    decided = list(draw(0.6, 0.0, (1, 60), seed=9)[0])
    plain = sequential_test(decided, PLAN)
    tied, same = (
        sequential_test([*decided, *[0.5] * 40], PLAN),
        sequential_test(decided, PLAN, identical=40),
    )
    assert tied.e_value == pytest.approx(plain.e_value) and same.e_value == plain.e_value
    assert tied.win_rate == same.win_rate == pytest.approx(0.5 + (plain.win_rate - 0.5) * 0.6)  # type: ignore[operator]
    assert (tied.prompts, tied.ties, tied.identical) == (100, 40, 0) and (
        same.prompts,
        same.ties,
        same.identical,
    ) == (60, 40, 40)
    assert (
        tied.interval == pytest.approx(same.interval)
        and tied.interval[1] - tied.interval[0] < plain.interval[1] - plain.interval[0]
    )


outcome_lists = st.lists(st.sampled_from([0.0, 1 / 3, 0.5, 0.75, 1.0]), max_size=80)


@settings(deadline=None, max_examples=40)
@given(outcome_lists)
def test_swapping_the_policies_mirrors_everything(values: list[float]) -> None:
    one, other = sequential_test(values, PLAN), sequential_test([1 - v for v in values], PLAN)
    mirror = {"a is better": "b is better", "b is better": "a is better"}
    assert other.decision == mirror.get(one.decision, one.decision) and other.stopped == one.stopped
    assert other.e_value == pytest.approx(one.e_value) and (
        other.a_wins,
        other.ties,
        other.b_wins,
    ) == (one.b_wins, one.ties, one.a_wins)
    assert other.interval == pytest.approx((1 - one.interval[1], 1 - one.interval[0]), abs=1e-7)
    assert other.fixed_interval == pytest.approx(
        (1 - one.fixed_interval[1], 1 - one.fixed_interval[0]), abs=1e-9
    )


@settings(deadline=None, max_examples=40)
@given(outcome_lists.filter(bool), st.randoms())
def test_the_interval_does_not_depend_on_the_order_and_holds_the_mean(
    values: list[float], random: object
) -> None:
    low, high = sequential_test(values, alpha=0.05).interval
    assert low <= sum(values) / len(values) + 1e-9 and high >= sum(values) / len(values) - 1e-9
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert sequential_test(shuffled, alpha=0.05).interval == pytest.approx((low, high), abs=1e-7)


# ---- in and out ----


def test_labels_become_outcomes_by_prompt() -> None:
    labels = [
        ("p1", "old"),
        ("p2", "new"),
        ("p1", None),
        ("p3", "new"),
        ("p1", "new"),
        ("p3", "new"),
    ]
    assert outcomes(labels, "old", "new") == [0.5, 1.0, 1.0]
    assert outcomes(labels, "new", "old") == [0.5, 0.0, 0.0]
    assert outcomes(labels, "old", "new", wanted=2) == [0.25, 1.0], (
        "p1 with its first two, p2 not yet complete"
    )
    assert outcomes(
        [("q", "new"), ("p", "old"), ("p", None), ("q", "old")], "old", "new", wanted=2
    ) == [0.25, 0.5], "as they become complete"
    for n in range(len(labels)):
        before, after = (outcomes(labels[: n + i], "old", "new", wanted=2) for i in (0, 1))
        assert after[: len(before)] == before, "what was counted stays"


def test_figures_are_json_and_a_plan_is_read_back() -> None:
    figures = json.loads(json.dumps(PLAN.figures()))
    assert plan_of(figures) == PLAN and figures["rule"] == PLAN.rule
    result = json.loads(json.dumps(sequential_test([1, 0.5, 0], PLAN, identical=2).figures()))
    assert (result["a_wins"], result["ties"], result["b_wins"], result["win_rate"]) == (
        1,
        3,
        1,
        0.5,
    )
    assert "without peeking" in result["fixed_interval_note"]
    with pytest.raises(
        UserError,
        match=r"no number for pairs: .*label.ab.enabled=true",
    ):
        plan_of({key: value for key, value in figures.items() if key != "pairs"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"effect": 0.5}, "effect is 0.5"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"power": 1.0}, "power is 1.0"),
        ({"ties": 1.0}, "ties is 1.0"),
    ],
)
def test_plans_that_cannot_be(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**{"effect": 0.1, "alpha": 0.05, "power": 0.8, "ties": 0.2, **change})


def test_an_effect_that_no_labels_show_is_refused() -> None:
    with pytest.raises(UserError, match=r"label.ab.effect=0.001 needs more than 200,000"):
        plan(0.001, 0.05, 0.8, 0.2)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([0.5, 1.5], {"alpha": 0.05}, "outcome 1 is 1.5"),
        ([math.nan], {"alpha": 0.05}, "outcome 0 is nan"),
        ([-0.1], {"planned": PLAN}, r"outcome 0 is -0.1, expected a number in \[0, 1\]"),
        ([[0.5]], {"alpha": 0.05}, "2 dimensions"),
        ([0.5], {}, "a plan or alpha"),
        ([0.5], {"alpha": 0.05, "planned": PLAN}, "a plan or alpha"),
        ([0.5], {"alpha": 0.0}, "alpha is 0.0"),
        ([0.5], {"alpha": 0.05, "identical": -1}, "identical is -1"),
    ],
)
def test_input_that_is_refused(
    values: list[float], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sequential_test(values, **options)  # type: ignore[arg-type]


def test_labels_that_are_refused() -> None:
    with pytest.raises(ValueError, match="'third', expected 'old', 'new' or None"):
        outcomes([("p", "third")], "old", "new")
    with pytest.raises(ValueError, match="both policies are 'old'"):
        outcomes([], "old", "old")


def test_a_plan_is_quick_and_small_effects_still_fit() -> None:
    small = plan(0.02, 0.05, 0.8, 0.2)
    assert (
        isinstance(small, ABPlan)
        and small.fixed == 6130
        and small.fixed < small.pairs < 1.5 * small.fixed
    )
