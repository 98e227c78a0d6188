"""A resumed run with other held-out rows: losses on different rows are not compared."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerState

from conf.schema import ModelConfig, RunConfig
from rlhf.offline.held_out import HeldOutRows, content_hash
from rlhf.offline.steps import KnownCallbacks
from tests import drawing
from tests.offline import trl_tools
from tests.stages.test_sft_stage import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("held_out")


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    """A finished run from scratch."""
    with drawing.on():
        return run(folder, "base")


def test_losses_on_other_held_out_rows_are_not_compared(
    base: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`base` knows the first rows: on the others no step reaches the loss that it has there."""
    start = {"model": ModelConfig(path=str(base / "model"))}
    others = [{**row, "completion": f" bad {row['prompt']}"} for row in trl_tools.sft_rows()]
    before = trl_tools.metric_lines(run(folder, "rows", stage={"steps": 3}, **start))
    again = RunConfig(dir=str(folder / "runs"), name="rows", resume=True)
    place = run(folder, "rows", rows=others, run=again, stage={"patience": 1}, **start)
    assert "checkpoint at step 3, so losses from before don't compare" in caplog.text
    metrics = json.loads((place / "summary.json").read_text())["metrics"]
    assert before[-1]["eval_loss"] < metrics["eval_loss"] < metrics["initial/eval_loss"] - 0.1
    lines = trl_tools.metric_lines(place)
    assert metrics["initial/eval_loss"] == lines[3]["eval_loss"]
    assert metrics["best_step"] == 6
    saved, last = (
        load_file(directory / "model.safetensors")
        for directory in (place / "model", place / "checkpoints" / "checkpoint-6")
    )
    assert all(torch.equal(saved[name], tensor) for name, tensor in last.items())


@pytest.mark.parametrize("loss", [5.0, float("nan")])
def test_the_checkpoint_itself_is_the_best_so_far(tmp_path: Path, loss: float) -> None:
    before = TrainerState(global_step=3, best_metric=1.0, best_global_step=2)
    before.stateful_callbacks = {"HeldOutRows": HeldOutRows("a").state()}
    held_out, args = HeldOutRows("b"), SimpleNamespace(output_dir=str(tmp_path))
    held_out.on_train_begin(args, before, None)
    assert args.eval_on_start and held_out.since == 3 and before.best_metric is None
    held_out.on_evaluate(args, before, None, metrics={"eval_loss": loss})
    best = (before.best_metric, before.best_global_step, before.best_model_checkpoint)
    expected = (loss, 3, str(tmp_path / "checkpoint-3"))
    assert best == (expected if loss == 5.0 else (None, None, None))
    held_out.on_evaluate(args, before, None, metrics={"eval_loss": 0.1})
    assert best == (before.best_metric, before.best_global_step, before.best_model_checkpoint)


def test_a_hash_is_of_what_the_loss_depends_on() -> None:
    row: dict[str, Any] = {"input_ids": [1, 2], "labels": [1, 2], "weight": 1.0, "place": "a"}

    def hashed(**changes: Any) -> str:
        return content_hash(Dataset.from_list([row, {**row, **changes}]))

    same = hashed()
    assert hashed(place="b") == same
    assert len({same, hashed(input_ids=[1, 3]), hashed(labels=[1]), hashed(weight=0.5)}) == 4


def test_a_checkpoint_from_before_a_callback_was_there() -> None:
    """transformers looks for its state in the checkpoint's before it writes one."""
    held_out, state = HeldOutRows("a"), TrainerState(global_step=3, best_metric=1.0)
    for callback in (held_out, KnownCallbacks([held_out, KnownCallbacks([])])):
        callback.on_train_begin(None, state, None)
    assert state.stateful_callbacks == {"HeldOutRows": held_out.state()}
    assert held_out.since == 0 and state.best_metric == 1.0, "nothing is known to have changed"
