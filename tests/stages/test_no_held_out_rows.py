"""data.eval_fraction=0: every row trains, the last weights are the model, and what looks at
held-out rows is refused.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conf.choices import Scheduler
from conf.online import OnlineStage
from conf.run import WatchConfig
from conf.schedule import UnfreezeConfig
from conf.schema import DataConfig, ModelConfig, RunConfig
from conf.stages import EvalStage, RewardStage, SFTStage
from reward.model import read_manifest
from rlhf.run.context import RunContext
from rlhf.stages import eval as evaluation
from rlhf.stages import preference, reward, sft
from rlhf.stages import rows as stage_rows
from rlhf.types import UserError
from tests.offline import trl_tools
from tests.offline.preference_tools import stage_of
from tests.stages.test_reward_stage import STAGE as REWARD
from tests.stages.test_sft_stage import STAGE as SFT

pytestmark = pytest.mark.usefixtures("one_thread")


def all_train(stage: Any, folder: Path, name: str, **groups: Any) -> Any:
    rows = trl_tools.sft_rows() if stage.name == "sft" else trl_tools.pair_rows(48)
    cfg = trl_tools.config(stage, folder, name, rows, **groups)
    cfg.data.eval_fraction = 0.0
    return cfg


def trained(module: Any, cfg: Any) -> tuple[Path, dict[str, Any]]:
    ctx = RunContext.open(cfg)
    module.run(ctx, stage_rows)
    return ctx.dir, json.loads((ctx.dir / "summary.json").read_text())


def check_last_weights(place: Path, last: int) -> None:
    """The model is the last step's, and no line of metrics has a held-out figure."""
    saved = load_file(place / "model" / "model.safetensors")
    end = load_file(place / "checkpoints" / f"checkpoint-{last}" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in end.items())
    for line in trl_tools.metric_lines(place):
        assert not [key for key in line if "eval" in key]


def test_sft(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stage = SFTStage(**SFT | {"steps": 4, "eval_steps": 3})
    caplog.set_level("INFO", "rlhf.stages")
    place, summary = trained(sft, all_train(stage, tmp_path, "last"))
    check_last_weights(place, 4)
    assert "no held-out rows" in caplog.text
    assert summary["weights"] == "the last ones: no held-out rows"
    assert "best_step" not in summary["metrics"] and "loss" in summary["metrics"]
    # a checkpoint where an evaluation would have been
    steps = {path.name for path in (place / "checkpoints").glob("checkpoint-*")}
    assert steps == {"checkpoint-3", "checkpoint-4"}
    assert len((place / "samples.jsonl").read_text().splitlines()) == 4


def test_a_resumed_run_is_one_that_never_stopped(tmp_path: Path) -> None:
    stage = SFTStage(**SFT | {"steps": 4, "save_steps": 2, "scheduler": Scheduler.constant})
    whole, _ = trained(sft, all_train(stage, tmp_path, "whole"))
    stage.steps = 2
    trained(sft, all_train(stage, tmp_path, "halves"))
    stage.steps = 4
    again = RunConfig(dir=str(tmp_path / "runs"), name="halves", resume=True)
    halves, _ = trained(sft, all_train(stage, tmp_path, "halves", run=again))
    once, twice = (load_file(run / "model" / "model.safetensors") for run in (whole, halves))
    assert all(torch.equal(once[name], tensor) for name, tensor in twice.items())


@pytest.mark.parametrize("preset", ["dpo", "kto", "orpo"])
def test_preferences(preset: str, tmp_path: Path) -> None:
    stage = stage_of(preset)
    stage.steps = 2
    place, _ = trained(preference, all_train(stage, tmp_path, preset))
    check_last_weights(place, 2)


def test_a_reward_model_has_no_accuracy(tmp_path: Path) -> None:
    stage = RewardStage(**REWARD | {"steps": 2})
    place, summary = trained(reward, all_train(stage, tmp_path, "unjudged"))
    check_last_weights(place, 2)
    assert not [key for key in summary["metrics"] if key.startswith("eval")]
    manifest = read_manifest(place / "model")
    assert (manifest.score_std, manifest.held_out_texts) == (0.0, 0)
    assert summary["weights"] == "the last ones: no held-out rows"


def test_all_rows_train(tmp_path: Path) -> None:
    cfg = all_train(SFTStage(**SFT), tmp_path, "rows")
    assert len(stage_rows.read_rows(cfg, 8).train) == len(trl_tools.sft_rows())


@pytest.mark.parametrize(
    ("key", "stage"),
    [
        ("stage.patience", SFTStage(**SFT, patience=2)),
        ("stage.scheduler", SFTStage(**SFT | {"scheduler": Scheduler.plateau})),
        ("stage.unfreeze.patience", SFTStage(**SFT, unfreeze=UnfreezeConfig(patience=1))),
        ("stage.watch.judge_path", OnlineStage(name="ppo", watch=WatchConfig(judge_path="judge"))),
    ],
)
def test_what_looks_at_held_out_rows_is_refused(key: str, stage: Any, tmp_path: Path) -> None:
    rows = trl_tools.sft_rows()
    cfg = trl_tools.config(stage, tmp_path, "asks", rows)
    stage_rows.check(cfg)
    cfg.data.eval_fraction = 0.0
    with pytest.raises(UserError, match=rf"{key}=.*data\.eval_fraction=0") as found:
        stage_rows.check(cfg)
    assert "data.eval_path" in str(found.value)
    cfg.data.eval_path = cfg.data.path
    stage_rows.check(cfg)


def test_policies_are_compared_on_held_out_prompts_only(tmp_path: Path) -> None:
    place, _ = trained(sft, all_train(SFTStage(**SFT | {"steps": 1}), tmp_path, "one"))
    stage = EvalStage(before=str(place / "model"), after=str(place / "model"))
    cfg = trl_tools.config(stage, tmp_path, "eval", trl_tools.sft_rows())
    cfg.data = DataConfig(path=cfg.data.path, eval_fraction=0.0)
    cfg.model = ModelConfig(path=str(place / "model"))
    with pytest.raises(UserError, match=r"eval_fraction=0.*data\.eval_path"):
        evaluation.check(cfg)
