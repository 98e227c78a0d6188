"""The plain engine: one process, one optimizer. `DeepSpeedEngine` offers the same methods over
ZeRO.
"""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from conf.choices import EngineKind, Scheduler
from conf.schema import EngineConfig
from conf.stages import TrainStage
from policy.model import no_gather, trainable
from rlhf.types import UserError


class NonFinite(Exception):
    """A loss or a gradient is NaN or infinite, or a spike: it must not be applied."""


@dataclass(frozen=True, slots=True)
class OptimSettings:
    """AdamW (Loshchilov & Hutter 2019) with a schedule over optimizer steps."""

    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    max_grad_norm: float  # 0: no clipping
    scheduler: Scheduler
    warmup_steps: int
    total_steps: int

    @staticmethod
    def from_stage(
        stage: TrainStage, *, total_steps: int, learning_rate: float | None = None
    ) -> "OptimSettings":
        return OptimSettings(
            learning_rate=stage.learning_rate if learning_rate is None else learning_rate,
            weight_decay=stage.weight_decay,
            betas=(stage.adam_beta1, stage.adam_beta2),
            eps=stage.adam_eps,
            max_grad_norm=stage.max_grad_norm,
            scheduler=stage.scheduler,
            warmup_steps=round(stage.warmup_ratio * total_steps),
            total_steps=total_steps,
        )

    def rate(self, step: int) -> float:
        """Learning rate of optimizer step `step` (from 0): linear warm-up, then constant, linear or
        cosine decay to 0.
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        share = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        factor = {
            Scheduler.constant: 1.0,
            Scheduler.linear: 1.0 - share,
            Scheduler.cosine: 0.5 * (1.0 + math.cos(math.pi * share)),
        }
        return self.learning_rate * factor[self.scheduler]


class Engine(Protocol):
    """Trains one module. Losses are sums over this rank's tokens divided by the count over all
    ranks.
    """

    module: Any

    def __call__(self, *args: Tensor) -> Any: ...
    def backward(self, loss: Tensor, *, last: bool) -> None: ...
    def clip(self) -> float | None: ...
    def step(self) -> float: ...
    def discard(self) -> None: ...
    def gather(self, params: list[nn.Parameter]) -> AbstractContextManager[Any]: ...
    def save(self, directory: Path) -> None: ...
    def load(self, directory: Path) -> None: ...


class TorchEngine:
    """AdamW in one process; half-precision weights get float32 master copies, which the optimizer
    steps.
    """

    def __init__(self, module: nn.Module, optim: OptimSettings, device: torch.device) -> None:
        self.module = module.to(device)
        self.optim = optim
        self.steps = 0
        # of the gradient that waits for its step, once it is clipped
        self._norm: float | None = None
        self.params = trainable(module)
        self.masters = [
            p if p.dtype == torch.float32 else p.detach().float().clone().requires_grad_()
            for p in self.params
        ]
        self.optimizer = torch.optim.AdamW(
            self.masters,
            lr=optim.learning_rate,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )

    def __call__(self, *args: Tensor) -> Any:
        return self.module(*args)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the loss's gradient; `last` marks the last micro-batch before `step` (which only
        DeepSpeed needs to know).
        """
        self._norm = None
        loss.backward()

    def clip(self) -> float | None:
        """Clip the gradient that waits for its step; returns its norm before that. Nothing else
        changes.
        """
        if self._norm is None:
            for param, master in zip(self.params, self.masters, strict=True):
                if master is not param:
                    master.grad = None if param.grad is None else param.grad.float()
                    param.grad = None
            self._norm = float(
                torch.nn.utils.clip_grad_norm_(self.masters, self.optim.max_grad_norm or math.inf)
            )
        return self._norm

    def discard(self) -> None:
        """Forget the gradient; weights, optimizer and step count stay as they are."""
        self._norm = None
        for tensor in (*self.params, *self.masters):
            tensor.grad = None

    def step(self) -> float:
        """One optimizer step. Returns the gradient's norm before clipping; raises NonFinite before
        a bad gradient is applied.
        """
        norm = self.clip()
        assert norm is not None
        if not math.isfinite(norm):
            raise NonFinite(f"the gradient's norm is {norm}")
        self._norm = None
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for param, master in zip(self.params, self.masters, strict=True):
                if master is not param:
                    param.copy_(master)
        self.steps += 1
        return norm

    @property
    def rate(self) -> float:
        return self.optim.rate(self.steps)

    gather = staticmethod(no_gather)

    def save(self, directory: Path) -> None:
        """Trained weights, optimizer state and step count, in `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        state = {
            "masters": [m.detach() for m in self.masters],
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
        }
        torch.save(state, directory / "engine.pt")

    def load(self, directory: Path) -> None:
        state = torch.load(directory / "engine.pt", weights_only=True, map_location="cpu")
        with torch.no_grad():
            for param, master, saved in zip(
                self.params, self.masters, state["masters"], strict=True
            ):
                master.copy_(saved)
                if master is not param:
                    param.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]


def make_engine(
    module: nn.Module, cfg: EngineConfig, optim: OptimSettings, device: torch.device, *, half: bool
) -> Any:
    """The engine that the config names. `half`: the weights are bfloat16 (DeepSpeed must know)."""
    from rlhf.process.distributed import world_size

    if cfg.kind is EngineKind.deepspeed:
        from policy.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(module, cfg, optim, device, half=half)
    if world_size() > 1:
        raise UserError(
            f"engine=torch trains in one process, but the launcher started {world_size()} ranks: "
            "use engine=zero0, zero1, zero2 or zero3."
        )
    return TorchEngine(module, optim, device)
