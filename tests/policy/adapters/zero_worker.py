"""Adapters under DeepSpeed's ZeRO: three optimizer steps of two micro-batches each, in one process
or on every rank of a torchrun launch (tests/policy/adapters/test_zero.py).

usage: torchrun ... -m tests.policy.adapters.zero_worker FOLDER KIND:ZERO_STAGE ...
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from conf.adapters import LoraMiniConfig, RasaConfig
from conf.choices import AdapterKind, EngineKind
from conf.schema import AdapterConfig, EngineConfig
from policy.adapters import enable_checkpointing, method_of
from policy.engines.torch import make_engine
from policy.saving import adapter_weights, full_weights
from rlhf.process import distributed
from rlhf.stages import methods
from tests.policy.adapters.low_rank import fresh
from tests.policy.test_engine import OPTIM

# Pools and outer matrices are above ZeRO-3's bound, below which each rank keeps a whole copy.
ADAPTERS = {
    "rasa": AdapterConfig(kind=AdapterKind.rasa, rank=8, rasa=RasaConfig(shared=6)),
    "lora_mini": AdapterConfig(
        kind=AdapterKind.lora_mini, rank=4, lora_mini=LoraMiniConfig(inner=16)
    ),
}
STEPS, ROWS, LENGTH = 3, 4, 10


class Loss(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        return loss


def run(folder: Path, case: str) -> Path:
    """Train `case`; returns the file of the weights that it ends with: whole, the adapter's own,
    and those of the plain LoRA with its update.
    """
    kind, stage = case.split(":")
    adapter = ADAPTERS[kind]
    model = fresh(adapter)
    enable_checkpointing(model)
    cfg = EngineConfig()
    if stage != "torch":
        cfg = EngineConfig(kind=EngineKind.deepspeed, zero_stage=int(stage))
    engine = make_engine(Loss(model.train()), cfg, OPTIM, torch.device("cpu"), half=False)
    numbers = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 64, (STEPS, ROWS, LENGTH), generator=numbers)
    ranks = distributed.world_size()
    for rows in ids:
        mine = rows[distributed.rank() :: ranks]
        for number, row in enumerate(mine, start=1):
            engine.backward(engine(row[None]) / ROWS, last=number == len(mine))
        engine.step()
    found = {f"whole.{n}": t.clone() for n, t in full_weights(model, engine.gather).tensors}
    as_lora = method_of(adapter).as_lora
    assert as_lora is not None
    for name, weights in {
        "own": adapter_weights(model, engine.gather),
        "lora": as_lora(model, engine.gather),
    }.items():
        found |= {f"{name}.{n}": tensor.clone() for n, tensor in weights.tensors.items()}
    file = folder / f"{case.replace(':', '-')}.safetensors"
    if distributed.is_main():
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, str(file))
    return file


def main() -> None:
    methods.register()
    distributed.initialise()
    distributed.set_threads(1)
    folder, *cases = sys.argv[1:]
    for case in cases:
        run(Path(folder), case)
    distributed.shutdown()


if __name__ == "__main__":
    main()
