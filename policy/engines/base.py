"""What every engine is: its methods, its optimizer's settings, and how it refuses a bad update."""

import math
import statistics
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from conf import published
from conf.choices import AdapterKind, Scheduler
from conf.stages import TrainStage


class NonFinite(Exception):
    """A loss or a gradient is NaN or infinite, or a spike: it must not be applied."""


class Brake:
    """Refuses a figure above a multiple of the median size of its last values; the refused ones are
    not among them.

    All ranks feed it the same figures, so all refuse alike. There is no limit until a figure has
    been seen `window` times.
    """

    def __init__(self, loss: float | None, grad_norm: float | None, window: int) -> None:
        """loss, grad_norm: the multiples, None: no limit. window: updates that the median is taken
        over.
        """
        self.factors = {"loss": loss, "grad_norm": grad_norm}
        self.window = window
        self._last: dict[str, list[float]] = {}

    @staticmethod
    def from_stage(stage: TrainStage) -> "Brake":
        return Brake(stage.spike_loss, stage.spike_grad_norm, stage.spike_window)

    def check(self, kind: str, figures: Mapping[str, float]) -> None:
        """`kind` is loss or grad_norm. Raises NonFinite for the first figure that is no finite
        number, or above its limit; else keeps all of them.
        """
        factor = self.factors[kind]
        for name, value in figures.items():
            if not math.isfinite(value):
                raise NonFinite(f"{name} is {value}")
            last = self._last.get(name, [])
            if factor is None or len(last) < self.window:
                continue
            median = statistics.median(last)
            if abs(value) > factor * median:
                raise NonFinite(
                    f"{name} is {value:.4g}, above stage.spike_{kind}={factor:g} times "
                    f"{median:.4g}, the median of the last {self.window} updates"
                )
        if factor is not None:
            for name, value in figures.items():
                self._last[name] = [*self._last.get(name, []), abs(value)][-self.window :]

    def state_dict(self) -> dict[str, list[float]]:
        return {name: list(values) for name, values in self._last.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._last = {name: list(map(float, values)) for name, values in state.items()}


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
        if learning_rate is None:
            learning_rate = published.learning_rate(stage, AdapterKind.none)
        return OptimSettings(
            learning_rate=learning_rate,
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
