"""The group ``adapter``: which weights a stage trains beside a frozen model, and what follows from
the method: how its weights go to the generator, and whether whole weights can hold them.
"""

import re
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from typing import Any

from conf.choices import AdapterKind, Carrier, LoraInit, Quantization
from conf.methods import (
    AdaLoraConfig,
    BottleneckConfig,
    Composition,
    LoraMiniConfig,
    MoLoraConfig,
    OftConfig,
    PromptConfig,
    RasaConfig,
    VeraConfig,
)
from conf.options import check, check_options, default_of, nested, option

_DEFAULT_ROWS = 512
LOOKS_AT_ROWS = (LoraInit.eva, LoraInit.corda)  # starts of LoRA


class AdapterPart(Enum):
    """Where a picture model's adapter is looked for."""

    language = "language"
    vision = "vision"  # all that is not the language model: the tower, and what joins the two
    both = "both"


@dataclass(slots=True, kw_only=True)
class AdapterConfig:
    """Which weights are trained: all of them (``none``), or those of an adapter beside a frozen
    model.
    """

    kind: AdapterKind = option(AdapterKind.none, "Train all weights, or an adapter of this kind.")
    name: str = option(
        "default",
        "Name of this adapter among several of one model: it is saved with it, and generators and "
        "stage=eval call it so.",
        filled=True,
    )
    rank: int = option(16, "Rank of the low-rank updates.", at_least=1)
    alpha: float = option(32.0, "Scale of the updates: alpha / rank.", above=0)
    dropout: float = option(0.0, "Dropout probability of the adapter's input.", at_least=0, below=1)
    targets: list[str] = option(
        ["all-linear"], "Names of the modules that are adapted, or all-linear.", filled=True
    )
    part: AdapterPart = option(
        AdapterPart.language,
        "Models that read pictures: adapt the language model, the part for pictures (the tower and "
        "its projector), or both.",
    )
    rslora: bool = option(
        False, "Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732)."
    )
    dora: bool = option(False, "Weight-decomposed LoRA (Liu et al. 2024, arXiv:2402.09353).")
    init: LoraInit = option(LoraInit.default, "How the matrices of adapter=lora start.")
    loftq_rounds: int = option(
        5, "init=loftq: times that rounding and singular vectors take turns.", at_least=1
    )
    rate_ratio: float = option(
        1.0,
        "Learning rate of B over that of A (LoRA+, Hayou et al. 2024, arXiv:2402.12354, takes 16).",
        at_least=1,
    )
    freeze_a: bool = option(False, "Train B alone (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303).")
    rank_pattern: dict[str, int] = option(
        {}, "Ranks of some modules, by the end of their names or by regular expressions."
    )
    alpha_pattern: dict[str, float] = option({}, "Values of alpha of some modules, likewise.")
    save_whole: list[str] = option(
        [], "Names of modules that train in full beside the adapter and are saved with it."
    )
    sample_rows: int = option(
        _DEFAULT_ROWS,
        "Rows that a method looks at before it trains (gelora, init=eva, init=corda).",
        unit="rows",
        at_least=1,
    )
    load: list[str] = option(
        [],
        "Directories of further adapters of the model. They are merged into the weights that the "
        "run starts from; bottlenecks stay beside a new one.",
    )
    load_weights: list[float] = option(
        [], "Weights of these adapters' updates; empty: 1 for each of them."
    )
    quantize: Quantization = option(
        Quantization.none, "Hold the frozen model in 4 bits (nf4) or 8 bits (int8)."
    )
    double_quantize: bool = option(
        True, "quantize=nf4: hold the blocks' scales in 8 bits (Dettmers et al. 2023)."
    )
    adalora: AdaLoraConfig = nested(AdaLoraConfig)
    rasa: RasaConfig = nested(RasaConfig)
    lora_mini: LoraMiniConfig = nested(LoraMiniConfig)
    molora: MoLoraConfig = nested(MoLoraConfig)
    vera: VeraConfig = nested(VeraConfig)
    oft: OftConfig = nested(OftConfig)
    bottleneck: BottleneckConfig = nested(BottleneckConfig)
    prompt: PromptConfig = nested(PromptConfig)
    merge_on_save: bool = option(
        False,
        "stage=sft: write merged weights to model/ instead of the adapter; every other stage "
        "always writes whole weights, where the method's update is one of weights.",
    )

    def __post_init__(self) -> None:
        check_options(self, "adapter")
        named = re.fullmatch(r"[\w-]+", self.name) is not None
        check(named, "adapter.name", self.name, "letters, digits, _ and -")
        check(
            len(self.load_weights) in (0, len(self.load)),
            "adapter.load_weights",
            self.load_weights,
            f"one for each of the {len(self.load)} directories of adapter.load, or none",
        )
        check(
            self.kind is not AdapterKind.none or not self.is_quantized,
            "adapter.quantize",
            self.quantize.value,
            "none with adapter=none: rounded weights are frozen, so an adapter trains beside them "
            "(adapter=qlora)",
        )
        if self.kind is AdapterKind.adalora:
            check(
                self.adalora.initial_rank >= self.rank,
                "adapter.adalora.initial_rank",
                self.adalora.initial_rank,
                f"at least adapter.rank={self.rank}, the mean rank at the end",
            )
        self._refuse_unread()
        self._check_start()

    def _check_start(self) -> None:
        """Raise ValueError for a start of LoRA that other options rule out."""
        ranks = (self.rank, *self.rank_pattern.values())
        even = all(rank % 2 == 0 for rank in ranks)
        check(
            even or self.init is not LoraInit.orthogonal,
            "adapter.rank",
            list(ranks),
            "even ranks with init=orthogonal",
        )
        rounded = self.quantize is Quantization.nf4
        check(
            rounded or self.init is not LoraInit.loftq,
            "adapter.quantize",
            self.quantize.value,
            "nf4 with init=loftq, which starts at what rounding loses",
        )
        whole = self.quantize is Quantization.none
        takes_part = self.init in CHANGES_BASE
        check(
            whole or not takes_part,
            "adapter.init",
            self.init.value,
            "a start that leaves rounded weights as they are (quantize)",
        )
        check(
            not (self.dora and self.init in (*CHANGES_BASE, LoraInit.loftq)),
            "adapter.init",
            self.init.value,
            "another start with dora=true, whose update is no LoRA of the base",
        )

    @property
    def is_quantized(self) -> bool:
        """Whether the frozen model is held rounded."""
        return self.quantize is not Quantization.none

    def _refuse_unread(self) -> None:
        """Raise ValueError for an option that was set and that the method doesn't read."""
        if self.kind is AdapterKind.none:
            return  # `unread_in_full`, which needs the stage
        read = ("name", *READS[self.kind], *_ALWAYS_READ)
        if _FACTS[self.kind].merges:
            read = (*read, "merge_on_save")
        for name in self._set_but_for(read):
            inner, value = _changed(name, getattr(self, name))
            check(
                False,
                f"adapter.{inner}",
                value,
                f"left out, since adapter.kind={self.kind.value} does not read it",
            )
        self._refuse_idle()

    def _refuse_idle(self) -> None:
        """Raise ValueError for an option that only another value of the method reads."""
        looks = self.kind is not AdapterKind.lora or self.init in LOOKS_AT_ROWS
        check(
            looks or self.sample_rows == _DEFAULT_ROWS,
            "adapter.sample_rows",
            self.sample_rows,
            "left out: of LoRA's starts init=eva and init=corda look at rows",
        )
        encoded = self.kind in (AdapterKind.none, AdapterKind.ptuning)
        check(
            encoded or self.prompt.encoder_size == PromptConfig().encoder_size,
            "adapter.prompt.encoder_size",
            self.prompt.encoder_size,
            "left out: adapter=ptuning alone has an encoder",
        )
        taken = self.double_quantize or self.quantize is Quantization.nf4
        check(taken, "adapter.double_quantize", False, "left out, or quantize=nf4 beside it")

    def _set_but_for(self, read: tuple[str, ...]) -> list[str]:
        """The options that differ from their defaults and are not among `read`."""
        others = [field for field in fields(self) if field.name not in read]
        return [field.name for field in others if getattr(self, field.name) != default_of(field)]

    def unread_in_full(self, *, critic: bool) -> str | None:
        """An option that was set, as ``name=value``, and that full training does not read; None
        where there is none. critic: whether a critic trains by an adapter (stage.critic_adapter),
        which reads LoRA's.
        """
        lora = _CRITIC if critic else ()
        for name in self._set_but_for((*_ALWAYS_READ, *lora)):
            inner, value = _changed(name, getattr(self, name))
            return f"adapter.{inner}={value}"
        return None


def _changed(name: str, value: Any) -> tuple[str, Any]:
    """An option that was set, by its dotted name below ``adapter``, and its value as it is written;
    of a group of options the first that differs from its default.
    """
    if is_dataclass(value):
        for field in fields(value):
            inner = getattr(value, field.name)
            if inner != default_of(field):
                return _changed(f"{name}.{field.name}", inner)
    return name, getattr(value, "value", value)


_ALWAYS_READ = ("kind", "load", "load_weights")
# What a critic's adapter takes over from the policy's (conf.schema.critic_adapter).
_CRITIC = ("rank", "alpha", "dropout", "targets", "part", "rslora", "dora")
_HELD = ("quantize", "double_quantize")
_LOW_RANK = ("rank", "alpha", "dropout", "targets", "part", "save_whole", *_HELD)
# The options that each method reads beside those and its name, and merge_on_save where the method
# merges.
READS: dict[AdapterKind, tuple[str, ...]] = {
    AdapterKind.lora: (
        *_LOW_RANK,
        "rslora",
        "dora",
        "init",
        "loftq_rounds",
        "rate_ratio",
        "freeze_a",
        "rank_pattern",
        "alpha_pattern",
        "sample_rows",
    ),
    AdapterKind.adalora: (*_LOW_RANK, "adalora"),
    AdapterKind.gelora: (*_LOW_RANK, "sample_rows"),
    AdapterKind.lora_mini: (*_LOW_RANK, "lora_mini"),
    AdapterKind.rasa: (*_LOW_RANK, "rasa"),
    AdapterKind.molora: (*_LOW_RANK, "molora"),
    AdapterKind.bottleneck: ("bottleneck", "dropout", "targets", "part", *_HELD),
    AdapterKind.ia3: ("targets", "part", "save_whole"),
    AdapterKind.vera: ("rank", "dropout", "targets", "part", "save_whole", "vera"),
    AdapterKind.oft: ("dropout", "targets", "part", "save_whole", "oft"),
    AdapterKind.prompt: ("prompt", "sample_rows"),
    AdapterKind.ptuning: ("prompt", "sample_rows"),
    AdapterKind.prefix: ("prompt", "sample_rows"),
}


@dataclass(frozen=True, slots=True)
class MethodFacts:
    """What other parts must know of a method."""

    carrier: Carrier  # how its weights go to vLLM
    merges: bool = True  # whole weights can hold its update
    off_is_start: bool = True  # switched off, it leaves the weights that the run starts from
    stacks: bool = False  # adapters of adapter.load stay beside it; else they are merged first


_PLAIN = MethodFacts(Carrier.lora)
_MERGED = MethodFacts(Carrier.merged)
_FACTS: dict[AdapterKind, MethodFacts] = {
    AdapterKind.lora: _PLAIN,
    AdapterKind.adalora: _PLAIN,
    AdapterKind.gelora: _PLAIN,
    AdapterKind.lora_mini: _PLAIN,
    AdapterKind.rasa: _PLAIN,
    AdapterKind.molora: MethodFacts(Carrier.modules, merges=False),
    AdapterKind.bottleneck: MethodFacts(Carrier.modules, merges=False, stacks=True),
    AdapterKind.ia3: _MERGED,
    AdapterKind.vera: _MERGED,
    AdapterKind.oft: _MERGED,
    AdapterKind.prompt: MethodFacts(Carrier.embeds, merges=False),
    AdapterKind.ptuning: MethodFacts(Carrier.embeds, merges=False),
    AdapterKind.prefix: MethodFacts(Carrier.hf, merges=False),
}
# SmolLM2-135M on film reviews (make bench-tuning): 4.3 in the mean of its 30 blocks
_GELORA_RANK = 5
# Methods that put virtual tokens in front of every row.
_VIRTUAL = (AdapterKind.prompt, AdapterKind.ptuning, AdapterKind.prefix)
# Methods, and starts of LoRA, that read nothing of the weights that they are put beside.
_BESIDE_PARTS = (
    AdapterKind.lora,
    AdapterKind.lora_mini,
    AdapterKind.rasa,
    AdapterKind.molora,
    AdapterKind.bottleneck,
)
_PLAIN_STARTS = (LoraInit.default, LoraInit.gaussian, LoraInit.orthogonal)
# Starts of LoRA that move a part of the frozen weights into the adapter.
CHANGES_BASE = (LoraInit.pissa, LoraInit.olora, LoraInit.corda)


def facts_of(adapter: AdapterConfig) -> MethodFacts:
    """What follows from a configured adapter; full training is sent whole, and leaves no start."""
    moved = adapter.kind is AdapterKind.lora and adapter.init in CHANGES_BASE
    if adapter.kind is AdapterKind.none or moved:
        return MethodFacts(Carrier.merged, off_is_start=False)
    facts = _FACTS[adapter.kind]
    if facts.carrier is Carrier.lora and (adapter.dora or adapter.save_whole):
        facts = _MERGED
    if adapter.kind is AdapterKind.lora and adapter.init is LoraInit.loftq:
        return replace(facts, off_is_start=False)  # it starts with its update of the rounded base
    if adapter.kind is AdapterKind.bottleneck and adapter.bottleneck.combine is Composition.fuse:
        return replace(facts, off_is_start=False)  # it starts with the fused adapters
    return facts


def planned_rank(adapter: AdapterConfig) -> int:
    """The mean rank of a layer that plans count with: adapter.rank, or of GeLoRA, whose ranks are
    known when it has read rows, about that of one model on one kind of rows.
    """
    return _GELORA_RANK if adapter.kind is AdapterKind.gelora else adapter.rank


def needs_whole(adapter: AdapterConfig) -> bool:
    """Whether a fresh adapter is made of whole weights, not beside weights in parts (ZeRO-3)."""
    plain = adapter.init in _PLAIN_STARTS and not adapter.dora
    beside = adapter.kind is AdapterKind.none or (adapter.kind in _BESIDE_PARTS and plain)
    return adapter.is_quantized or bool(adapter.load) or not beside


def virtual_tokens(adapter: AdapterConfig) -> int:
    """Positions that a method takes in front of every row."""
    return adapter.prompt.tokens if adapter.kind in _VIRTUAL else 0


def merges(kind: AdapterKind) -> bool:
    """Whether whole weights can hold the update of a method."""
    return kind is AdapterKind.none or _FACTS[kind].merges
