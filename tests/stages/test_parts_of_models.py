"""Stages that train parts of a model, or one block after the other: what is frozen stays to the
bit, with weight decay too; what is written by hand is what happens.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf.checks.memory import shapes
from rlhf.cli import config
from rlhf.process import checkpoints
from rlhf.run.context import RunContext
from rlhf.stages import rows as stage_rows
from rlhf.types import UserError
from tests import toys
from tests.checking import check
from tests.offline import trl_tools
from tests.stages.test_methods import CELLS

pytestmark = pytest.mark.usefixtures("one_thread")

TOP = ["stage.train.layers=1", "stage.weight_decay=0.5"]
DECAY = ["stage.weight_decay=0.5", "stage.scheduler=constant", "stage.warmup_ratio=0"]
REST = [(cell, options) for cell in CELLS for options in ("top", "unfreeze")]
COVERING = [("reward", "top"), ("sft", "unfreeze"), ("hf", "top")]
CASES = {
    "top": TOP,
    "unfreeze": [*DECAY, "stage.unfreeze.every=1", "stage.depth_decay=0.5"],
}
Run = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path, tiny_model: Callable[..., Path]) -> Run:
    """run(cell, name, *options) -> the directory of a finished run."""
    trl_tools.write_rows(tmp_path / "sft.jsonl", trl_tools.sft_rows(20))
    trl_tools.write_rows(tmp_path / "pairs.jsonl", trl_tools.pair_rows(20))
    toys.write_jsonl(tmp_path / "prompts.jsonl", toys.prompt_rows())

    def go(cell: str, name: str, *options: str, untied: bool = False) -> Path:
        stage, module, usual, rows = CELLS[cell]
        given = [f"stage={stage}", f"run.dir={tmp_path}", f"run.name={name}"]
        base = tiny_model(tied=not untied)
        given += [f"model.path={base}", f"data.path={tmp_path / rows}"]
        cfg = config.compose([*given, *usual, *options])
        check(cfg)
        ctx = RunContext.open(cfg)
        importlib.import_module(f"rlhf.stages.{module}").run(ctx, stage_rows)
        return ctx.dir

    return go


def weights(directory: Path) -> dict[str, torch.Tensor]:
    (file,) = directory.glob("*.safetensors")
    return load_file(file)


def changed(found: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> set[str]:
    """The tensors that are other bits than at the start."""
    return {name for name, t in found.items() if name in start and not torch.equal(t, start[name])}


@pytest.mark.parametrize(
    ("cell", "case"),
    [
        *COVERING,
        *(pytest.param(*c, marks=pytest.mark.full) for c in REST if c not in COVERING),
    ],
)
def test_what_is_frozen_stays_to_the_bit(
    run: Run, tiny_model: Callable[..., Path], cell: str, case: str
) -> None:
    directory = run(cell, case, *CASES[case])
    start = weights(tiny_model())
    moved = changed(weights(directory / "model"), start)
    top = {name for name in start if name.startswith("model.layers.1.")}
    below = {name for name in start if name.startswith("model.layers.0.")}
    if case == "top":
        assert moved == top
    else:  # the second of two steps trains the lower block too, none the embedding
        assert moved == top | below | {"model.norm.weight"}


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    return trl_tools.metric_lines(directory)


def test_a_stalled_loss_unfreezes_and_a_resumed_run_goes_on_to_the_bit(run: Run) -> None:
    """Improvements below min_improvement are none, so every evaluation is a stall."""
    options = [*DECAY, "stage.unfreeze.patience=1", "stage.steps=4", "stage.eval_steps=1"]
    options += ["stage.min_improvement=100", "run.keep_checkpoints=0"]
    whole = run("sft", "whole", *options)
    lines = [line for line in metrics_of(whole) if "train/unfreezings" in line]
    assert [line["train/unfreezings"] for line in lines] == [0.0, 1.0, 2.0, 2.0]
    broken = run("sft", "broken", *options)
    for path in (broken / "checkpoints").glob("checkpoint-[34]"):
        for file in sorted(path.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        path.rmdir()
    (broken / "summary.json").unlink()
    run("sft", "broken", *options, "run.resume=true")
    last = "checkpoints/checkpoint-4"
    found, expected = weights(broken / last), weights(whole / last)
    assert checkpoints.problem(broken / last) is None
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("cell", ["sft", "hf"])
def test_recomputed_activations_change_nothing(run: Run, cell: str) -> None:
    """Under a frozen embedding no input of a block needs a gradient."""
    plain = weights(run(cell, "plain", *TOP) / "model")
    again = weights(run(cell, "again", *TOP, "engine.gradient_checkpointing=true") / "model")
    for name, tensor in plain.items():
        torch.testing.assert_close(again[name], tensor, atol=1e-6, rtol=0, msg=name)


def test_other_parts_than_a_checkpoints_are_refused(run: Run) -> None:
    run("sft", "parts", *TOP)
    with pytest.raises(UserError, match=r"stage\.train\.layers=1, but this run has.*layers=2"):
        run("sft", "parts", "stage.train.layers=2", TOP[1], "run.resume=true")


def test_an_untied_head_trains_alone(run: Run, tiny_model: Callable[..., Path]) -> None:
    directory = run("sft", "head", "stage.train.modules=[head]", untied=True)
    found = weights(directory / "model")
    assert changed(found, weights(tiny_model(tied=False))) == {"lm_head.weight"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["adapter=lora", "stage.train.layers=1"], "adapter=lora trains beside a frozen model"),
        (["adapter=lora", "stage.depth_decay=0.5"], "adapter=lora trains beside a frozen model"),
        (["stage.train.layers=3"], "the model has 2 blocks"),
        (["stage.train.modules=[nose]"], "nothing in the model is named 'nose'"),
        (["stage.train.modules=[lm_head]"], "weight is that of model.embed_tokens too"),
    ],
)
def test_it_is_refused_before_weights_load(
    run: Run, monkeypatch: pytest.MonkeyPatch, options: list[str], words: str
) -> None:
    monkeypatch.setattr("rlhf.stages.sft.load_causal_lm", None)
    with pytest.raises(UserError, match=words):
        run("sft", "refused", *options)


def test_an_online_stage_has_no_loss_that_stalls(run: Run) -> None:
    with pytest.raises(UserError, match=r"stage\.unfreeze\.patience=1: stage=grpo has no"):
        run("hf", "refused", "stage.unfreeze.patience=1")


@pytest.mark.parametrize(("classifier", "extra"), [(False, 0), (True, 64)])
def test_the_memory_plan_counts_what_trains(
    tiny_model: Callable[..., Path], classifier: bool, extra: int
) -> None:
    cfg = config.compose(["stage=sft", f"model.path={tiny_model()}", *TOP])
    shape = shapes.read_shape(cfg.model)
    found = shapes.trained_parts(shape, cfg.stage.train, classifier=classifier)
    start = weights(tiny_model())
    block = sum(t.numel() for name, t in start.items() if name.startswith("model.layers.1."))
    assert (found.parameters, found.layers, found.head) == (block + extra, 1, False)


def test_a_score_trains_alone(run: Run, tiny_model: Callable[..., Path]) -> None:
    directory = run("reward", "score", "stage.train.layers=0")
    found, start = weights(directory / "model"), weights(tiny_model())
    assert set(found) - set(start) == {"score.weight"} and changed(found, start) == set()
    lines = metrics_of(directory)
    assert lines[-1]["eval_loss"] != lines[0]["eval_loss"], "a score that stands still would pass"
