"""What every engine is: its methods, its optimizer's settings, and how it refuses a bad update."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from conf.choices import Scheduler
from conf.stages import TrainStage


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
