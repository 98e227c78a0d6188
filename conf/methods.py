"""Options of single ways to train beside a frozen model, inside the group ``adapter``; and of
``stage=search``, which finds good values of any options.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from conf.choices import Placement
from conf.options import check, check_options, nested, option


@dataclass(slots=True, kw_only=True)
class AdaLoraConfig:
    """Ranks that follow their importance (AdaLoRA, Zhang et al. 2023, arXiv:2303.10512)."""

    initial_rank: int = option(
        24, "Rank of each layer at the start; adapter.rank is the mean rank at the end.", at_least=1
    )
    begin: float = option(
        0.1, "Share of the steps before the first rank is given up.", at_least=0, below=1
    )
    end: float = option(
        0.5, "Share of the steps, the last ones, in which the ranks stay.", at_least=0, below=1
    )
    every: int = option(1, "Steps between two looks at the ranks.", unit="steps", at_least=1)
    orthogonality: float = option(
        0.1, "Weight of the penalty that keeps the bases orthogonal.", at_least=0
    )
    beta1: float = option(0.85, "Decay rate of the mean sensitivity.", above=0, below=1)
    beta2: float = option(0.85, "Decay rate of its uncertainty.", above=0, below=1)

    def __post_init__(self) -> None:
        check_options(self, "adapter.adalora")
        check(
            self.begin + self.end < 1,
            "adapter.adalora.end",
            self.end,
            f"below 1 with begin={self.begin:g}",
        )


@dataclass(slots=True, kw_only=True)
class RasaConfig:
    """Rank-one bases that layers share (RaSA, arXiv:2503.12576)."""

    shared: int = option(1, "Bases of each layer's rank that go into the pool.", at_least=1)

    def __post_init__(self) -> None:
        check_options(self, "adapter.rasa")


@dataclass(slots=True, kw_only=True)
class LoraMiniConfig:
    """Small matrices between frozen ones (LoRA-Mini, arXiv:2411.15804)."""

    inner: int = option(
        32, "Width between the frozen outer and the trained inner matrices.", at_least=1
    )

    def __post_init__(self) -> None:
        check_options(self, "adapter.lora_mini")


@dataclass(slots=True, kw_only=True)
class MoLoraConfig:
    """Several low-rank experts and a router in each layer (MoLoRA, arXiv:2309.05444)."""

    experts: int = option(10, "Low-rank experts of each layer.", at_least=2)

    def __post_init__(self) -> None:
        check_options(self, "adapter.molora")


class Composition(Enum):
    stack = "stack"  # each block reads what the one before gave
    fuse = "fuse"  # attention over what the blocks add, which trains alone


@dataclass(slots=True, kw_only=True)
class VeraConfig:
    """Trained scales around one frozen random pair (VeRA, Kopiczko et al. 2023,
    arXiv:2310.11454).
    """

    start: float = option(0.1, "Scale of the frozen A's rows at the start.", above=0)
    seed: int = option(0, "Seed of the frozen matrices, which are saved with the adapter.")

    def __post_init__(self) -> None:
        check_options(self, "adapter.vera")


@dataclass(slots=True, kw_only=True)
class OftConfig:
    """Orthogonal matrices that turn a layer's inputs (OFT, Qiu et al. 2023, arXiv:2306.07280)."""

    block_size: int = option(
        32, "Inputs that are turned together; it divides each layer's inputs.", at_least=2
    )

    def __post_init__(self) -> None:
        check_options(self, "adapter.oft")


@dataclass(slots=True, kw_only=True)
class BottleneckConfig:
    """Small layers between the model's own (Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al.
    2021, arXiv:2005.00247; He et al. 2022, arXiv:2110.04366).
    """

    size: int = option(64, "Width of the bottleneck.", at_least=1)
    nonlinearity: str = option(
        "relu", "Function between the two projections.", choices=("relu", "gelu", "silu", "tanh")
    )
    placement: Placement = option(Placement.pfeiffer, "Where the small layers are.")
    scale: float = option(
        1.0, "Factor of what the small layers add; beside a layer He et al. take 4.", above=0
    )
    combine: Composition = option(
        Composition.stack,
        "With adapter.load: stack a fresh adapter on those, or fuse them (AdapterFusion).",
    )

    def __post_init__(self) -> None:
        check_options(self, "adapter.bottleneck")


@dataclass(slots=True, kw_only=True)
class PromptConfig:
    """Virtual tokens in front of the prompt (Lester et al. 2021, arXiv:2104.08691; Liu et al. 2021,
    arXiv:2103.10385; Li and Liang 2021, arXiv:2101.00190).
    """

    tokens: int = option(20, "Virtual tokens.", unit="tokens", at_least=1)
    text: str | None = option(
        None, "Text whose tokens are the start; null: tokens of the first rows."
    )
    encoder_size: int = option(
        128, "adapter=ptuning: width of the encoder, at least as many as tokens.", at_least=1
    )

    def __post_init__(self) -> None:
        check_options(self, "adapter.prompt")


# ---- stage=search, which finds good values of any options ----


class Direction(Enum):
    """Which values of a metric are better."""

    min = "min"
    max = "max"


class Sampler(Enum):
    """What proposes the next setting."""

    tpe = "tpe"  # tree-structured Parzen estimator
    random = "random"
    grid = "grid"  # every combination once


class Pruner(Enum):
    """What stops trials that are behind."""

    none = "none"
    median = "median"  # worse than the median of the finished trials at the same step
    halving = "halving"  # asynchronous successive halving


@dataclass(slots=True, kw_only=True)
class ObjectiveConfig:
    """A figure that the search makes as small or as large as it can."""

    metric: str | None = option(
        None, "Metric of summary.json; null: the objective's own name.", filled=True
    )
    direction: Direction = option(Direction.min, "Whether smaller or larger values are better.")
    stage: str | None = option(
        None,
        "Whose summary.json holds it, stage.of or stage.then; null: the last that runs.",
        filled=True,
    )


@dataclass(slots=True, kw_only=True)
class PruneConfig:
    """Stops trials early by a metric of their metrics.jsonl, with SIGTERM, so that they save."""

    kind: Pruner = option(Pruner.none, "The rule.")
    metric: str | None = option(
        None, "Metric that is compared; null: the objective's metric.", filled=True
    )
    startup: int = option(
        5, "median: finished trials before any is stopped.", unit="trials", at_least=1
    )
    warmup: int = option(
        0, "median: steps of a trial before it can be stopped.", unit="steps", at_least=0
    )
    least: int = option(
        1, "halving: step of the first comparison; the next ones follow by factor.", at_least=1
    )
    factor: int = option(
        4, "halving: of so many trials one goes on after a comparison.", unit="trials", at_least=2
    )


@dataclass(slots=True, kw_only=True)
class SearchStage:
    """Searches for the best values of another stage's options: trials of that stage, each a run of
    its own, until the best setting is known and written as an experiment.
    """

    name: str = option("search", "Name of the preset; stage=NAME sets it.")
    of: str = option("sft", "Stage that is searched.", filled=True)
    options: dict[str, Any] = option(
        {}, "Its own options, such as steps, and others that the trials alone have."
    )
    then: str | None = option(
        None, "Stage that runs after it in each trial, such as eval; null: none.", filled=True
    )
    then_options: dict[str, Any] = option({}, "The same for stage.then.")
    space: dict[str, Any] = option(
        {},
        "Values by option: {low, high, log, step} or {choices}; when: {option: values} makes it "
        "depend on another.",
        section="the space",
    )
    objectives: dict[str, ObjectiveConfig] = option(
        {}, "What is made best, by name; several give a Pareto front."
    )
    sampler: Sampler = option(Sampler.tpe, "What proposes the next setting.", section="the search")
    trials: int = option(
        20, "Trials in all; a grid ends with its last combination.", unit="trials", at_least=1
    )
    startup: int = option(
        10, "tpe: trials at random, until so many have finished.", unit="trials", at_least=1
    )
    prune: PruneConfig = nested(PruneConfig, section="stopping trials early")
    workers: int = option(1, "Trials at once.", unit="trials", at_least=1, section="the trials")
    devices: list[str] | None = option(
        None,
        "CUDA devices of each worker, such as ['0', '1'] or ['0,1', '2,3']; null: all of them, "
        "dealt out evenly.",
        filled=True,
    )
    cores: list[str] | None = option(
        None,
        "Cores of each worker, such as ['0-3', '4-7']; null: all of them, dealt out evenly.",
        filled=True,
    )
    failures: int | None = option(
        None, "Failed trials that end the search; null: no number.", unit="trials", at_least=1
    )
    keep: int | None = option(
        None,
        "Best trials that keep their weights and checkpoints; null: all trials do.",
        unit="trials",
        at_least=1,
    )
    grace_s: float = option(
        60.0,
        "Time that a trial gets to save and end after SIGTERM before it is killed.",
        unit="s",
        above=0,
    )

    def __post_init__(self) -> None:
        check_options(self, "stage")
        check_options(self.prune, "stage.prune")
        for name, objective in self.objectives.items():
            check_options(objective, f"stage.objectives.{name}")
            known = [stage for stage in (self.of, self.then) if stage is not None]
            key = f"stage.objectives.{name}.stage"
            expected = f"one of {', '.join(known)}, or null"
            check(objective.stage in (None, *known), key, objective.stage, expected)
        self._check_relations()

    def _check_relations(self) -> None:
        check(
            not self.then_options or self.then is not None,
            "stage.then_options",
            self.then_options,
            "none without stage.then",
        )
        check(
            self.then is None or self.then != self.of,
            "stage.then",
            self.then,
            "another stage than stage.of, whose directory it would share",
        )
        several = len(self.objectives) > 1
        check(
            self.prune.kind is Pruner.none or not several,
            "stage.prune.kind",
            self.prune.kind.value,
            "none with several objectives: no single curve says which trial is behind",
        )
        check(
            self.prune.metric is None or self.prune.kind is not Pruner.none,
            "stage.prune.metric",
            self.prune.metric,
            "null with stage.prune.kind=none",
        )
        for name, given in (("devices", self.devices), ("cores", self.cores)):
            check(
                given is None or len(given) == self.workers,
                f"stage.{name}",
                given,
                f"an entry for each of stage.workers={self.workers}",
            )
