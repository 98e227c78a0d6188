"""Adapters: which weights a stage trains beside a frozen model.

A method is a file here that ends with its `Method`, a line in rlhf/stages/methods.py, which
registers them all, a row in conf/adapters.py of what follows from it, and a preset in conf/adapter.
Stages know the `Method` only, never its file.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conf.choices import AdapterKind, Carrier, EngineKind
from conf.schedule import TrainPart
from conf.schema import AdapterConfig, EngineConfig, ModelConfig, facts_of
from conf.stages import OnlineStage, TrainStage
from policy.engines.loading import Rates, grouped, one_rate, rates_by_name
from policy.model import Gather, is_rounded, no_gather
from policy.saving import (
    adapter_weights,
    full_weights,
    rescuing,
    save_adapter,
    save_as_lora,
    save_model,
)
from rlhf.models.directories import CLASSIFIER, check_further
from rlhf.models.facts import save_tokenizer
from rlhf.models.loading import without_weights
from rlhf.models.parts import ADDED, chosen, outline, places, train_parts
from rlhf.process import distributed
from rlhf.process.libraries import hide_bitsandbytes
from rlhf.types import AdapterWeights, FullWeights, UserError

hide_bitsandbytes()  # before the file of a method imports PEFT
Rows = Sequence[Sequence[int]]  # token ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Fresh:
    """What a method may need of a stage to make a fresh adapter."""

    task: str  # PEFT's task type: CAUSAL_LM, or SEQ_CLS, whose scalar head trains in full
    sample: Callable[[], Rows] | None = None  # rows that the stage trains on, None where none are
    # token ids of a text, None without a tokenizer
    encode: Callable[[str], list[int]] | None = None
    record: Path | None = None  # where what was found in the rows is kept for a resumed run


@dataclass(frozen=True, slots=True)
class Tuner:
    """A method of ours as PEFT knows its own: a name, and the classes of its configuration and of
    its model. What PEFT saves of it are the tensors whose names hold the model's `prefix`.
    """

    name: str
    config: Any
    model: Any


def _nothing_to_check(model: Any, adapter: AdapterConfig, trains_head: bool) -> None:
    """The method takes every model."""


def _nothing_frozen(model: Any, adapter: AdapterConfig) -> int:
    """All that the method adds trains."""
    return 0


def _one_rate(name: str, adapter: AdapterConfig) -> float:
    """Every parameter trains at the stage's learning rate."""
    return 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to train little beside a frozen model. What a method does while it trains is the
    `tending` of the model that `attach` returns (`policy.model.Tending`), what it found its
    `found`.
    """

    # transformers' model -> PEFT's with a fresh adapter; only the adapter trains
    attach: Callable[[Any, AdapterConfig, Fresh], Any]
    # Parameters that train, by the paper's formula; the weights may be on the meta device.
    expected: Callable[[Any, AdapterConfig], int]
    # Numbers of the adapter that never train, buffers too.
    frozen: Callable[[Any, AdapterConfig], int] = _nothing_frozen
    # Raises UserError for options that the model can't have. The weights may be on the meta device;
    # the last argument: whether an adapter on the language model's head trains.
    check: Callable[[Any, AdapterConfig, bool], None] = _nothing_to_check
    tuner: Tuner | None = None  # of ours, None where PEFT has it
    # By the parameter's name: its learning rate over the stage's.
    rate_scale: Callable[[str, AdapterConfig], float] = _one_rate
    # The plain LoRA with the same update, where there is one and PEFT's saved form is another.
    as_lora: Callable[[Any, Gather], AdapterWeights] | None = None
    # What is saved of it: it means the same on the base that it names.
    saved: Callable[[Any, Gather], AdapterWeights] = adapter_weights
    # The largest rank of that LoRA's layers, and the options that give it, as messages name them,
    # where it is not adapter.rank. The weights may be on the meta device.
    lora_rank: Callable[[Any, AdapterConfig], tuple[int, str]] | None = None
    # Paths of the modules that get layers of its own, where it has such. The weights may be on the
    # meta device.
    places: Callable[[Any, AdapterConfig], list[str]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """How a frozen model is held rounded (adapter.quantize)."""

    check: Callable[[AdapterConfig], None]  # raises UserError where its library is missing
    # In place; returns the parameters that are held rounded. Raises UserError.
    quantize: Callable[[Any, AdapterConfig], int]
    # The same weights in full, in place; returns the model.
    round_weights: Callable[[Any, AdapterConfig], Any]


METHODS: dict[AdapterKind, Method] = {}
_HOLDING: list[Holding] = []  # the one that was registered


def register(methods: Mapping[AdapterKind, Method], holding: Holding) -> None:
    """Make `methods` known to the stages, and tuners of ours to PEFT; and how frozen models are
    held rounded.
    """
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )

    METHODS.update(methods)
    _HOLDING[:] = [holding]
    for kind, method in methods.items():
        ADDED[kind] = functools.partial(_added, method)
        tuner: Any = method.tuner
        if tuner is not None:
            PEFT_TYPE_TO_CONFIG_MAPPING[tuner.name] = tuner.config
            PEFT_TYPE_TO_TUNER_MAPPING[tuner.name] = tuner.model
            PEFT_TYPE_TO_PREFIX_MAPPING[tuner.name] = tuner.model.prefix


def _added(method: Method, model: Any, adapter: AdapterConfig) -> tuple[int, int]:
    """What plans of memory and disk count. Raises UserError as `Method.check`."""
    method.check(model, adapter, True)
    return method.expected(model, adapter), method.frozen(model, adapter)


def method_of(adapter: AdapterConfig) -> Method:
    """The method of adapter.kind. Raises RuntimeError before any was registered."""
    if adapter.kind not in METHODS:
        raise RuntimeError(
            f"adapter.kind={adapter.kind.value} is not registered: rlhf/stages/methods.py does it"
        )
    return METHODS[adapter.kind]


def attach(
    model: Any,
    adapter: AdapterConfig,
    *,
    task: str,
    base: str | None = None,
    trains_head: bool = True,
    sample: Callable[[], Rows] | None = None,
    train: TrainPart | None = None,
    tokenizer: Any = None,
    record: Path | None = None,
) -> Any:
    """`model` with a fresh adapter of the method adapter.kind (only it trains), or `model` itself,
    of which what `train` names trains, every weight by default. With adapter.quantize the model
    beside the adapter is held rounded.

    `task` is PEFT's task type: ``CAUSAL_LM`` or ``SEQ_CLS`` (whose scalar head trains in full
    beside the adapter). base: what the saved adapter names as its base, a directory or hub's name
    of the whole weights in `model`; a directory is named absolutely, so that the adapter finds it
    from anywhere. trains_head: whether an adapter on the language model's head trains. sample: rows
    of token ids for methods that look at data first; record: the file that keeps what they found,
    for a resumed run. tokenizer: for those that start from a text. Raises UserError for options
    that the model can't have.
    """
    if adapter.kind is AdapterKind.none:
        train_parts(model, train or TrainPart())
        return model
    prepare(model, adapter, trains_head=trains_head)
    encode = None if tokenizer is None else functools.partial(_token_ids, tokenizer)
    fresh = Fresh(task=task, sample=sample, encode=encode, record=record)
    adapted = method_of(adapter).attach(model, adapter, fresh)
    if base is not None:
        directory = Path(base).expanduser()
        name = str(directory.resolve()) if directory.is_dir() else base
        for config in adapted.peft_config.values():
            config.base_model_name_or_path = name
    return adapted


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def prepare(model: Any, adapter: AdapterConfig, *, trains_head: bool = True) -> None:
    """What `attach` does first: the method's check and, with adapter.quantize, the model held
    rounded. Nothing of a model that is already. Raises UserError.
    """
    if is_rounded(model):
        return
    method_of(adapter).check(model, adapter, trains_head)
    if adapter.is_quantized:
        _HOLDING[0].quantize(model, adapter)


def round_weights(model: Any, adapter: AdapterConfig) -> Any:
    """`model` with the weights that `prepare` would hold rounded, as plain weights, in place."""
    return _HOLDING[0].round_weights(model, adapter)


def check(
    model: ModelConfig,
    adapter: AdapterConfig,
    *,
    task: str,
    trains_head: bool = True,
    stage: TrainStage | None = None,
) -> None:
    """What `attach` would refuse, told by the model's configuration before any weight loads; of a
    hub's model, a GGUF file and a new ``model=tiny`` `attach` itself tells it. stage: whose options
    say which weights train. Raises UserError.
    """
    if stage is not None:
        check_parts(stage, adapter)
    check_further(model, adapter, task)
    whole = adapter.kind is AdapterKind.none
    if whole and (stage is None or stage.trains_alike):
        return
    if adapter.is_quantized:
        _HOLDING[0].check(adapter)
    empty = without_weights(model, classifier=task == CLASSIFIER)
    if empty is None:
        return
    if not whole:
        method_of(adapter).check(empty, adapter, trains_head)
    elif stage is not None:
        chosen(outline(empty), stage.train)


def check_parts(stage: TrainStage, adapter: AdapterConfig) -> None:
    """Options of which weights train and when, which no model makes right. Raises UserError."""
    unread = None
    if adapter.kind is AdapterKind.none:
        unread = adapter.unread_in_full(critic=getattr(stage, "critic_adapter", False))
    if unread is not None:
        raise UserError(
            f"{unread} with adapter=none, which trains all weights and does not read it. Set the "
            "adapter that it is for (such as adapter=lora), or leave it out."
        )
    if adapter.kind is not AdapterKind.none and not stage.trains_alike:
        raise UserError(
            f"adapter={adapter.kind.value} trains beside a frozen model, whose parts "
            "stage.train, stage.unfreeze and stage.depth_decay are about. Set adapter=none, or "
            "leave these options as they are."
        )
    if isinstance(stage, OnlineStage) and stage.unfreeze.patience is not None:
        raise UserError(
            f"stage.unfreeze.patience={stage.unfreeze.patience}: stage={stage.name} has no "
            "held-out loss that could stall. Set stage.unfreeze.every."
        )


def rates_of(model: Any, stage: TrainStage, adapter: AdapterConfig) -> Rates:
    """The groups of what trains in `model`, as `attach` returned it: by the rates of the adapter's
    method, or by stage.depth_decay and stage.unfreeze.
    """
    if adapter.kind is not AdapterKind.none:
        scale = method_of(adapter).rate_scale
        return rates_by_name(model, lambda name: scale(name, adapter))
    if stage.depth_decay == 1.0 and not stage.unfreeze.on:
        return one_rate(model)
    parts = outline(model)
    names = {name for name, param in model.named_parameters() if param.requires_grad}
    trained = [weight for weight in parts.weights if weight.name in names]
    placed = places(parts, trained, stage.depth_decay, stage.unfreeze)
    groups = grouped(model, lambda name, param: placed[name])
    return Rates(groups, stage.unfreeze.factor, stage.unfreeze.every)


def sent_rank(model: ModelConfig, adapter: AdapterConfig) -> tuple[int, str] | None:
    """The rank of the LoRA that generators get, and what gives it, as `Method.lora_rank`. None for
    a method whose LoRA has adapter.rank, or none, and for a model whose configuration is not known
    before its weights load.
    """
    if adapter.kind is AdapterKind.none:
        return None
    rank_of = method_of(adapter).lora_rank
    if rank_of is None:
        return None
    empty = without_weights(model)
    if empty is None:
        return None
    return rank_of(empty, adapter)


def places_of(model: ModelConfig, adapter: AdapterConfig) -> tuple[str, list[str]] | None:
    """transformers' model type and the modules that get layers of the adapter's own (as
    `Method.places`). None for a method without, and for a model whose configuration is not known
    before its weights load.
    """
    if adapter.kind is AdapterKind.none:
        return None
    places_in = method_of(adapter).places
    empty = None if places_in is None else without_weights(model)
    if places_in is None or empty is None:
        return None
    return str(empty.config.model_type), places_in(empty, adapter)


def sender(
    adapter: AdapterConfig, carrier: Carrier, *, vllm: bool
) -> Callable[[Any, Gather], FullWeights | AdapterWeights]:
    """What makes of a model the weights that its generator gets: whole ones, the plain LoRA with
    the adapter's update, or the adapter as it is.
    """
    if carrier is Carrier.merged:
        return full_weights
    as_lora = method_of(adapter).as_lora
    if vllm and carrier is Carrier.lora and as_lora is not None:
        return as_lora
    return adapter_weights


def lora_rank(weights: FullWeights | AdapterWeights) -> int:
    """The largest rank of a LoRA's layers, by its configuration."""
    assert isinstance(weights, AdapterWeights), "whole weights have no rank"
    config: Any = weights.config
    return max([config["r"], *config.get("rank_pattern", {}).values()])


def save(
    model: Any,
    adapter: AdapterConfig,
    tokenizer: Any,
    directory: Path,
    gather: Gather = no_gather,
    *,
    dtype: torch.dtype | None = None,
    alone: bool = False,
) -> None:
    """What a run leaves of its weights in `directory`: model/, from which every stage starts, and
    with an adapter adapter/, in its method's own form, and lora/, the plain LoRA of the same
    update, where that is another.

    model/ has whole weights in `dtype`; where they can't hold the adapter, or with `alone`, it has
    the adapter, which names its base. A collective.
    """
    with rescuing(model, directory, gather):
        whole = facts_of(adapter).merges and not alone
        if adapter.kind is not AdapterKind.none:
            method = method_of(adapter)
            save_adapter(model, directory / "adapter", gather, method.saved, adapter.name)
            save_as_lora(method.as_lora, model, directory / "lora", gather, adapter.name)
            if not whole:
                save_adapter(model, directory / "model", gather, method.saved, adapter.name)
        if whole:
            save_model(model, tokenizer, directory / "model", gather, dtype)
        elif distributed.is_main():
            save_tokenizer(tokenizer, directory / "model")
        distributed.barrier()


def check_budget(adapter: AdapterConfig, engine: EngineConfig, patience: int | None = None) -> None:
    """AdaLoRA's penalty finds whole weights, and it can end on its budget. Raises UserError."""
    if adapter.kind is not AdapterKind.adalora:
        return
    if engine.kind is EngineKind.deepspeed and engine.zero_stage == 3:
        raise UserError(
            "adapter=adalora with engine=zero3: its penalty reads whole weights outside of the "
            "layers that hold them, which ZeRO-3 keeps in parts. Set engine=zero2, or adapter=lora."
        )
    if patience is not None:
        raise UserError(
            f"stage.patience={patience} with adapter=adalora: training that ends early ends with "
            "larger ranks than adapter.rank. Set stage.patience=null, or adapter=lora."
        )


def spaced(rows: int, count: int) -> list[int]:
    """The numbers of at most `count` of so many rows, evenly spaced."""
    taken = min(count, rows)
    return [i * rows // taken for i in range(taken)]


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass (Chen et al. 2016, arXiv:1604.06174); also under a
    frozen embedding (LoRA).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
