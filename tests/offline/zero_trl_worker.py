"""Run SFT, reward and preference stages under ZeRO on every rank of a torchrun launch, many
configurations in one: `test_zero_trl` starts it.

usage: torchrun ... -m tests.offline.zero_trl_worker SPEC.json where SPEC is {"out", "sft",
"reward", "soft", "dpo", "model", "models", "cases": [[stage, zero_stage or null, adapter], ...]}
"""

import functools
import importlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from conf.choices import AdapterKind, EngineKind, RateCoupling, TrackingKind
from conf.schedule import BatchGrowthConfig, TrainPart, UnfreezeConfig
from conf.schema import (
    AdapterConfig,
    Config,
    DataConfig,
    EngineConfig,
    ModelConfig,
    RunConfig,
    TrackingConfig,
)
from conf.stages import PreferenceStage, RewardStage, SFTStage
from rlhf.process import distributed
from rlhf.run.context import RunContext
from rlhf.stages import methods
from rlhf.stages import rows as stage_rows
from tests import drawing

# its rows have weights, too
SOFT = functools.partial(RewardStage, name="soft", soft_label=True, centering_coef=0.05)
# of 8 rows, the last two steps of 16
GROWTH = BatchGrowthConfig(steps=[2], rate=RateCoupling.square_root)
STAGES: dict[str, Any] = {
    "sft": SFTStage,
    "reward": RewardStage,
    "soft": SOFT,
    "dpo": PreferenceStage,
    "growing": functools.partial(SFTStage, name="growing", batch_growth=GROWTH),
    "noisy": functools.partial(SFTStage, name="noisy", batch_growth=GROWTH, noise_scale=0.5),
    # of other families: a scalar head of ours; the same with experts; experts
    "granite": functools.partial(RewardStage, name="granite"),
    "olmoe": functools.partial(RewardStage, name="olmoe"),
    "qwen3_moe": functools.partial(SFTStage, name="qwen3_moe"),
}
MODULES = {
    "dpo": "preference",
    "soft": "reward",
    "growing": "sft",
    "noisy": "sft",
    "granite": "reward",
    "olmoe": "reward",
    "qwen3_moe": "sft",
}
# in an adapter's place: what trains of the model itself
PARTS: dict[str, dict[str, Any]] = {
    "top": {"train": TrainPart(layers=1), "weight_decay": 0.3},
    "kept": {"train": TrainPart(layers=1), "cache_frozen": True},
    "unfrozen": {
        "unfreeze": UnfreezeConfig(every=2),
        "depth_decay": 0.5,
        "weight_decay": 0.3,
        # Adam's first step is the sign of each gradient, noise included
        "adam_eps": 1e-5,
    },
}
RATES = {"dpo": 5e-3}  # it starts where its loss is flat for an adapter


def case_config(spec: dict[str, Any], stage: str, zero: int | None, adapter: str) -> Config:
    """One configuration: `zero` None is the torch engine. Four steps of eight rows; in
    micro-batches of two rows, under ZeRO with an even stage or full weights of so many tokens.
    """
    deepspeed = zero is not None
    # the noise is that of micro-batches, which have to be the same
    by_tokens = deepspeed and stage != "noisy" and (zero == 2 or adapter == "none")
    parts = {"micro_batch_tokens": 48} if by_tokens else {"micro_batch_size": 2}
    return Config(
        stage=STAGES[stage](
            steps=4,
            batch_size=8,
            eval_steps=4,
            max_length=32,
            learning_rate=RATES.get(stage, 1e-3),
            warmup_ratio=0.25,
            **PARTS.get(adapter, {}),
        ),
        run=RunConfig(
            dir=spec["out"], name=f"{'torch' if zero is None else f'zero{zero}'}-{adapter}"
        ),
        model=ModelConfig(path=spec["models"].get(stage, spec["model"])),
        adapter=AdapterConfig(kind=AdapterKind("none" if adapter in PARTS else adapter), rank=4),
        engine=EngineConfig(
            kind=EngineKind.deepspeed if deepspeed else EngineKind.torch,
            zero_stage=zero or 0,
            **parts,
        ),
        data=DataConfig(path=spec[stage], eval_fraction=0.2),
        tracking=TrackingConfig(kind=TrackingKind.none),
    )


def run_case(spec: dict[str, Any], stage: str, zero: int | None, adapter: str) -> Path:
    """Run one configuration. Returns its run directory."""
    cfg = case_config(spec, stage, zero, adapter)
    importlib.import_module(f"rlhf.stages.{MODULES.get(stage, stage)}").run(
        RunContext.open(cfg), stage_rows
    )
    distributed.barrier()
    return Path(cfg.run.dir) / cfg.run.name / stage


def main() -> None:
    methods.register()
    drawing.off()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    distributed.initialise()
    for stage, zero, adapter in spec["cases"]:
        run_case(spec, stage, zero, adapter)
    distributed.shutdown()


if __name__ == "__main__":
    main()
