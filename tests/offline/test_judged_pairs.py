"""What a reward model is worth on held-out pairs, by hand."""

import dataclasses

import numpy as np
import pytest

from rlhf.offline.judged_pairs import (
    Judged,
    bootstrap_interval,
    judgement_metrics,
    length_baseline,
    shown,
)
from rlhf.types import UserError


def test_bootstrap_interval() -> None:
    low, high = bootstrap_interval(0.8, 400, 4000, seed=1)
    # the normal approximation: sd = sqrt(0.8 * 0.2 / 400)
    assert (low, high) == pytest.approx((0.8 - 1.96 * 0.02, 0.8 + 1.96 * 0.02), abs=0.004)
    assert (
        bootstrap_interval(0.8, 400, 4000, seed=1)
        == (low, high)
        != bootstrap_interval(0.8, 400, 4000, seed=2)
    )
    assert bootstrap_interval(1.0, 10, 100, seed=0) == (1.0, 1.0)
    one, resampled = np.array([1, 1, 1, 0, 1, 0, 1, 1]), np.random.default_rng(5)
    plain = np.percentile([resampled.choice(one, 8).mean() for _ in range(4000)], (2.5, 97.5))
    # steps of 1/8
    assert bootstrap_interval(0.75, 8, 4000, seed=3) == pytest.approx(tuple(plain), abs=0.13)


def test_figures_by_hand() -> None:
    judged = Judged(
        np.array([2.0, 1.0, 0.0, 3.0]),
        np.array([1.0, 1.0, 2.0, -1.0]),
        np.array([5, 4, 3, 9]),
        np.array([4, 4, 6, 2]),
    )
    metrics = judgement_metrics(judged, 10, 0)
    assert metrics["eval/accuracy"] == 0.5  # right, a tie, wrong, right
    assert metrics["eval/margin"] == pytest.approx((1 + 0 - 2 + 4) / 4)
    assert (
        metrics["eval/length_baseline"]
        == length_baseline(judged.chosen_tokens, judged.rejected_tokens)
        == (1 + 0.5 + 0 + 1) / 4
    )
    assert metrics["eval/score_mean"] == pytest.approx(9 / 8)
    assert metrics["eval/score_std"] == pytest.approx(
        np.sqrt(np.mean((np.array([2, 1, 0, 3, 1, 1, 2, -1]) - 9 / 8) ** 2))
    )


def test_figures_of_soft_labels_by_hand() -> None:
    judged = Judged(
        np.array([2.0, 1.0, 0.0, 3.0]),
        np.array([1.0, 1.0, 2.0, -1.0]),
        np.array([5, 4, 3, 9]),
        np.array([4, 4, 6, 2]),
        np.array([0.9, 0.5, 0.2, 0.4]),
    )
    metrics = judgement_metrics(judged, 10, 0)
    # right, a tie left out, right the other way, wrong
    assert metrics["eval/accuracy"] == pytest.approx(2 / 3)
    assert metrics["eval/length_baseline"] == pytest.approx((1 + 1 + 0) / 3) and (
        metrics["eval/ties"],
        metrics["eval/pairs"],
    ) == (1, 4)
    off = [abs(1 / (1 + np.exp(-m)) - p) for m, p in ((1, 0.9), (0, 0.5), (-2, 0.2), (4, 0.4))]
    assert metrics["eval/calibration_error"] == pytest.approx(np.mean(off))
    assert "1 ties" in shown(metrics)["held-out pairs"]
    with pytest.raises(UserError, match=r"4 held-out pairs.*soft_label 0.5.*data.eval_path"):
        judgement_metrics(dataclasses.replace(judged, soft_labels=np.full(4, 0.5)), 10, 0)
