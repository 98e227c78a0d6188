"""Mixtures of experts under TRL's trainers: an update does not depend on how a step is split."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from conf.choices import KTOLoss, TrackingKind
from conf.schema import Config, DataConfig, EngineConfig, ModelConfig, RunConfig, TrackingConfig
from conf.stages import CPOStage, KTOStage, OfflineStage, PreferenceStage, SFTStage
from rlhf.run.context import RunContext
from rlhf.stages import preference, sft
from rlhf.stages import rows as stage_rows
from tests.offline import trl_tools
from tests.online.families import tiny_family

SIZES: dict[str, Any] = {
    "steps": 3,
    "batch_size": 8,
    "eval_steps": 2,
    "max_length": 32,
    "learning_rate": 5e-3,
}
STAGES: dict[str, tuple[OfflineStage, str]] = {
    "sft": (SFTStage(**SIZES), "sft"),
    "dpo": (PreferenceStage(**SIZES), "pairs"),
    "kto": (KTOStage(**SIZES, loss=KTOLoss.apo_zero_unpaired), "pairs"),
    "cpo": (CPOStage(**SIZES), "pairs"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, and a tiny OLMoE whose configuration asks for the loss that balances experts."""
    place = tmp_path_factory.mktemp("experts")
    trl_tools.write_rows(place / "sft.jsonl", trl_tools.sft_rows())
    trl_tools.write_rows(place / "pairs.jsonl", trl_tools.pair_rows())
    trl_tools.tiny_tokenizer().save_pretrained(place / "tokenizer")
    asked = {"router_aux_loss_coef": 0.5, "output_router_logits": True}
    tiny_family("olmoe", place / "tokenizer", place / "model", **asked)
    return place


def losses(folder: Path, stage: str, rows: int) -> list[float]:
    settings, data = STAGES[stage]
    cfg = Config(
        stage=settings,
        run=RunConfig(dir=str(folder), name=f"{stage}-{rows}"),
        model=ModelConfig(path=str(folder / "model")),
        engine=EngineConfig(micro_batch_size=rows),
        data=DataConfig(path=str(folder / f"{data}.jsonl"), eval_fraction=0.2),
        tracking=TrackingConfig(kind=TrackingKind.none),
    )
    run: Callable[..., object] = sft.run if stage == "sft" else preference.run
    run(RunContext.open(cfg), stage_rows)
    return trl_tools.losses(folder / cfg.run.name / stage)


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_of_experts_is_the_same_however_it_is_split(folder: Path, stage: str) -> None:
    whole, split = (losses(folder, stage, rows) for rows in (8, 2))
    assert len(whole) == 3 and abs(whole[0] - whole[2]) > 1e-3
    assert split == pytest.approx(whole, abs=1e-5)
    saved = AutoConfig.from_pretrained(folder / f"{stage}-2" / stage / "model")
    assert saved.router_aux_loss_coef == 0.5
