"""SFT on rows that ranks share, on every rank of a torchrun launch, many cases in one:
`test_shared_rows` starts it.

usage: torchrun ... -m tests.offline.shared_rows_worker FOLDER CASE ...
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from conf.choices import AdapterKind, EngineKind, TrackingKind
from conf.schedule import BatchGrowthConfig
from conf.schema import (
    AdapterConfig,
    Config,
    DataConfig,
    EngineConfig,
    ModelConfig,
    RunConfig,
    TrackingConfig,
)
from conf.stages import SFTStage
from rlhf.process import distributed
from rlhf.run.context import RunContext
from rlhf.stages import methods, sft
from rlhf.stages import rows as stage_rows
from tests import drawing

STEPS = 4


@dataclass(frozen=True)
class Case:
    """What is trained, and how on several ranks."""

    zero: int
    model: str = "llama"
    adapter: str = "none"
    engine: dict[str, Any] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)
    weighted: bool = False


GROWTH = BatchGrowthConfig(steps=[2])  # of 8 rows, the last two steps of 16
CASES = {
    "plain": Case(2),
    # one head of keys for two ranks
    "grouped": Case(3, model="qwen3", adapter="lora"),
    "tokens": Case(1, engine={"micro_batch_tokens": 66}, weighted=True),
    "checkpointing": Case(3, engine={"gradient_checkpointing": True, "micro_batch_size": 2}),
    # killed where the third step's metrics are written, two of four steps on the disk
    "resumed": Case(2, stage={"eval_steps": 2}),
    "growing": Case(2, stage={"batch_growth": GROWTH}),
    "experts": Case(3, model="qwen3_moe"),
    "positions": Case(0, model="gpt2", adapter="lora"),
}


def config(folder: Path, name: str, ranks: int) -> Config:
    """A case on so many ranks, two of which share each row; on one the torch engine trains."""
    case = CASES[name]
    parts: dict[str, Any] = case.engine or {"micro_batch_size": 2}
    engine = EngineConfig(micro_batch_size=2)
    if ranks > 1:
        engine = EngineConfig(
            kind=EngineKind.deepspeed, zero_stage=case.zero, sequence_parallel=2, **parts
        )
    stage = {
        "steps": STEPS,
        "batch_size": 8,
        "eval_steps": STEPS,
        # no multiple of the ranks
        "max_length": 33,
        "learning_rate": 1e-3,
        # Adam's first step is the sign of each gradient, noise included
        "adam_eps": 1e-4,
    }
    return Config(
        stage=SFTStage(**stage | case.stage),
        run=RunConfig(dir=str(folder / f"{ranks}-ranks"), name=name),
        model=ModelConfig(path=str(folder / case.model)),
        adapter=AdapterConfig(kind=AdapterKind(case.adapter), rank=4),
        engine=engine,
        data=DataConfig(
            path=str(folder / "rows.jsonl"),
            eval_fraction=0.2,
            weight_column="weight" if case.weighted else None,
        ),
        tracking=TrackingConfig(kind=TrackingKind.none),
    )


def run(folder: Path, name: str, ranks: int) -> Path:
    """Run a case. Returns its run directory."""
    cfg = config(folder, name, ranks)
    if name == "resumed" and ranks > 1:
        kill(cfg, 3)
        cfg.run.resume = True
    sft.run(RunContext.open(cfg), stage_rows)
    distributed.barrier()
    return Path(cfg.run.dir) / name / "sft"


def kill(cfg: Config, at: int) -> None:
    """Run it up to a step, whose metrics no rank writes."""
    ctx = RunContext.open(cfg)
    log = ctx.tracker.log

    def killed(step: int, metrics: Any) -> None:
        if step == at:
            raise KeyboardInterrupt
        log(step, metrics)

    ctx.tracker.log = killed  # type: ignore[method-assign]
    try:
        sft.run(ctx, stage_rows)
    except KeyboardInterrupt:
        distributed.barrier()
    else:
        raise AssertionError(f"step {at} was not killed")


def main() -> None:
    methods.register()
    drawing.off()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    folder, *names = sys.argv[1:]
    distributed.initialise()
    for name in names:
        run(Path(folder), name, distributed.world_size())
    distributed.shutdown()


if __name__ == "__main__":
    main()
