"""What every engine is: its methods, its optimizer's settings, the groups of parameters that have
learning rates of their own, and how it refuses a bad update.
"""

import math
import statistics
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from conf import published
from conf.choices import AdapterKind, DecayShape, Scheduler
from conf.schedule import ScheduleConfig
from conf.stages import TrainStage
from policy.engines.groups import Rates


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
    min_rate: float = 0.0  # share of the learning rate
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    # As transformers' own schedules: step 0 of the warm-up has the rate 0, and the terms round as
    # there, so that runs on TRL's trainers stay what they were.
    from_zero: bool = False

    @staticmethod
    def from_stage(
        stage: TrainStage,
        *,
        total_steps: int,
        learning_rate: float | None = None,
        from_zero: bool = False,
    ) -> "OptimSettings":
        if learning_rate is None:
            learning_rate = published.learning_rate(stage, AdapterKind.none)
        warmup = stage.warmup_ratio * total_steps
        return OptimSettings(
            learning_rate=learning_rate,
            weight_decay=stage.weight_decay,
            betas=(stage.adam_beta1, stage.adam_beta2),
            eps=stage.adam_eps,
            max_grad_norm=stage.max_grad_norm,
            scheduler=stage.scheduler,
            warmup_steps=math.ceil(warmup) if from_zero else round(warmup),
            total_steps=total_steps,
            min_rate=stage.min_rate,
            schedule=stage.schedule,
            from_zero=from_zero,
        )

    def rate(self, step: int) -> float:
        """Learning rate of optimizer step `step` (from 0): linear warm-up, then the schedule."""
        if step < self.warmup_steps and not self.from_zero:
            return self.learning_rate * (step + 1) / self.warmup_steps
        return self.learning_rate * self.factor(step)

    def factor(self, step: int) -> float:
        """The share of `learning_rate` that step `step` (from 0) has, in [0, 1]."""
        if step < self.warmup_steps:
            return (step if self.from_zero else step + 1) / self.warmup_steps
        decay = max(1, self.total_steps - self.warmup_steps)
        done = min(step - self.warmup_steps, decay)
        share = done / decay
        left = (decay - done) / decay if self.from_zero else 1.0 - share
        match self.scheduler:
            case Scheduler.linear:
                value = left
            case Scheduler.cosine:
                value = _cosine(share)
            case Scheduler.cosine_restarts:
                value = _cosine(_share_of_cycle(done, decay, self.schedule))
            case Scheduler.polynomial:
                value = left**self.schedule.power
            case Scheduler.inverse_sqrt:
                since = max(1, self.warmup_steps)
                return max(self.min_rate, math.sqrt(since / (since + done)))
            case Scheduler.warmup_stable_decay:
                value = self._stable_decay(step)
            case _:  # constant; plateau's cuts are not a function of the step (`Plateau`)
                return 1.0
        return value * (1.0 - self.min_rate) + self.min_rate

    def _stable_decay(self, step: int) -> float:
        """1 until the last steps, then down to 0 at `total_steps`."""
        length = max(1, round(self.schedule.decay_share * self.total_steps))
        share = min(1.0, max(0, step - self.total_steps + length) / length)
        match self.schedule.decay_shape:
            case DecayShape.linear:
                return 1.0 - share
            case DecayShape.cosine:
                return _cosine(share)
            case DecayShape.square_root:
                return 1.0 - math.sqrt(share)


def _cosine(share: float) -> float:
    """Half a cosine: 1 at share 0, 0 at share 1."""
    return 0.5 * (1.0 + math.cos(math.pi * share))


def _share_of_cycle(done: int, decay: int, schedule: ScheduleConfig) -> float:
    """The share of its cycle that step `done` of `decay` steps is at, in [0, 1]. Cycles start at
    whole steps, each `cycle_growth` times as long as the last; the last one ends at `decay`.
    """
    growth = schedule.cycle_growth
    lengths = [growth**number for number in range(schedule.cycles)]
    ends = [
        round(decay * math.fsum(lengths[: number + 1]) / math.fsum(lengths))
        for number in range(schedule.cycles)
    ]
    start = 0
    for end in ends:
        if done < end:
            return (done - start) / (end - start)
        start = end
    return 1.0


class Plateau:
    """scheduler=plateau: multiplies the rate by a factor each time that a figure has not improved
    for so many looks at it.
    """

    def __init__(self, stage: TrainStage, *, higher_is_better: bool) -> None:
        self.options, self.floor = stage.plateau, stage.min_rate
        self.least = stage.min_improvement
        self.sign = 1.0 if higher_is_better else -1.0
        self.scale = 1.0  # of the learning rate
        self.best: float | None = None  # times the sign
        self.waited = 0  # looks since the best

    @staticmethod
    def of(stage: TrainStage, *, higher_is_better: bool) -> "Plateau | None":
        """None with another scheduler."""
        if stage.scheduler is not Scheduler.plateau:
            return None
        return Plateau(stage, higher_is_better=higher_is_better)

    def look(self, figure: float) -> bool:
        """Whether the rate falls after this look. NaN is no improvement."""
        value = self.sign * figure
        if math.isfinite(value) and (self.best is None or value - self.best > self.least):
            self.best, self.waited = value, 0
            return False
        self.waited += 1
        if self.waited < self.options.patience:
            return False
        self.waited = 0
        before, self.scale = self.scale, max(self.floor, self.scale * self.options.factor)
        return self.scale < before

    def forget(self) -> None:
        """Figures from now on don't compare with those so far; the rate stays."""
        self.best, self.waited = None, 0

    def state_dict(self) -> dict[str, float | int | None]:
        return {"scale": self.scale, "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scale, self.best = float(state["scale"]), state["best"]
        self.waited = int(state["waited"])


class Engine(Protocol):
    """Trains one module. Losses are sums over this rank's tokens divided by the count over all
    ranks.
    """

    module: Any
    rates: Rates
    scale: float  # multiplies the schedule's learning rate

    def __call__(self, *args: Tensor) -> Any: ...
    def backward(self, loss: Tensor, *, last: bool) -> None: ...
    def clip(self) -> float | None: ...
    def step(self) -> float: ...
    def discard(self) -> None: ...
    def gather(self, params: list[nn.Parameter]) -> AbstractContextManager[Any]: ...
    def write(self, param: nn.Parameter, value: Tensor) -> None: ...
    def save(self, directory: Path) -> None: ...
    def load(self, directory: Path) -> None: ...
