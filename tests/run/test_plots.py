"""Plots follow from the metric names that a run has."""

import json
import math
from pathlib import Path

import pytest
from matplotlib.image import imread

from rlhf.run.plots import FIGURES, collect, running_mean
from tests.drawing import plot_run


def write(directory: Path, rows: list[dict[str, float | None]]) -> None:
    (directory / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8"
    )


def test_an_online_run_has_its_plots(tmp_path: Path) -> None:
    names = [
        "loss/policy",
        "objective/scores",
        "objective/kl",
        "rollout/response_length",
        "time/rollout_s",
        "time/update_s",
        "policy/clipfrac",
    ]
    write(
        tmp_path,
        [{"step": s, "time_s": 1.0 * s, **{n: math.sin(s) + 2 for n in names}} for s in range(60)],
    )
    paths = plot_run(tmp_path)
    assert [p.name for p in paths] == [
        "loss.png",
        "score.png",
        "kl.png",
        "length.png",
        "policy.png",
        "timing.png",
    ]
    for path in paths:
        image = imread(path)
        assert image.shape[0] > 300 and image.shape[1] > 500
        assert image[..., :3].std() > 0.01, "an empty picture"


def test_a_reward_run_has_margins_and_the_evaluations_beside_the_training(tmp_path: Path) -> None:
    write(
        tmp_path,
        [
            {"step": 1, "loss": 0.7, "accuracy": 0.5, "margin": 0.0},
            {"step": 2, "loss": 0.6, "eval_loss": 0.65, "eval_margin": 0.1},
        ],
    )
    assert [p.name for p in plot_run(tmp_path)] == ["loss.png", "margins.png"]


def test_nulls_and_texts_are_left_out() -> None:
    rows = [
        {"step": 1, "time_s": 0.1, "a": None, "b": 1.0, "nonfinite": ["a"]},
        {"step": 2, "time_s": 0.2, "a": 2.0},
    ]
    assert collect(rows) == {"b": ([1], [1.0]), "a": ([2], [2.0])}


def test_a_run_without_metrics_has_no_plots(tmp_path: Path) -> None:
    assert plot_run(tmp_path) == []
    write(tmp_path, [{"step": 1, "time_s": 0.1, "unheard_of": 1.0}])
    assert plot_run(tmp_path) == [] and not (tmp_path / "plots").exists()


def test_a_steps_total_is_not_stacked_on_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    drawn: list[list[str]] = []
    original = Axes.stackplot

    def stackplot(self: Axes, *args: object, **options: object) -> object:
        drawn.append(list(options["labels"]))  # type: ignore[call-overload]
        return original(self, *args, **options)

    monkeypatch.setattr(Axes, "stackplot", stackplot)
    write(
        tmp_path,
        [
            {"step": s, "time/rollout_s": 1.0, "time/sync_s": 0.1, "time/step_s": 1.1}
            for s in (1, 2)
        ],
    )
    plot_run(tmp_path)
    assert drawn == [["rollout", "sync"]]


def test_running_mean() -> None:
    assert running_mean([1.0, 2.0, 3.0, 10.0], 2) == [1.0, 1.5, 2.5, 6.5]
    assert running_mean([], 3) == []


def test_no_two_figures_write_the_same_file() -> None:
    assert len({f.file for f in FIGURES}) == len(FIGURES)
