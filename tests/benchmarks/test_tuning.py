"""The comparison of ways to fine-tune: it has every preset, and its parts work on a tiny model."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.tuning import page, worker
from benchmarks.tuning.cases import CASES, Case
from rlhf.cli import config, presets

ROWS = [worker.Row(list(range(40 + i, 50 + i)), i % 2) for i in range(24)]
TASK = worker.Task(ROWS[:16], ROWS[16:], (7, 9), 2)


def result(loss: float, start: float = 1.5) -> dict[str, Any]:
    run = {
        "loss": loss,
        "accuracy": 0.75,
        "step_s": 0.5,
        "peak_mib": 900.0,
        "trained": 1000,
        "total": 100_000,
    }
    runs = [run, {**run, "loss": loss + 0.2, "peak_mib": 950.0}]
    return {"name": "lora", "rate": 1e-3, "runs": runs, "start": {**run, "loss": start}}


def test_every_preset_is_compared() -> None:
    compared = {item for case in CASES.values() for item in case.overrides}
    names = {path.stem for path in (presets.CONF_DIR / "adapter").glob("*.yaml")} - {"none"}
    assert {f"adapter={name}" for name in names} <= compared


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_run_trains_what_its_case_says(name: str, tiny_model: Callable[..., Path]) -> None:
    cfg = config.compose(
        ["stage=sft", f"model.path={tiny_model()}", "model.dtype=float32", *CASES[name].overrides]
    )
    torch.manual_seed(0)
    start = worker.Run(cfg, TASK, seed=0).evaluate(0.0)
    trainer = worker.Trainer(cfg, TASK, one_start=False)
    trained = trainer.train(1e-2, seed=0, steps=12, held_out=8)
    assert trained.loss < start.loss and trained.step_s > 0
    assert trained.peak_mib > 0 and trained.total == start.total
    assert (trained.trained == trained.total) is (name == "full")


def test_a_start_that_is_kept_is_the_same_every_time(tiny_model: Callable[..., Path]) -> None:
    case = CASES["pissa"]
    assert case.one_start
    cfg = config.compose(
        ["stage=sft", f"model.path={tiny_model()}", "model.dtype=float32", *case.overrides]
    )
    trainer = worker.Trainer(cfg, TASK, one_start=True)
    first, other, again = (trainer.train(1e-2, seed, steps=3, held_out=8) for seed in (0, 1, 0))
    assert first.loss == again.loss != other.loss


def test_the_page_has_means_ranges_and_the_untrained_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "PAGE", tmp_path / "tuning.md")
    monkeypatch.setattr(page, "PICTURE", tmp_path / "tuning.png")
    case = Case((), (1.0, 2.0, 3.0), "low rank")
    monkeypatch.setattr(page, "CASES", {"full": case, "lora": case})
    text = f"# Title\n\n{page.BEGIN}old\n{page.END}\nrest\n"
    page.PAGE.write_text(text, encoding="utf-8")
    page.write({"full": result(1.0), "lora": {**result(0.5), "start": None}})
    lines = page.PAGE.read_text(encoding="utf-8").splitlines()
    assert "old" not in lines and lines[-1] == "rest"
    assert "| untrained | 0 | 0 | - | - | 1.500 | 0.75 | - |" in lines
    row = "| lora | 1,000 | 1 % | 950 | 0.50 | 0.600 (0.500 to 0.700) | 0.75 | 0.001 |"
    assert row in lines
    assert page.PICTURE.stat().st_size > 1000


def test_a_way_that_does_not_beat_the_start_is_seen() -> None:
    start = result(1.0)["start"]
    assert page.beats_start(result(1.3), start) and not page.beats_start(result(1.45), start)


def test_figures_are_plain_values() -> None:
    figures = worker.Figures(1.0, 0.5, 0.1, 10.0, 1, 2)
    assert set(dataclasses.asdict(figures)) == set(result(1.0)["runs"][0])
