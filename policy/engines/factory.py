"""The engine that the configuration names."""

from typing import Any

import torch
from torch import nn

from conf.choices import EngineKind
from conf.schema import EngineConfig
from policy.engines.base import OptimSettings
from policy.engines.torch import TorchEngine
from rlhf.process import distributed


def make_engine(
    module: nn.Module, cfg: EngineConfig, optim: OptimSettings, device: torch.device, *, half: bool
) -> Any:
    """The engine that the config names. `half`: the weights are bfloat16 (DeepSpeed must know)."""
    if cfg.kind is EngineKind.deepspeed:
        from policy.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(module, cfg, optim, device, half=half)
    distributed.require_one_process("engine=torch", distributed.SEVERAL_PROCESSES)
    return TorchEngine(module, optim, device)
