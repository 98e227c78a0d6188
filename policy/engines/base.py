"""What every engine is: its methods, its optimizer's settings, how it refuses a bad update, and the
noise of its gradients.
"""

import functools
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from conf import published
from conf.choices import AdapterKind, DecayShape, EngineKind, Scheduler
from conf.schedule import OptimizerKind, ScheduleConfig
from conf.schema import EngineConfig
from conf.stages import TrainStage
from policy.engines.loading import Rates
from rlhf.process import distributed
from rlhf.process.libraries import check_installed
from rlhf.types import UserError

LOG = logging.getLogger("policy.engines")
_ALONE = (
    "stage.noise_scale: a step of a single micro-batch says nothing about its noise. Smaller "
    "micro-batches do (engine.micro_tokens, engine.micro_batch_size)."
)


# Optimizers beside AdamW, of groups of parameters: rlhf/stages/methods.py makes them known
# (policy/engines/optimizers.py).
OPTIMIZERS: dict[OptimizerKind, Callable[[list[dict[str, Any]], "OptimSettings"], Any]] = {}


def check_optimizer(kind: OptimizerKind, engine: EngineConfig) -> None:
    """Raises UserError for an optimizer that the engine can't step: ZeRO lays tensors out flat."""
    if kind is not OptimizerKind.adamw and engine.kind is EngineKind.deepspeed:
        raise UserError(
            f"stage.optimizer={kind.value} needs engine=torch: engine=zero{engine.zero_stage} "
            "steps AdamW alone. Set stage.optimizer=adamw."
        )
    if kind.of_bitsandbytes:
        check_installed("bitsandbytes", "quantize")


def new_optimizer(groups: list[dict[str, Any]], optim: "OptimSettings") -> Any:
    """An optimizer of groups of parameters, which may have a weight decay of their own."""
    if optim.optimizer is not OptimizerKind.adamw:
        return OPTIMIZERS[optim.optimizer](groups, optim)
    return torch.optim.AdamW(
        groups,
        lr=optim.learning_rate,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,
    )


def as_asked(optimizer: Any, optim: "OptimSettings") -> Any:
    """The groups of a fresh AdamW under the optimizer that is asked for."""
    if optim.optimizer is OptimizerKind.adamw:
        return optimizer
    kept = ("params", "weight_decay")
    return new_optimizer([{k: g[k] for k in kept} for g in optimizer.param_groups], optim)


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
    """An optimizer, AdamW (Loshchilov & Hutter 2019) or another, with a schedule over its steps."""

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
    optimizer: OptimizerKind = OptimizerKind.adamw
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
            optimizer=stage.optimizer,
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


class GradientNoise:
    """The gradient-noise scale, the rows of a step beyond which more of them better its gradient
    but little (McCandlish et al. 2018, arXiv:1812.06162, appendix A.1).

    Hooks see the share of each micro-batch in a step's gradient; the whole is known by its norm. Of
    m micro-batches over all ranks, of n_i rows with the mean gradient g_i, and all N rows with G,

        trace = (sum of n_i |g_i|^2 - N |G|^2) / (m - 1)
        square = |G|^2 - trace / N

    are unbiased for the trace of independent rows' covariance and the square of their true
    gradient. The noise scale is the ratio of their exponential averages.
    """

    def __init__(self, params: Sequence[nn.Parameter], decay: float) -> None:
        """params: those that train; decay: of the averages, in [0, 1)."""
        self.params, self.decay = params, decay
        self.trace = self.square = self.weight = 0.0  # averages, and the weight of what is in them
        self._warned = False
        self._seen: set[int] = set()  # parameters, in the pass under way
        self._norm: Any = 0.0  # squared, of the pass under way
        self._sum: Any = 0.0  # of squared norms by their rows
        self._rows = self._parts = 0

    def watch(self) -> None:
        """Add the hooks, once, after those that change gradients."""
        for number, param in enumerate(self.params):
            trains = param.requires_grad
            param.requires_grad_(True).register_hook(functools.partial(self._see, number))
            param.requires_grad_(trains)

    def _see(self, number: int, gradient: Tensor) -> None:
        """A parameter's gradient in the pass under way, before it is added to any other."""
        if number in self._seen:
            raise UserError(
                "stage.noise_scale: a parameter gets its gradient in several pieces (reentrant "
                "checkpointing), whose norms don't add up. Set stage.noise_scale=null."
            )
        self._seen.add(number)
        exact = torch.promote_types(gradient.dtype, torch.float32)
        self._norm = self._norm + torch.linalg.vector_norm(gradient, dtype=exact) ** 2

    def begin(self) -> None:
        """A step begins; what an earlier one has left over is forgotten."""
        self._seen, self._norm, self._sum = set(), 0.0, 0.0
        self._rows = self._parts = 0

    def part(self, rows: int) -> None:
        """The backward pass of a micro-batch of `rows` rows is over; 0: of rows at weight 0."""
        if rows:
            self._sum = self._sum + self._norm / rows
            self._rows += rows
            self._parts += 1
        self._seen, self._norm = set(), 0.0

    def end(self, norm: float | None) -> None:
        """A step's passes are over. norm: of its whole gradient, before clipping; None: it is given
        up. A collective.
        """
        if norm is None:
            self.begin()
            return
        # gradients are averaged over ranks
        own = float(self._sum) / distributed.world_size() ** 2
        shares, rows, parts = distributed.all_sum([own, self._rows, self._parts])
        self.begin()
        if parts < 2:
            if not self._warned and distributed.is_main():
                LOG.warning(_ALONE)
            self._warned = True
            return
        trace = (rows**2 * shares - rows * norm**2) / (parts - 1)
        square = norm**2 - trace / rows
        if not math.isfinite(trace + square):
            return
        fresh = 1.0 - self.decay
        self.trace += fresh * (trace - self.trace)
        self.square += fresh * (square - self.square)
        self.weight += fresh * (1.0 - self.weight)

    def figures(self) -> dict[str, float]:
        """``train/noise_scale`` in rows, unless noise hides the gradient; its two averages."""
        if not self.weight:
            return {}
        trace, square = self.trace / self.weight, self.square / self.weight
        figures = {"train/noise_trace": trace, "train/noise_square": square}
        if trace > 0 and square > 0:
            figures["train/noise_scale"] = trace / square
        return figures

    def state_dict(self) -> dict[str, float]:
        return {"trace": self.trace, "square": self.square, "weight": self.weight}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.trace, self.square = state["trace"], state["square"]
        self.weight = state["weight"]


class Engine(Protocol):
    """Trains one module. Losses are sums over this rank's tokens divided by the count over all
    ranks.
    """

    module: Any
    rates: Rates
    scale: float  # multiplies the schedule's learning rate

    def __call__(self, *args: Tensor, **named: Any) -> Any: ...
    def backward(self, loss: Tensor, *, last: bool) -> None: ...
    def clip(self) -> float | None: ...
    def step(self) -> float: ...
    def discard(self) -> None: ...
    def gather(self, params: list[nn.Parameter]) -> AbstractContextManager[Any]: ...
    def write(self, param: nn.Parameter, value: Tensor) -> None: ...
    def save(self, directory: Path) -> None: ...
    def load(self, directory: Path) -> None: ...
