"""Training with groups of parameters under ZeRO on the ranks of a launch, saved in the middle:
`test_groups` starts it. usage: torchrun ... -m tests.policy.groups_worker FOLDER ZERO...
"""

import sys
from pathlib import Path

import torch

from conf.choices import EngineKind
from conf.schema import EngineConfig
from policy.engines import resharding
from policy.engines.deepspeed import DeepSpeedEngine, prepare_cpu
from rlhf.process import checkpoints, distributed
from tests.policy.test_groups import (
    OPTIM,
    STEPS,
    Tower,
    engine_steps,
    falling_rates,
    plain_rates,
    weights_of,
)

SAVED_AFTER = 4
RATES = {"plain": plain_rates, "falling": falling_rates}


def fresh(zero: int, kind: str) -> DeepSpeedEngine:
    module = Tower()
    cfg = EngineConfig(kind=EngineKind.deepspeed, zero_stage=zero)
    device = torch.device("cpu")
    return DeepSpeedEngine(module, cfg, OPTIM, device, half=False, rates=RATES[kind](module))


def keep(engine: DeepSpeedEngine, file: Path) -> None:
    """Write the whole weights."""
    with engine.gather(list(engine.module.parameters())):
        weights = {name: tensor.clone() for name, tensor in weights_of(engine.module).items()}
    if distributed.is_main():
        torch.save(weights, file)
    distributed.barrier()


def run(folder: Path, zero: int, kind: str) -> None:
    """All steps at once; then half of them, and the other half from the checkpoint; then the same
    from its universal form.
    """
    cfg = EngineConfig(kind=EngineKind.deepspeed, zero_stage=zero)
    engine = fresh(zero, kind)
    engine_steps(engine, 0, SAVED_AFTER)
    keep(engine, folder / f"{kind}{zero}_half.pt")
    saved = folder / f"{kind}{zero}" / "checkpoint-4"
    engine.save(saved / "policy")
    if distributed.is_main():
        resharding.record(saved, cfg)
        checkpoints.seal(saved)
    distributed.barrier()
    engine_steps(engine, SAVED_AFTER, STEPS)
    keep(engine, folder / f"{kind}{zero}.pt")
    engine = fresh(zero, kind)
    engine.load(saved / "policy")
    engine_steps(engine, SAVED_AFTER, STEPS)
    keep(engine, folder / f"{kind}{zero}_resumed.pt")
    if zero == 0:
        return
    if distributed.is_main():
        resharding.universal(saved, resharding.Sharding.of(cfg))
    distributed.barrier()
    engine = fresh(zero, kind)
    engine.load(saved.parent / checkpoints.UNIVERSAL / saved.name / "policy")
    engine_steps(engine, SAVED_AFTER, STEPS)
    keep(engine, folder / f"{kind}{zero}_universal.pt")


def main() -> None:
    torch.set_num_threads(1)
    prepare_cpu()
    distributed.initialise()
    for zero in map(int, sys.argv[2:]):
        for kind in RATES:
            run(Path(sys.argv[1]), zero, kind)
    distributed.shutdown()


if __name__ == "__main__":
    main()
