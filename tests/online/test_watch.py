"""What the watch computes and when its rules ring."""

import contextlib
import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.choices import Action, Rule
from conf.stages import WatchConfig
from rlhf.online.metrics import correlation, markup_share
from rlhf.online.watch import HeldOutScores, Point, Trend, Watch, response_statistics, trend
from rlhf.run.plots import plot_frontier
from rlhf.types import Prompt, Rollout, Scores
from tests.drawing import plot_run


def rollout(prompt: str, tokens: int, text: str = "ab", finished: bool = True) -> Rollout:
    return Rollout(
        Prompt(prompt, prompt, (1,)),
        text,
        [7] * tokens,
        [0.0] * tokens,
        "stop" if finished else "length",
        0,
    )


def judgement(scores: Sequence[float], proxies: Sequence[float]) -> HeldOutScores:
    return HeldOutScores(list(scores), list(proxies), [4] * len(scores), [False] * len(scores))


def metrics(
    kl: float = 1.0, truncated: float = 0.0, entropy: float = 2.0, score: float = 0.0
) -> dict[str, float]:
    return {
        "objective/kl": kl,
        "objective/scores": score,
        "reward/truncated": truncated,
        "objective/entropy": entropy,
    }


finite = st.floats(-1e3, 1e3, allow_nan=False, width=32)


@given(st.lists(st.tuples(finite, finite), min_size=2, max_size=40))
def test_correlation_is_numpys(pairs: list[tuple[float, float]]) -> None:
    x, y = zip(*pairs, strict=True)
    found = correlation(x, y)
    assert -1.0 - 1e-12 <= found <= 1.0 + 1e-12
    assert found == pytest.approx(correlation(y, x), abs=1e-12)
    if np.std(x) > 1e-3 and np.std(y) > 1e-3:
        assert found == pytest.approx(float(np.corrcoef(x, y)[0, 1]), abs=1e-6)


def test_correlation_by_hand_and_of_what_never_varies() -> None:
    # deviations (-1, 0, 1) and (-1, -1, 2): covariance 3, norms sqrt(2) and sqrt(6)
    assert correlation([1.0, 2.0, 3.0], [1.0, 1.0, 4.0]) == pytest.approx(3 / math.sqrt(12))
    assert correlation([1.0, 2.0], [5.0, 3.0]) == pytest.approx(-1.0)
    assert correlation([0.8, 0.8, 0.8], [7.6, 4.2, 2.6]) == 0.0, (
        "exactly, although rounding gives the deviations a sign"
    )
    assert correlation([1.0, 2.0, 3.0], [0.7, 0.7, 0.7]) == 0.0
    assert correlation([1.0], [2.0]) == 0.0
    assert correlation([0.0, 1e-320], [0.0, 1.0]) == 0.0


def test_markup_share_counts_what_is_neither_word_nor_space() -> None:
    assert markup_share("**a b**") == pytest.approx(4 / 7)
    assert markup_share("plain text 42") == markup_share("") == 0.0
    assert markup_share("größer") == 0.0


def test_statistics_of_a_step_by_hand() -> None:
    rollouts = [
        rollout("p", 1, "a"),
        rollout("p", 3, "a!", finished=False),
        rollout("q", 2, "bb"),
        rollout("q", 2, "bb"),
    ]
    scores = Scores([1.0, 3.0, 2.0, 2.0], {})
    assert response_statistics(rollouts, scores) == pytest.approx(
        {
            "reward/length_correlation": 1.0,
            # deviations (-1, 1, 0, 0) and (1/4, -3/4, 1/4, 1/4): -1 / sqrt(2 * 3/4)
            "reward/finished_correlation": -math.sqrt(2 / 3),
            "reward/format_correlation": math.sqrt(2 / 3),
            "reward/truncated": 0.25,
            "group/std": 0.5,  # (1 + 0) / 2
            "group/gain": 0.5,
        }
    )


def test_groups_of_several_sizes_whose_responses_are_not_side_by_side() -> None:
    found = response_statistics(
        [rollout(name, 1) for name in "abaca"], Scores([0.0, 5.0, 3.0, 5.0, 3.0], {})
    )
    # a: (0, 3, 3), of standard deviation sqrt(2); b and c are alone
    assert found["group/std"] == pytest.approx(math.sqrt(2) / 3)
    assert found["group/gain"] == pytest.approx(1 / 3)


@settings(max_examples=50)
@given(st.integers(1, 5), st.integers(0, 2**32))
def test_how_responses_are_split_over_ranks_changes_nothing(ranks: int, seed: int) -> None:
    rng = random.Random(seed)
    rollouts = [
        rollout(
            rng.choice("pqr"),
            rng.randint(1, 9),
            rng.choice(["a", "a!", "*b* c"]),
            rng.random() < 0.7,
        )
        for _ in range(12)
    ]
    scores = [rng.gauss(0, 1) for _ in rollouts]
    order = rng.sample(range(12), 12)
    cuts = [0, *sorted(rng.randint(0, 12) for _ in range(ranks - 1)), 12]

    def figures(rows: Sequence[int], gather: Any) -> dict[str, float]:
        return response_statistics(
            [rollouts[i] for i in rows], Scores([scores[i] for i in rows], {}), gather=gather
        )

    shares = [order[a:b] for a, b in itertools.pairwise(cuts)]
    sent: list[Any] = []
    for share in shares:
        with contextlib.suppress(_Sent):
            figures(share, lambda mine: send(sent, mine))
    whole = figures(range(12), lambda mine: [mine])
    for share in shares:
        assert figures(share, lambda _: sent) == whole, "on every rank, to the last bit"


class _Sent(Exception):
    """A rank's part is known; the rest of its work waits for the others'."""


def send(box: list[Any], mine: Any) -> Any:
    box.append(mine)
    raise _Sent


def test_a_trend_is_the_mean_of_the_prompts_slopes_and_their_standard_error() -> None:
    # steps 0, 10, 20: the slope is (last - first) / 20: 0.1, 0.2, 0.3
    found = trend([0, 10, 20], [[0.0, 1.0, 5.0], [9.0, 2.0, 5.0], [2.0, 5.0, 11.0]])
    assert found.slope == pytest.approx(0.2)
    assert found.error == pytest.approx(0.1 / math.sqrt(3))
    assert found.errors == pytest.approx(2 * math.sqrt(3))
    assert trend([0, 10, 25], [[0.7, 0.7]] * 3) == Trend(0.0, 0.0), (
        "exactly, although rounding gives the slopes a sign"
    )
    assert Trend(0.0, 0.0).errors == 0.0
    assert Trend(-1.0, 0.0).errors == -math.inf


def test_divergence_needs_both_trends_beyond_their_noise() -> None:
    cfg = WatchConfig(divergence=Action.stop, divergence_sd=2.0, divergence_judgements=3)

    def ring(judge: list[list[float]], proxy: list[list[float]]) -> list[Any]:
        watch = Watch(cfg)
        return [
            alarm
            for i, (j, p) in enumerate(zip(judge, proxy, strict=True))
            for alarm in watch.judged(10 * i, judgement(j, p))
        ]

    rising, falling, flat = (
        [[1.0, 2.0], [2.0, 3.1], [3.0, 4.0]],
        [[5.0, 5.0], [4.0, 4.2], [3.0, 3.1]],
        [[1.0, 1.0]] * 3,
    )
    alarms = ring(falling, rising)
    assert [(a.rule, a.action, a.step) for a in alarms] == [(Rule.divergence, Action.stop, 20)]
    assert (
        "steps 0, 10, 20" in alarms[0].message
        and "rose by 0.1 a step" in alarms[0].message
        and "highest at step 0" in alarms[0].message
    )
    assert (
        ring(rising, rising)
        == ring(falling, flat)
        == ring(falling, falling)
        == ring(flat, rising)
        == []
    )
    assert ring(falling[:2], rising[:2]) == [], "two judgements are too few here"
    cfg.divergence_sd = 0.0
    assert ring(flat, rising) == ring(falling, flat) == [], (
        "what stays is no trend, however little is asked"
    )
    cfg.divergence_sd = 2.0
    # slopes -0.2 and +0.15: falls on average, within its noise
    noisy = [[5.0, 1.0], [4.0, 2.0], [1.0, 4.0]]
    assert ring(noisy, rising) == []


def test_a_rule_rings_once_and_again_only_after_it_stopped_holding() -> None:
    watch = Watch(WatchConfig(kl=Action.warn, kl_max=10.0))
    rung = [
        bool(watch.observe(step, metrics(kl)))
        for step, kl in enumerate([9.0, 11.0, 12.0, 10.0, 10.1, 10.2], start=1)
    ]
    assert rung == [False, True, False, False, True, False]


def test_length_looks_at_a_whole_window() -> None:
    watch = Watch(WatchConfig(window=3, length=Action.warn, length_share=0.75))
    shares = [1.0, 1.0, 0.0, 0.5, 1.0, 0.5]  # means of three: 2/3, 1/2, 1/2, 2/3
    assert [
        bool(watch.observe(i, metrics(truncated=s))) for i, s in enumerate(shares, start=1)
    ] == [False] * 6
    alarms = watch.observe(7, metrics(truncated=0.75))
    assert [(a.rule, a.step) for a in alarms] == [
        (Rule.length, 7)
    ] and "75% of the responses of the last 3 steps" in alarms[0].message


def test_entropy_is_held_against_the_first_steps() -> None:
    watch = Watch(WatchConfig(window=2, entropy=Action.stop, entropy_share=0.5))
    entropies = [3.0, 1.0, 1.0, 0.99]  # the first two: mean 2
    rung = [watch.observe(i, metrics(entropy=e)) for i, e in enumerate(entropies, start=1)]
    assert (
        [bool(r) for r in rung] == [False, False, False, True]
        and rung[3][0].rule is Rule.entropy
        and rung[3][0].action is Action.stop
    )


def test_a_rule_that_is_off_never_rings() -> None:
    off = WatchConfig(
        window=1,
        kl_max=1.0,
        divergence=Action.off,
        kl=Action.off,
        length=Action.off,
        entropy=Action.off,
        divergence_judgements=2,
    )
    watch = Watch(off)
    assert (
        watch.observe(1, metrics())
        == watch.observe(2, metrics(kl=9.0, truncated=1.0, entropy=0.0))
        == []
    )
    assert (
        watch.judged(0, judgement([2.0, 2.0], [0.0, 0.0]))
        == watch.judged(9, judgement([1.0, 1.0], [1.0, 1.0]))
        == []
    )


def test_the_frontier_joins_judge_and_score_of_the_same_weights() -> None:
    watch = Watch(WatchConfig())
    watch.judged(0, judgement([1.0, 3.0], [0.0, 0.0]))
    # the rollouts of update 1 come from the weights before it
    watch.observe(1, metrics(kl=0.0, score=5.0))
    watch.observe(2, metrics(kl=0.5, score=6.0))
    watch.judged(2, judgement([2.0, 2.0], [0.0, 0.0]))
    assert list(watch.points.values()) == [
        Point(0, 0.0, 5.0, 2.0),
        Point(1, 0.5, 6.0, None),
        Point(2, None, None, 2.0),
    ]
    assert watch.best_step == 2, "of equal judgements the later"
    watch.judged(4, judgement([1.0, 2.0], [0.0, 0.0]))
    assert watch.best_step == 2
    assert Watch(WatchConfig()).best_step is None


@given(st.integers(1, 11))
@settings(max_examples=11)
def test_going_on_from_a_checkpoint_changes_nothing(cut: int) -> None:
    cfg = WatchConfig(
        window=3,
        kl=Action.warn,
        kl_max=6.0,
        length_share=0.5,
        entropy_share=0.5,
        divergence_judgements=3,
    )

    def feed(watch: Watch, step: int) -> list[Any]:
        out = watch.observe(
            step,
            metrics(
                kl=float(step % 8),
                truncated=(step % 5) / 4,
                entropy=2.0 - step / 8,
                score=float(step),
            ),
        )
        return out + (
            watch.judged(step, judgement([-step, -step - 0.1], [step, step + 0.1]))
            if step % 2 == 0
            else []
        )

    straight, first = Watch(cfg), Watch(cfg)
    expected = [feed(straight, step) for step in range(1, 13)]
    assert sum(map(len, expected)) >= 4
    before = [feed(first, step) for step in range(1, cut + 1)]
    second = Watch(cfg)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + [feed(second, step) for step in range(cut + 1, 13)] == expected
    assert second.state_dict() == straight.state_dict()


def test_more_prompts_after_a_resume_start_a_new_trend() -> None:
    watch = Watch(WatchConfig(divergence_judgements=2))
    watch.judged(0, judgement([9.0, 9.0], [0.0, 0.0]))
    assert watch.judged(2, judgement([5.0, 5.0, 5.0], [1.0, 1.0, 1.0])) == []
    assert len(watch.judged(4, judgement([4.0, 4.0, 4.0], [2.0, 2.0, 2.0]))) == 1


def test_a_judgements_figures() -> None:
    found = HeldOutScores([1.0, 3.0], [2.0, 4.0], [3, 5], [True, False]).metrics()
    assert found == {
        "judge/score": 2.0,
        "judge/score_se": pytest.approx(1.0),
        "judge/proxy": 3.0,
        "judge/length": 4.0,
        "judge/truncated": 0.5,
    }


def test_the_frontier_is_drawn_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes
    from matplotlib.image import imread

    drawn: list[tuple[list[float], list[float]]] = []
    original = Axes.plot
    monkeypatch.setattr(
        Axes,
        "plot",
        lambda self, x, y, **options: (
            drawn.append((list(x), list(y))),
            original(self, x, y, **options),
        )[1],
    )
    points = [Point(i, i / 2, float(i), 1.0 - abs(i - 3) if i % 2 else None) for i in range(8)]
    last = Point(8, None, None, -5.0)  # no rollouts come from the last weights
    assert plot_frontier([last, *points], tmp_path / "plots" / "frontier.png", best=3, stopped=8)
    assert drawn == [
        ([i / 2 for i in range(8)], [float(i) for i in range(8)]),
        ([0.5, 1.5, 2.5, 3.5, 3.5], [-1.0, 1.0, -1.0, -3.0, -5.0]),
    ]
    both = imread(tmp_path / "plots" / "frontier.png")
    assert plot_frontier(
        [Point(p.step, p.kl, p.score) for p in points], tmp_path / "score.png", best=3
    )
    assert both.shape[1] > 1.5 * imread(tmp_path / "score.png").shape[1], (
        "without a judge there is one panel"
    )
    assert both[..., :3].std() > 0.01
    assert (
        not plot_frontier([Point(0, None, None, 2.0)], tmp_path / "none.png")
        and not (tmp_path / "none.png").exists()
    )


def test_correlations_are_not_drawn_among_the_reward_terms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf.run import plots

    drawn: dict[str, list[str]] = {}
    monkeypatch.setattr(
        plots, "_draw", lambda axes, panel, names, series: drawn.update({panel.title: list(names)})
    )
    row = {
        "step": 1,
        "reward/model": 1.0,
        "reward/length_correlation": 0.5,
        "reward/truncated": 0.1,
        "judge/score": 1.0,
        "group/std": 0.2,
    }
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    plot_run(tmp_path)
    assert drawn["Reward terms"] == ["reward/model"]
    assert drawn["The score goes with"] == ["reward/length_correlation"] and drawn[
        "Held-out judge"
    ] == ["judge/score"]


def test_a_step_that_trained_nothing_neither_rings_nor_ends_an_episode() -> None:
    """Dynamic sampling may find no group to train on: there is no KL and no entropy then, which is
    not a collapse.
    """
    watch = Watch(WatchConfig(window=2, kl=Action.warn, kl_max=1.0))
    nothing = {"objective/scores": 0.0, "reward/truncated": 0.0}
    alarms = [
        watch.observe(step, figures)
        for step, figures in enumerate(
            [metrics(kl=2.0), nothing, metrics(kl=2.0), nothing], start=1
        )
    ]
    assert [[alarm.rule for alarm in found] for found in alarms] == [[Rule.kl], [], [], []]
