"""stage.optimizer in whole runs: SFT on TRL's trainer learns by it, and a run that stopped goes on
to the same weights.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conf.choices import EngineKind
from conf.schedule import OptimizerKind
from conf.schema import EngineConfig, RunConfig
from conf.stages import SFTStage
from rlhf.run.context import RunContext
from rlhf.stages import methods, sft
from rlhf.stages import rows as stage_rows
from rlhf.types import UserError
from tests.offline import trl_tools

STAGE: dict[str, Any] = {
    "steps": 6,
    "batch_size": 8,
    "eval_steps": 3,
    "max_length": 32,
    "learning_rate": 2e-3,
    "warmup_ratio": 0.0,
}


def context(folder: Path, name: str, kind: OptimizerKind, **groups: Any) -> RunContext:
    methods.register()
    stage = SFTStage(**STAGE, optimizer=kind)
    cfg = trl_tools.config(stage, folder, name, trl_tools.sft_rows(), **groups)
    return RunContext.open(cfg)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model" / "model.safetensors")


@pytest.mark.full
@pytest.mark.parametrize(
    "kind", [OptimizerKind.adamw_8bit, OptimizerKind.adafactor, OptimizerKind.muon]
)
def test_a_run_learns_and_goes_on_as_if_never_stopped(kind: OptimizerKind, tmp_path: Path) -> None:
    whole = context(tmp_path, "whole", kind)
    sft.run(whole, stage_rows)
    losses = trl_tools.losses(whole.dir)
    assert losses[-1] < losses[0] - 0.1
    stopped = context(tmp_path, "stopped", kind)
    log = stopped.tracker.log

    def stop_at_five(step: int, metrics: Any) -> None:
        if step == 5:
            raise KeyboardInterrupt
        log(step, metrics)

    stopped.tracker.log = stop_at_five  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        sft.run(stopped, stage_rows)
    again = RunConfig(dir=str(tmp_path / "runs"), name="stopped", resume=True)
    resumed = context(tmp_path, "stopped", kind, run=again)
    sft.run(resumed, stage_rows)
    expected, found = weights(whole.dir), weights(resumed.dir)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0, msg=name)


def test_zero_is_refused_before_weights_load(tmp_path: Path) -> None:
    zero = EngineConfig(kind=EngineKind.deepspeed, zero_stage=1)
    stage = SFTStage(**STAGE, optimizer=OptimizerKind.lion)
    cfg = trl_tools.config(stage, tmp_path, "zero", trl_tools.sft_rows(), engine=zero)
    with pytest.raises(UserError, match=r"stage\.optimizer=lion"):
        sft.check(cfg)
