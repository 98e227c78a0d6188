"""The groups ``run`` and ``tracking``: where a run lives, how it starts, what it is logged to; the
watch, which looks at the reward from outside while a run trains; and what changes along a training
run: the learning rate's decay, what a stalled figure does to it, the size of a step, and which
weights train.
"""

import math
import re
from dataclasses import dataclass

from conf.choices import Action, DecayShape, RateCoupling, Scheduler, TrackingKind, WandbMode
from conf.options import check, check_options, option


@dataclass(slots=True, kw_only=True)
class RunConfig:
    """Where a run lives and how it starts."""

    name: str = option("default", "Directory inside run.dir that the stages of one project share.")
    dir: str = option("runs", "Root directory of all runs.")
    seed: int = option(0, "Seed of Python, NumPy, torch and every sampler.", at_least=0)
    resume: bool = option(False, "Continue an existing run directory from its last checkpoint.")
    overwrite: bool = option(
        False, "Delete an existing run directory of this stage and start anew."
    )
    dry_run: bool = option(
        False, "Compose, check and print launch, batches, rows and memory; load no weights."
    )
    keep_checkpoints: int = option(
        2, "Newest checkpoints that are kept beside the best one; 0 keeps all.", at_least=0
    )
    phase_timeout_s: float | None = option(
        3600.0,
        "Longest time that a phase of training (rollout, update, save ...) may take before the run "
        "ends as hung; null: no limit.",
        unit="s",
        above=0,
    )

    def __post_init__(self) -> None:
        check_options(self, "run")
        inside = (
            bool(self.name.strip("/."))
            and ".." not in self.name
            and not self.name.startswith(("/", "~"))
            and "\x00" not in self.name
        )
        check(
            inside, "run.name", self.name, "a directory name inside run.dir: relative, without '..'"
        )
        check(
            not (self.resume and self.overwrite),
            "run.overwrite",
            self.overwrite,
            "false when run.resume=true",
        )


@dataclass(slots=True, kw_only=True)
class TrackingConfig:
    """A tracker beside metrics.jsonl, which is always written."""

    kind: TrackingKind = option(TrackingKind.wandb, "The tracker.")
    project: str = option("rlhf", "W&B project.")
    entity: str | None = option(None, "W&B team or user; null: the login's own.")
    group: str | None = option(
        None, "W&B group; null: run.name, or the sweep where there are several jobs."
    )
    tags: list[str] = option([], "W&B tags.")
    mode: WandbMode = option(
        WandbMode.auto, "How W&B logs; auto: online where a login exists, else offline."
    )
    log_model: bool = option(True, "Upload the final model as an artifact.")
    samples_every: int = option(
        10, "Steps between tables of samples; 0: no tables.", unit="steps", at_least=0
    )

    def __post_init__(self) -> None:
        check_options(self, "tracking")


@dataclass(slots=True, kw_only=True)
class WatchConfig:
    """Looks at the reward from outside while it trains; a rule that holds warns or stops the run
    (Gao et al. 2022, arXiv:2210.10760).
    """

    judge_path: str | None = option(
        None,
        "Directory of a second reward model that judges, trained with another seed or on other "
        "pairs; null: no such judge.",
    )
    judge_function: str | None = option(
        None, "pkg.module:function that judges, with the signature of reward.function."
    )
    judge_every: int = option(
        10,
        "Steps between judgements of held-out responses; the start is judged, too.",
        unit="steps",
        at_least=1,
    )
    judge_prompts: int = option(
        64,
        "Held-out prompts of a judgement, the same each time.",
        unit="prompts",
        at_least=2,
    )
    window: int = option(
        10,
        "Steps that a rule looks at: the last ones for length, the first ones for entropy to "
        "compare with.",
        unit="steps",
        at_least=1,
    )
    divergence: Action = option(
        Action.warn, "The score rises and the judge falls; without a judge the rule does nothing."
    )
    divergence_judgements: int = option(
        3,
        "Last judgements over which both trends are measured.",
        unit="judgements",
        at_least=2,
    )
    divergence_sd: float = option(
        2.0,
        "Standard errors over the held-out prompts by which each trend has to differ from 0.",
        unit="standard errors",
        at_least=0,
    )
    kl: Action = option(Action.off, "The KL divergence from the reference exceeds kl_max.")
    kl_max: float = option(50.0, "Limit of the rule kl.", unit="nats per response", above=0)
    length: Action = option(
        Action.warn, "Too many responses are cut off at rollout.max_response_length."
    )
    length_share: float = option(
        0.9, "Share of responses cut off in the window, for the rule length.", above=0, at_most=1
    )
    entropy: Action = option(Action.warn, "The entropy of the policy has collapsed.")
    entropy_share: float = option(
        0.05, "Share of the first steps' entropy, for the rule entropy.", above=0, below=1
    )

    @property
    def has_judge(self) -> bool:
        """Whether held-out prompts are judged."""
        return self.judge_path is not None or self.judge_function is not None

    def __post_init__(self) -> None:
        check_options(self, "stage.watch")
        check(
            self.judge_path is None or self.judge_function is None,
            "stage.watch.judge_function",
            self.judge_function,
            "null beside judge_path",
        )


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
        "expression of a whole one (.*layers\\.[0-3]\\..*), or embeddings, norms, head; null: none "
        "beside layers.",
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
