"""Adapters under DeepSpeed's ZeRO: three optimizer steps of two micro-batches each, in one process
or on every rank of a torchrun launch (tests/policy/adapters/test_zero.py).

usage: torchrun ... -m tests.policy.adapters.zero_worker FOLDER KIND:ZERO_STAGE ...
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from conf.adapters import facts_of
from conf.choices import AdapterKind, EngineKind, LoraInit, Placement, Quantization
from conf.methods import (
    BottleneckConfig,
    Composition,
    LoraMiniConfig,
    MoLoraConfig,
    OftConfig,
    PromptConfig,
    RasaConfig,
)
from conf.schema import AdapterConfig, EngineConfig
from policy.adapters import enable_checkpointing, method_of
from policy.engines.torch import make_engine
from policy.saving import full_weights, save_adapter
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
    "houlsby": AdapterConfig(
        kind=AdapterKind.bottleneck,
        bottleneck=BottleneckConfig(size=16, placement=Placement.houlsby),
    ),
    "parallel": AdapterConfig(
        kind=AdapterKind.bottleneck,
        bottleneck=BottleneckConfig(size=16, placement=Placement.parallel),
    ),
    "molora": AdapterConfig(kind=AdapterKind.molora, rank=4, molora=MoLoraConfig(experts=3)),
    "prompt": AdapterConfig(kind=AdapterKind.prompt, prompt=PromptConfig(tokens=5)),
    "ptuning": AdapterConfig(
        kind=AdapterKind.ptuning, prompt=PromptConfig(tokens=5, encoder_size=40)
    ),
    "prefix": AdapterConfig(kind=AdapterKind.prefix, prompt=PromptConfig(tokens=5)),
    "lora_fa": AdapterConfig(kind=AdapterKind.lora, rank=4, freeze_a=True),
    "dora": AdapterConfig(kind=AdapterKind.lora, rank=4, dora=True),
    "pissa": AdapterConfig(kind=AdapterKind.lora, rank=4, alpha=4, init=LoraInit.pissa),
    "olora": AdapterConfig(kind=AdapterKind.lora, rank=4, alpha=4, init=LoraInit.olora),
    "eva": AdapterConfig(kind=AdapterKind.lora, rank=4, init=LoraInit.eva),
    "corda": AdapterConfig(kind=AdapterKind.lora, rank=4, alpha=4, init=LoraInit.corda),
    "qlora": AdapterConfig(kind=AdapterKind.lora, rank=4, quantize=Quantization.nf4),
    "loftq": AdapterConfig(
        kind=AdapterKind.lora, rank=4, quantize=Quantization.nf4, init=LoraInit.loftq
    ),
    "whole": AdapterConfig(kind=AdapterKind.lora, rank=4, save_whole=["norm", "embed_tokens"]),
    "vera": AdapterConfig(kind=AdapterKind.vera, rank=16),
    "ia3": AdapterConfig(kind=AdapterKind.ia3, targets=["k_proj", "v_proj", "down_proj"]),
    "oft": AdapterConfig(kind=AdapterKind.oft, oft=OftConfig(block_size=16)),
    # of two adapters that don't train
    "fused": AdapterConfig(
        kind=AdapterKind.bottleneck,
        bottleneck=BottleneckConfig(size=16, combine=Composition.fuse),
    ),
}
EARLIER = ("first", "second")
STEPS, ROWS, LENGTH = 3, 4, 10


class Loss(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        return loss


def run(folder: Path, case: str) -> Path:
    """Train `case`; returns the file of the weights that it ends with: the adapter's own and, where
    weights can hold its update, whole ones; and those of the plain LoRA with its update.
    """
    kind, stage = case.split(":")
    adapter = ADAPTERS[kind]
    if kind == "fused":
        adapter = replace(adapter, load=[str(folder / name) for name in EARLIER])
    model = fresh(adapter)
    if adapter.kind is not AdapterKind.prefix:
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
    method = method_of(adapter)
    forms = {"own": method.saved(model, engine.gather).tensors}
    if method.as_lora is not None:
        forms["lora"] = method.as_lora(model, engine.gather).tensors
    if facts_of(adapter).merges:
        whole = full_weights(model, engine.gather).tensors
        forms["whole"] = {name: tensor.clone() for name, tensor in whole}
    found = {}
    for form, tensors in forms.items():
        found |= {f"{form}.{name}": tensor.clone() for name, tensor in tensors.items()}
    file = folder / f"{case.replace(':', '-')}.safetensors"
    if distributed.is_main():
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, str(file))
    return file


def make_earlier(folder: Path) -> None:
    """Two adapters for a fusion, in the folder."""
    for seed, name in enumerate(EARLIER, start=1):
        options = BottleneckConfig(size=8 * seed)
        model = fresh(AdapterConfig(kind=AdapterKind.bottleneck, name=name, bottleneck=options))
        torch.manual_seed(seed)
        for param in model.parameters():
            if param.requires_grad:
                param.data.add_(0.1 * torch.randn_like(param))
        save_adapter(model, folder / name)


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
