"""Options of how what trains: the learning rate and the size of a step along a run, and which
weights take part and from when on.
"""

import math
import re
from dataclasses import dataclass
from enum import Enum

from conf.choices import DecayShape, RateCoupling, Scheduler
from conf.options import check, check_options, option


class OptimizerKind(Enum):
    """What steps the weights (policy/engines/optimizers.py)."""

    adamw = "adamw"
    adamw_8bit = "adamw_8bit"  # its state in 8 bits (Dettmers et al. 2022, arXiv:2110.02861)
    paged_adamw = "paged_adamw"  # on CUDA its state goes to the host where memory is short
    paged_adamw_8bit = "paged_adamw_8bit"
    lion = "lion"  # Chen et al. 2023, arXiv:2302.06675
    lion_8bit = "lion_8bit"
    muon = "muon"  # matrices of the blocks; the others by AdamW (Jordan et al. 2024)
    adafactor = "adafactor"  # without momentum (Shazeer & Stern 2018, arXiv:1804.04235)

    @property
    def of_bitsandbytes(self) -> bool:
        """Whether bitsandbytes has it."""
        return self not in (OptimizerKind.adamw, OptimizerKind.muon, OptimizerKind.adafactor)

    def state_bytes(self, weights: float, largest: float) -> float:
        """Bytes of its state for so many weights that train, at most; `largest` of them are in the
        largest tensor. 8 bits are a byte, and 4 for the scale of 256 of them.
        """
        moments = {OptimizerKind.lion: 1, OptimizerKind.lion_8bit: 1}.get(self, 2)
        if self is OptimizerKind.adafactor:  # a row and a column for each matrix
            return 4.0 * largest
        if self.value.endswith("8bit"):
            return moments * (1 + 4 / 256) * weights
        return 4.0 * moments * weights


class AdamKernels(Enum):
    """Whose AdamW steps under DeepSpeed."""

    auto = "auto"
    torch = "torch"
    deepspeed = "deepspeed"


@dataclass(slots=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate decays; each option is read by the scheduler that it names."""

    cycles: int = option(
        2,
        "cosine_restarts: how often the cosine falls (SGDR, Loshchilov & Hutter 2017, "
        "arXiv:1608.03983).",
        unit="cycles",
        at_least=1,
    )
    cycle_growth: float = option(
        1.0, "cosine_restarts: how many times as long as the last a cycle is.", at_least=1
    )
    power: float = option(
        2.0, "polynomial: the exponent of the share of steps that is left.", above=0
    )
    decay_share: float = option(
        0.1,
        "warmup_stable_decay: share of the steps, the last ones, in which the rate decays (Hu et "
        "al. 2024, arXiv:2404.06395).",
        above=0,
        at_most=1,
    )
    decay_shape: DecayShape = option(
        DecayShape.linear,
        "warmup_stable_decay: how it decays; square_root is 1 minus the root of the share that is "
        "done (Hägele et al. 2024, arXiv:2405.18392).",
    )

    def __post_init__(self) -> None:
        check_options(self, "stage.schedule")


@dataclass(slots=True, kw_only=True)
class PlateauConfig:
    """What scheduler=plateau does once a figure stalls: the held-out loss, or online the score."""

    factor: float = option(
        0.5, "What the learning rate is multiplied by each time.", above=0, below=1
    )
    patience: int = option(
        3,
        "Evaluations (online: steps) without improvement before that.",
        unit="evaluations",
        at_least=1,
    )

    def __post_init__(self) -> None:
        check_options(self, "stage.plateau")


@dataclass(slots=True, kw_only=True)
class BatchGrowthConfig:
    """The rows of a step, online its prompts, become more along the run (Smith et al. 2018,
    arXiv:1711.00489).
    """

    steps: list[int] = option(
        [], "Steps after which a step has more rows, in rising order; none: it stays as it is."
    )
    factor: int = option(2, "What the rows are multiplied by each time.", at_least=2)
    sizes: list[int] = option(
        [], "The rows after each of steps, rising, in place of factor; none: factor."
    )
    rate: RateCoupling = option(
        RateCoupling.none,
        "What the learning rate is multiplied by as the rows grow to k times the first: 1, k "
        "(Goyal et al. 2017, arXiv:1706.02677) or the root of k.",
    )

    def __post_init__(self) -> None:
        key = "stage.batch_growth"
        check_options(self, key)
        for name, values in (("steps", self.steps), ("sizes", self.sizes)):
            rising = all(a < b for a, b in zip([0, *values], values, strict=False))
            check(rising, f"{key}.{name}", values, "whole numbers above 0, each above the last")
        check(
            not self.sizes or len(self.sizes) == len(self.steps),
            f"{key}.sizes",
            self.sizes,
            f"a size for each of steps={self.steps}",
        )
        check(
            bool(self.steps) or (self.factor == 2 and self.rate is RateCoupling.none),
            f"{key}.steps",
            self.steps,
            "steps after which it grows, where factor or rate is set",
        )

    def size(self, first: int, step: int) -> int:
        """Rows of step `step` (from 0) of a run whose first step has `first`."""
        grown = sum(step >= at for at in self.steps)
        if grown and self.sizes:
            return self.sizes[grown - 1]
        return int(first * self.factor**grown)

    def all_sizes(self, first: int) -> list[int]:
        """Every size that a step can have, from `first` on."""
        return [first, *(self.size(first, at) for at in self.steps)]

    def rate_scale(self, first: int, step: int) -> float:
        """What the learning rate of step `step` is multiplied by."""
        ratio = self.size(first, step) / first
        match self.rate:
            case RateCoupling.linear:
                return ratio
            case RateCoupling.square_root:
                return math.sqrt(ratio)
            case RateCoupling.none:
                return 1.0


# An option of another schedule must not be set in vain.
_READ_BY = {
    "cycles": Scheduler.cosine_restarts,
    "cycle_growth": Scheduler.cosine_restarts,
    "power": Scheduler.polynomial,
    "decay_share": Scheduler.warmup_stable_decay,
    "decay_shape": Scheduler.warmup_stable_decay,
}


def check_schedule(
    scheduler: Scheduler,
    schedule: ScheduleConfig,
    plateau: PlateauConfig,
    *,
    warmup_ratio: float,
    min_rate: float,
) -> None:
    """Raise ValueError where an option of the schedule contradicts the scheduler, or isn't read by
    it.
    """
    usual = ScheduleConfig()
    for name, reader in _READ_BY.items():
        value = getattr(schedule, name)
        check(
            scheduler is reader or value == getattr(usual, name),
            f"stage.schedule.{name}",
            getattr(value, "value", value),
            f"its default with scheduler={scheduler.value}: only {reader.value} reads it",
        )
    check(
        scheduler is Scheduler.plateau or plateau == PlateauConfig(),
        "stage.plateau",
        plateau,
        f"its defaults with scheduler={scheduler.value}: only plateau reads it",
    )
    check(
        scheduler is not Scheduler.constant or min_rate == 0,
        "stage.min_rate",
        min_rate,
        "0 with scheduler=constant, which never falls",
    )
    check(
        scheduler is not Scheduler.inverse_sqrt or warmup_ratio > 0,
        "stage.warmup_ratio",
        warmup_ratio,
        "above 0 with scheduler=inverse_sqrt, whose decay is measured in warm-up steps",
    )
    check(
        scheduler is not Scheduler.warmup_stable_decay or warmup_ratio + schedule.decay_share <= 1,
        "stage.schedule.decay_share",
        schedule.decay_share,
        f"at most 1 with warmup_ratio={warmup_ratio} together",
    )


@dataclass(slots=True, kw_only=True)
class TrainPart:
    """Which weights train, without added modules; all others are frozen. A classifier's score
    always trains. Both null: all weights.
    """

    layers: int | None = option(
        None,
        "Blocks that train, counted from the top; null: those that modules names, or all.",
        unit="layers",
        at_least=0,
    )
    modules: list[str] | None = option(
        None,
        "Modules that train, in the whole model: the last parts of a name (q_proj), a regular "
        "expression of a whole one (.*layers\\.[0-3]\\..*), or embeddings, norms, head; of a model "
        "that reads pictures language, tower, projector too; null: none beside layers.",
        filled=True,
    )

    def __post_init__(self) -> None:
        check_options(self, "stage.train")
        for pattern in self.modules or ():
            check(_is_pattern(pattern), "stage.train.modules", pattern, "names or patterns")

    @property
    def everything(self) -> bool:
        """Whether all weights train."""
        return self.layers is None and self.modules is None


def _is_pattern(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return bool(pattern)


@dataclass(slots=True, kw_only=True)
class UnfreezeConfig:
    """Layer-wise training from the top down (ULMFiT, Howard & Ruder 2018, arXiv:1801.06146): the
    top block and what follows the blocks train first, then more blocks, at last the embeddings.
    """

    every: int | None = option(
        None, "Optimizer steps between unfreezings; null: not by steps.", unit="steps", at_least=1
    )
    patience: int | None = option(
        None,
        "Evaluations without improvement of the held-out loss before the next unfreezing; null: "
        "not by the loss. Not in online stages.",
        unit="evaluations",
        at_least=1,
    )
    blocks: int = option(1, "Blocks of an unfreezing.", unit="layers", at_least=1)
    factor: float = option(
        0.9, "What the learning rate is multiplied by at each unfreezing.", above=0, at_most=1
    )

    def __post_init__(self) -> None:
        check_options(self, "stage.unfreeze")
        check(
            self.every is None or self.patience is None,
            "stage.unfreeze.patience",
            self.patience,
            "null with stage.unfreeze.every: one of them says when",
        )

    @property
    def on(self) -> bool:
        """Whether something waits."""
        return self.every is not None or self.patience is not None
