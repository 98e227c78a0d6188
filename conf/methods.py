"""Options of single ways to train beside a frozen model, inside the group ``adapter``."""

from dataclasses import dataclass
from enum import Enum

from conf.choices import Placement
from conf.options import check, check_options, option


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
