"""Low-rank adaptation by PEFT.

LoRA (Hu et al. 2021, arXiv:2106.09685), with rank-stabilised scaling (rsLoRA, Kalajdzievski 2023,
arXiv:2312.03732), with magnitudes that train apart (DoRA, Liu et al. 2024, arXiv:2402.09353), with
two learning rates (LoRA+, Hayou et al. 2024, arXiv:2402.12354), with A frozen (LoRA-FA, Zhang et
al. 2023, arXiv:2308.03303), and with the starts of policy/adapters/starts.py, sampled.py and
loftq.py.

LoRA-FA's authors also correct the gradient of B by the inverse of A A^T, as PEFT's optimizer for it
does. Here AdamW steps B with its plain gradient, as in the paper's first version.
"""

from typing import Any

import torch

from conf.adapters import CHANGES_BASE
from conf.choices import LoraInit
from conf.schema import AdapterConfig
from policy.adapters import Fresh, Method, sampled, starts
from policy.adapters.guards import put_on
from policy.adapters.quantized import QuantizedLinear
from policy.adapters.targets import (
    ALL_LINEAR,
    adapted_layers,
    adapted_linears,
    alpha_of,
    check_patterns,
    check_targets,
    check_whole,
    heads_of,
    modules_to_save,
    peft_targets,
    rank_of,
    sizes,
    whole_count,
)
from policy.model import Gather
from policy.saving import adapter_weights
from rlhf.types import AdapterWeights, UserError

__all__ = [
    "ALL_LINEAR",
    "METHOD",
    "adapted_linears",
    "attach",
    "check",
    "check_targets",
    "expected",
    "heads_of",
    "modules_to_save",
    "peft_targets",
    "put_on",
]


def attach(model: Any, adapter: AdapterConfig, fresh: Fresh) -> Any:
    """`model` with a fresh adapter; only it trains. Raises UserError by the family's name for
    layers that PEFT can't adapt.
    """
    if adapter.init is LoraInit.eva:
        adapted = _attach_eva(model, adapter, fresh)
    elif adapter.init is LoraInit.loftq:
        adapted = _attach_loftq(model, adapter, fresh)
    elif adapter.init in CHANGES_BASE:
        adapted = _attach_part(model, adapter, fresh)
    else:
        config = _config(model, adapter, fresh.task)
        config.init_lora_weights = _plain_start(adapter.init)
        adapted = _adapt(model, adapter, config)
    if adapter.freeze_a:
        _freeze_a(adapted)
    return adapted


def _config(model: Any, adapter: AdapterConfig, task: str) -> Any:
    """PEFT's configuration of the adapter, with LoRA's own start."""
    from peft import LoraConfig

    return LoraConfig(
        task_type=task,
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=peft_targets(model, adapter),
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        rank_pattern=dict(adapter.rank_pattern),
        alpha_pattern=dict(adapter.alpha_pattern),
        modules_to_save=modules_to_save(model, adapter, task),
    )


def _plain_start(init: LoraInit) -> Any:
    """PEFT's name of a start that leaves the base as it is."""
    return True if init is LoraInit.default else init.value


def _adapt(model: Any, adapter: AdapterConfig, config: Any) -> Any:
    """The model with a fresh adapter. Its configuration says from then on that the start is the
    usual one: whoever loads the adapter must not start it anew.
    """
    from peft.tuners.lora import Linear

    adapted = put_on(model, adapter, config, Linear)
    config.init_lora_weights = True
    return adapted


def _attach_part(model: Any, adapter: AdapterConfig, fresh: Fresh) -> Any:
    """An adapter that starts as a part of the base, and that part taken out of it. The model keeps
    what it was (`saved`).
    """
    names = list(adapted_layers(model, adapter))
    config = _config(model, adapter, fresh.task)
    config.target_modules = names
    if adapter.init is LoraInit.corda:
        starts.prepare_corda(model, config, _rows(adapter, fresh))
    config.init_lora_weights = starts.peft_name(adapter.init.value, model, names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a run that goes on takes the same part out again
        adapted = _adapt(model, adapter, config)
    config.corda_config = None
    adapted.start_pairs = starts.pairs_of(adapted)
    return adapted


def _attach_eva(model: Any, adapter: AdapterConfig, fresh: Fresh) -> Any:
    """An adapter whose A and whose ranks are what rows of the task say; scales stay as configured,
    whatever rank a layer gets.
    """
    ranks = {name: rank_of(name, adapter) for name in adapted_layers(model, adapter)}
    chosen = sampled.eva(model, ranks, _rows(adapter, fresh))
    config = _config(model, adapter, fresh.task)
    config.target_modules = list(chosen)
    for name, rows in chosen.items():
        growth = len(rows) / ranks[name]
        if adapter.rslora:
            growth **= 0.5
        config.rank_pattern[name] = len(rows)
        config.alpha_pattern[name] = growth * alpha_of(name, adapter)
    adapted = _adapt(model, adapter, config)
    base = adapted.get_base_model()
    for name, rows in chosen.items():
        layer = base.get_submodule(name)
        down = layer.lora_A[layer.active_adapter[0]]
        down.weight.data.copy_(rows)
    return adapted


def _attach_loftq(model: Any, adapter: AdapterConfig, fresh: Fresh) -> Any:
    """An adapter that starts at what rounding lost, which the layers that hold rounded weights have
    kept until now; the usual start beside layers that are as they were.
    """
    kept = {}
    for name, layer in adapted_layers(model, adapter).items():
        if isinstance(layer, QuantizedLinear) and layer.lost is not None:
            kept[name], layer.lost = layer.lost, None
    adapted = _adapt(model, adapter, _config(model, adapter, fresh.task))
    base = adapted.get_base_model()
    for name, (down, up) in kept.items():
        layer = base.get_submodule(name)
        active = layer.active_adapter[0]
        layer.lora_A[active].weight.data.copy_(down)
        layer.lora_B[active].weight.data.copy_(up)
    return adapted


def _rows(adapter: AdapterConfig, fresh: Fresh) -> sampled.Rows:
    """The rows that a start looks at. Raises UserError where the stage has none."""
    if fresh.sample is None:
        raise UserError(
            f"adapter.init={adapter.init.value} looks at rows before it trains, and there are none "
            "here. Set another adapter.init."
        )
    return fresh.sample()


def _freeze_a(adapted: Any) -> None:
    """Let B train alone. PEFT is told, since it lets all of an adapter train again whenever the
    adapter was switched off and on.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.variants import _register_frozen_peft_weight

    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            name = module.active_adapter[0]
            _register_frozen_peft_weight(module, name, "lora_A")


def check(model: Any, adapter: AdapterConfig, trains_head: bool) -> None:
    """What `attach` refuses before weights load. Raises UserError."""
    if adapter.freeze_a and adapter.rate_ratio != 1:
        raise UserError(
            f"adapter.rate_ratio={adapter.rate_ratio:g} with adapter.freeze_a=true, where B trains "
            "alone. Set adapter.rate_ratio=1."
        )
    check_targets(model, adapter.targets, trains_head=trains_head)
    check_patterns(model, adapter)
    check_whole(model, adapter)
    if adapter.init not in (*CHANGES_BASE, LoraInit.eva, LoraInit.loftq):
        return
    for name, layer in adapted_layers(model, adapter).items():
        inputs, outputs = sizes(layer)
        rank = rank_of(name, adapter)
        if isinstance(layer, torch.nn.Embedding):
            raise UserError(
                f"adapter.init={adapter.init.value} has no start for {name}, an embedding. Leave "
                "it out of adapter.targets, or set another adapter.init."
            )
        if rank > min(inputs, outputs):
            raise UserError(
                f"adapter.init={adapter.init.value}: {name} has {inputs} inputs and {outputs} "
                f"outputs, too few for {rank} directions. Lower its rank (adapter.rank, "
                "adapter.rank_pattern)."
            )


def expected(model: Any, adapter: AdapterConfig) -> int:
    """r (in + out) for each layer adapted, r out where A is frozen; DoRA adds out, and
    adapter.save_whole its modules. EVA's ranks are known only when it has seen rows: by about as
    much.
    """
    count = 0
    for name, layer in adapted_layers(model, adapter).items():
        inputs, outputs = sizes(layer)
        width = outputs
        if not adapter.freeze_a:
            width += inputs
        count += rank_of(name, adapter) * width
        if adapter.dora:
            count += outputs
    return count + whole_count(model, adapter)


def lora_rank(model: Any, adapter: AdapterConfig) -> tuple[int, str]:
    """The largest rank of a layer as configured; EVA's are known when it has seen rows."""
    rank = max(adapter.rank, *adapter.rank_pattern.values(), 0)
    if rank > adapter.rank:
        return rank, f"adapter.rank_pattern={dict(adapter.rank_pattern)}"
    return rank, f"adapter.rank={rank}"


def rate_scale(name: str, adapter: AdapterConfig) -> float:
    """LoRA+: adapter.rate_ratio for B, which starts at 0; 1 for A and for all else. The matrices of
    an adapted embedding, whose parts are the other way round, keep one rate.
    """
    return adapter.rate_ratio if ".lora_B." in name else 1.0


def saved(model: Any, gather: Gather) -> AdapterWeights:
    """The adapter as it means the same on the base that it names: where it started as a part of
    that base, the LoRA of twice the rank that adds the difference.
    """
    weights = adapter_weights(model, gather)
    pairs = getattr(model, "start_pairs", None)
    if pairs is None:
        return weights
    return starts.as_plain(weights, pairs)


METHOD = Method(
    attach=attach,
    expected=expected,
    check=check,
    rate_scale=rate_scale,
    saved=saved,
    lora_rank=lora_rank,
)
