"""The engine that the configuration names."""

from typing import Any

import torch
from torch import nn

from conf.choices import EngineKind
from conf.schema import EngineConfig
from policy.engines.base import OptimSettings
from policy.engines.torch import TorchEngine
from rlhf.process.distributed import world_size
from rlhf.types import UserError


def make_engine(
    module: nn.Module, cfg: EngineConfig, optim: OptimSettings, device: torch.device, *, half: bool
) -> Any:
    """The engine that the config names. `half`: the weights are bfloat16 (DeepSpeed must know)."""
    if cfg.kind is EngineKind.deepspeed:
        from policy.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(module, cfg, optim, device, half=half)
    if world_size() > 1:
        raise UserError(
            f"engine=torch trains in one process, but the launcher started {world_size()} ranks: "
            "use engine=zero0, zero1, zero2 or zero3."
        )
    return TorchEngine(module, optim, device)
