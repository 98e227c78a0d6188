"""Reward models looked at: shares by hand, calibration of models that are and aren't, best-of-n
against every subset, laws from their own points, agreement.
"""

import itertools
import math

import numpy as np
import pytest

from eval.rewards.accuracy import PRIOR_SETS, SECTIONS, Judgements, accuracy
from eval.rewards.best_of import best_of_n, chances, kl_of_best, powers_of_two
from eval.rewards.calibration import best_temperature, calibrated, calibration, halves
from eval.rewards.ensembles import ensemble
from eval.rewards.fitting import Law, fit_draws, fit_points
from eval.rewards.sections import accuracy_section, shown
from eval.statistics import share_by_group, wilson

# --- accuracy


def judgements(outcomes: dict[str, list[float]]) -> Judgements:
    margins, subsets = [], []
    for subset, values in outcomes.items():
        margins += values
        subsets += [subset] * len(values)
    return Judgements(margins, [str(i) for i in range(len(margins))], subsets)


def test_published_weights_are_rewardbenchs() -> None:
    """Figures of rewardbench 0.1.4 (EXAMPLE_COUNTS, SUBSET_MAPPING)."""
    sizes = {title: sum(weights.values()) for title, weights in SECTIONS.items()}
    assert sizes == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968, PRIOR_SETS: 4}
    assert sum(len(weights) for weights in SECTIONS.values()) == 27


def test_accuracy_by_hand() -> None:
    """Safety: 100 and 154 published pairs, accuracies 1 and 1/2; Chat 3/4; prior sets 0."""
    given = judgements(
        {
            "refusals-dangerous": [1.0, 2.0],
            "xstest-should-refuse": [1.0, -1.0],
            "alpacaeval-easy": [1.0, 0.0],
            "shp": [-1.0],
            "": [0.5],
            "mine": [-3.0],
        }
    )
    found = accuracy(given, resamples=100, seed=0)
    assert (found.pairs, found.ties) == (9, 1)
    assert found.overall.estimate == pytest.approx(5.5 / 9)
    sections = {title: interval.estimate for title, interval in found.sections.items()}
    safety = (100 * 1 + 154 * 0.5) / 254
    assert sections == pytest.approx({"Chat": 0.75, "Safety": safety, PRIOR_SETS: 0.0})
    assert found.score is not None
    assert found.score.estimate == pytest.approx((0.75 + safety + 0.5 * 0) / 2.5)
    assert found.subsets["mine"].estimate == 0.0 and "" not in found.subsets
    assert len(found.missing) == 20 and "donotanswer" in found.missing
    part = accuracy_section({"a": found}, ["Two rows were left out."])
    assert "Two rows were left out." in part.text and "20 of 23 published subsets" in part.text[-1]
    assert part.figures["eval/a/section/safety"] == pytest.approx(safety)
    with pytest.raises(ValueError, match="at least one pair"):
        accuracy(Judgements([], [], []), resamples=1, seed=0)


def test_pairs_of_one_prompt_are_resampled_together() -> None:
    """Ten copies of each pair tell no more than the pair."""
    one = [(str(i), float(i % 2), 1.0) for i in range(50)]
    single = share_by_group(one, resamples=2000, seed=0)
    tenfold = share_by_group(one * 10, resamples=2000, seed=0)
    assert single is not None and single == tenfold
    assert share_by_group([], resamples=10, seed=0) is None
    assert wilson(1.0, 60).low == pytest.approx(60 / (60 + 1.96**2), abs=1e-3)
    assert shown(None) == "none"


# --- calibration


def drawn(scale: float, count: int, seed: int) -> list[float]:
    """Margins of a model whose log-odds are `scale` times the true ones."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(0, 1.5, count)
    won = rng.random(count) < 1 / (1 + np.exp(-odds))
    return list(np.where(won, odds, -odds) * scale)


@pytest.mark.parametrize("scale", [1.0, 3.0, 0.3])
def test_calibrated_and_overconfident_scores(scale: float) -> None:
    margins = drawn(scale, 8000, 1)
    found = calibrated(margins, [str(i) for i in range(8000)], bins=10, resamples=100, seed=0)
    assert found is not None
    plain, tempered = found.plain, found.tempered
    assert tempered.temperature == pytest.approx(scale, rel=0.1)
    assert tempered.ece.estimate < 2 * tempered.ece_by_chance
    assert tempered.log_loss.estimate <= plain.log_loss.estimate + 0.002
    if scale == 1.0:
        assert plain.ece.estimate < 0.035 and plain.ece_by_chance == pytest.approx(0.014, abs=0.007)
    elif scale == 3.0:  # surer than right, in every bin
        assert plain.ece.low > 0.1 and tempered.brier.estimate < plain.brier.low
        assert all(one.confidence > one.right.estimate for one in plain.bins[5:])
    else:
        assert plain.ece.low > 0.08
        assert all(one.confidence < one.right.high for one in plain.bins)


def test_calibration_by_hand() -> None:
    """Confidence 0.75 (log 3) four times, two of them right; 0.95 (log 19) once, right."""
    margins = [math.log(3)] * 2 + [-math.log(3)] * 2 + [math.log(19)]
    found = calibration(margins, 1.0, bins=5, resamples=10, seed=0)
    assert found.ece.estimate == pytest.approx((4 * 0.25 + 1 * 0.05) / 5)
    assert found.brier.estimate == pytest.approx((2 * 0.0625 + 2 * 0.5625 + 0.0025) / 5)
    losses = 2 * math.log(0.75) + 2 * math.log(0.25) + math.log(0.95)
    assert found.log_loss.estimate == pytest.approx(-losses / 5)
    assert [(one.count, one.low) for one in found.bins] == [(4, 0.7), (1, 0.9)]
    tie = calibration([0.0], 1.0, bins=5, resamples=10, seed=0)
    assert tie.ece.estimate == 0.0 and tie.brier.estimate == 0.25


def test_a_temperature_without_bound_says_so() -> None:
    assert best_temperature([1.0, 2.0])[1] and best_temperature([-1.0, -2.0])[1]
    temperature, bound = best_temperature([1.0, 1.0, -1.0])
    assert not bound and temperature == pytest.approx(1 / math.log(2), rel=1e-3)
    one, other = halves(["a", "a", "b", "b", "c"], 0)
    assert sorted(one + other) == [0, 1, 2, 3, 4]
    assert {*one} & {0, 1} in ({0, 1}, set())  # a prompt is on one side
    assert calibrated([1.0], ["a"], bins=5, resamples=5, seed=0) is None


# --- best of n


@pytest.mark.parametrize("ties", [False, True])
def test_best_of_n_is_the_mean_over_all_subsets(ties: bool) -> None:
    rng = np.random.default_rng(4)
    proxy = rng.normal(size=7).round(0 if ties else 9)
    judge = rng.normal(size=7)
    for n in range(1, 8):
        of_proxy, of_judge = [], []
        for subset in itertools.combinations(range(7), n):
            best = max(proxy[i] for i in subset)
            of_proxy.append(best)
            of_judge.append(np.mean([judge[i] for i in subset if proxy[i] == best]))
        weights = chances(list(proxy), n)
        assert weights.sum() == pytest.approx(1.0)
        assert weights @ proxy == pytest.approx(np.mean(of_proxy))
        if not ties:
            assert weights @ judge == pytest.approx(np.mean(of_judge))
    with pytest.raises(ValueError, match="between 1 and 7"):
        chances(list(proxy), 8)


def test_equal_proxies_share_their_chances() -> None:
    assert chances([1.0, 1.0, 1.0, 1.0], 3) == pytest.approx([0.25] * 4)
    assert chances([0.0, 2.0, 2.0], 2) == pytest.approx([0.0, 0.5, 0.5])


def test_the_curve_is_a_mean_over_prompts() -> None:
    curve = best_of_n(
        [[0.0, 1.0], [5.0, 3.0, 4.0]], [[1.0, 0.0], [0.0, 0.0, 6.0]], resamples=50, seed=0
    )
    assert curve.n == (1, 2) and curve.prompts == 2
    assert curve.kl == pytest.approx((0.0, math.log(2) - 0.5))
    assert [one.estimate for one in curve.proxy] == pytest.approx([2.25, (1 + 14 / 3) / 2])
    assert [one.estimate for one in curve.judge] == pytest.approx([1.25, (0 + 2) / 2])
    assert powers_of_two(6) == (1, 2, 4, 6) and powers_of_two(1) == (1,)
    assert kl_of_best(1) == 0.0


# --- laws


@pytest.mark.parametrize("law", list(Law))
def test_a_law_is_found_in_its_own_points(law: Law) -> None:
    alpha, beta, start = 0.9, 0.25, -0.4
    rng = np.random.default_rng(5)
    kl = np.linspace(0.0, 12.0, 60)
    d = np.sqrt(kl)
    bend = d if law is Law.best_of_n else np.log(np.maximum(d, 1e-9))
    exact = start + d * (alpha - beta * bend)
    noisy = exact + rng.normal(0, 0.02, len(kl))
    found = fit_points(law, list(kl), list(noisy))
    assert found is not None and found.explained > 0.95
    assert found.alpha.low < alpha < found.alpha.high and found.beta.low < beta < found.beta.high
    assert found.alpha.estimate == pytest.approx(alpha, abs=0.05)
    assert found.beta.estimate == pytest.approx(beta, abs=0.03)
    clean = fit_draws(law, list(kl), np.stack([exact, exact, noisy]))
    assert clean is not None
    assert (clean.alpha.estimate, clean.beta.estimate) == pytest.approx((alpha, beta))
    assert clean.start == pytest.approx(start) and clean.at(4.0) == pytest.approx(
        float(np.interp(4.0, kl, exact)), abs=1e-3
    )
    peak = kl[int(np.argmax(exact))] if law is Law.best_of_n else math.exp(2 * (0.9 / 0.25 - 1))
    assert clean.peak_kl == pytest.approx(peak, rel=0.05)


def test_a_curve_that_only_rises_has_no_peak() -> None:
    kl = [0.0, 1.0, 4.0, 9.0, 16.0]
    rising = fit_points(Law.best_of_n, kl, [0.0, 1.0, 2.1, 3.3, 4.6])
    assert rising is not None and rising.peak_kl is None
    assert fit_points(Law.best_of_n, [0.0, 1.0, 1.0, 4.0], [0.0, 1.0, 1.0, 2.0]) is None
    with pytest.raises(ValueError, match="at least 0, found -1"):
        fit_points(Law.best_of_n, [-1.0, 0.0, 1.0, 2.0], [0.0] * 4)


# --- ensembles


def test_agreement_by_hand() -> None:
    """Margins a: 1 2 -1 0, b: 2 1 -2 1."""
    chosen = {"a": [1.0, 2.0, 0.0, 5.0], "b": [3.0, 2.0, 0.0, 6.0]}
    rejected = {"a": [0.0, 0.0, 1.0, 5.0], "b": [1.0, 1.0, 2.0, 5.0]}
    found = ensemble(chosen, rejected)
    (pair,) = found.agreements
    assert pair.models == ("a", "b")
    assert pair.same == (3 + 0.5) / 4 and pair.both_wrong == 0.25
    # concordant: 0-2, 0-3, 1-2, 2-3; discordant: 0-1; tied in b: 1-3
    assert pair.tau == pytest.approx((4 - 1) / math.sqrt(6 * 5))
    assert found.unanimous == 0.75 and found.right_if_unanimous == pytest.approx(2 / 3)
    assert found.mean_accuracy == pytest.approx(0.75)  # b is right where a has a tie
    assert found.spread > 0
    twins = ensemble({"a": [1.0, 2.0], "b": [10.0, 20.0]}, {"a": [0.0, 3.0], "b": [0.0, 30.0]})
    assert twins.spread == pytest.approx(0.0) and twins.right_otherwise is None
    with pytest.raises(ValueError, match="two models"):
        ensemble({"a": [1.0]}, {"a": [0.0]})
