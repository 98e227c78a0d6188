"""stage.save_optimizer=false: checkpoints of weights alone, from which no run is resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conf.choices import EngineKind, OnNonFinite
from conf.schema import AdapterConfig, EngineConfig, ModelConfig, RunConfig
from conf.stages import SFTStage
from rlhf.checks.capacity import checkpoint_bytes
from rlhf.checks.memory.shapes import Shapes
from rlhf.run.context import RunContext
from rlhf.stages import rows as stage_rows
from rlhf.stages import sft
from rlhf.types import UserError
from tests.checks.test_memory import SHAPE
from tests.offline import trl_tools
from tests.stages.test_sft_stage import STAGE

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(folder: Path, name: str, stage: dict[str, Any], **groups: Any) -> Path:
    cfg = trl_tools.config(SFTStage(**STAGE | stage), folder, name, trl_tools.sft_rows(), **groups)
    ctx = RunContext.open(cfg)
    sft.run(ctx, stage_rows)
    return ctx.dir


def size_of(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.iterdir())


def test_they_are_smaller_and_the_model_is_the_same(tmp_path: Path) -> None:
    usual = trained(tmp_path, "usual", {})
    alone = trained(tmp_path, "alone", {"save_optimizer": False})
    once, twice = (load_file(run / "model" / "model.safetensors") for run in (usual, alone))
    assert all(torch.equal(once[name], tensor) for name, tensor in twice.items())
    step = f"checkpoints/checkpoint-{STAGE['steps']}"
    assert size_of(alone / step) < 0.6 * size_of(usual / step)
    names = {path.name for path in (alone / step).iterdir()}
    assert not names & {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


def test_they_are_not_resumed_but_a_new_run_starts_on_them(tmp_path: Path) -> None:
    place = trained(tmp_path, "first", {"save_optimizer": False})
    again = RunConfig(dir=str(tmp_path / "runs"), name="first", resume=True)
    checkpoint = place / "checkpoints" / f"checkpoint-{STAGE['steps']}"
    # whatever the option is now: the checkpoint has no optimizer
    with pytest.raises(UserError, match=r"run\.resume=true.*weights alone") as found:
        trained(tmp_path, "first", {"steps": 20}, run=again)
    assert f"model.path={checkpoint}" in str(found.value)
    start = ModelConfig(path=str(checkpoint))
    second = trained(tmp_path, "second", {"steps": 1}, model=start)
    lines = trl_tools.metric_lines(second)
    before = json.loads((place / "summary.json").read_text())["metrics"]
    if before["best_step"] == STAGE["steps"]:
        assert lines[0]["eval_loss"] == pytest.approx(before["eval_loss"], abs=1e-4)


def test_the_disk_is_planned_for_weights() -> None:
    shapes = Shapes(SHAPE())
    given = (EngineKind.torch, AdapterConfig(), 4, shapes)
    usual = checkpoint_bytes(SFTStage(), *given)
    alone = checkpoint_bytes(SFTStage(save_optimizer=False), *given)
    assert alone == 4 * shapes.policy.parameters
    assert usual == 3 * alone


def test_deepspeed_and_rewinds_need_the_optimizer(tmp_path: Path) -> None:
    stage = SFTStage(**STAGE, save_optimizer=False)
    engine = EngineConfig(kind=EngineKind.deepspeed, zero_stage=1)
    cfg = trl_tools.config(stage, tmp_path, "zero", trl_tools.sft_rows(), engine=engine)
    with pytest.raises(UserError, match=r"stage\.save_optimizer=false.*engine=torch"):
        sft.check(cfg)
    cfg.engine = EngineConfig()
    cfg.stage.on_nonfinite = OnNonFinite.rewind
    with pytest.raises(UserError, match=r"stage\.save_optimizer=false.*rewind"):
        sft.check(cfg)
