"""Rank-sharing low-rank adaptation (RaSA, He et al. 2025, arXiv:2503.12576).

Of each layer's rank r, k bases go into a pool that all L layers of a kind (all q_proj, say) share,
and every layer weighs all of them by a diagonal of its own:

    dW_i = [B_i B_S] diag(d_i) [A_i; A_S]    A_i [r - k, in], A_S [k L, in]; B_i, B_S likewise

So the rank of an update is r - k + k L for the parameters of rank r, and r - k + k L more for the
diagonal. A starts at Kaiming's uniform distribution, B at 0, d at alpha / 2 / (r - k) for a layer's
own bases and alpha / 2 / (k L) for those of the pool. Followed in the authors' code: the equation,
the starts, the kinds by names, and the sizes of their script (r 8, k 1, alpha 32, all linear
layers). Their k = r, which leaves a layer no basis of its own, is refused here. Not read: the
paper's text beyond its abstract.

The product above is a LoRA of the same rank: `plain_lora` gives it.
"""

import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.utils.integrations import init_empty_weights
from torch import Tensor, nn

from conf.schema import AdapterConfig
from policy.adapters import Fresh, Method, Tuner
from policy.adapters.guards import put_on
from policy.adapters.low_rank import (
    LowRankConfig,
    LowRankLayer,
    LowRankModel,
    Scale,
    dropout_of,
    layers_of,
    options_of,
    plain_lora,
    random_linear,
    zero_linear,
)
from policy.adapters.targets import adapted_linears, check_targets, check_whole, whole_count
from rlhf.types import UserError

NAME = "RASA"
_POOLS = ("rasa_shared_a", "rasa_shared_b")


@dataclass
class RasaConfig(LowRankConfig):
    """What PEFT saves beside the weights."""

    shared: int = 1  # k

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = NAME


class RasaLayer(LowRankLayer):
    """Two steps make an adapter: `put` the layer's own bases, and `share` the pool, whose size is
    known when all layers are there.
    """

    adapter_layer_names = ("rasa_a", "rasa_b", "rasa_scale", *_POOLS)

    def put(self, adapter_name: str, config: RasaConfig, layer_name: str) -> None:
        own = config.r - config.shared
        if own < 1 or config.shared < 1:
            raise ValueError(f"RaSA shares 1 to {config.r - 1} of {config.r}: not {config.shared}")
        self.dropouts[adapter_name] = dropout_of(config.dropout)
        self.rasa_a[adapter_name] = random_linear(self.in_features, own)
        self.rasa_b[adapter_name] = zero_linear(own, self.out_features)

    def share(self, adapter_name: str, config: RasaConfig, layers: int) -> None:
        """Make the pool of `layers` layers, which `tie` makes theirs, and the diagonal."""
        own, pool = config.r - config.shared, config.shared * layers
        self.rasa_shared_a[adapter_name] = random_linear(self.in_features, pool)
        self.rasa_shared_b[adapter_name] = zero_linear(pool, self.out_features)
        half = config.alpha / 2
        starts = [half / own] * own + [half / pool] * pool
        self.rasa_scale[adapter_name] = Scale(torch.tensor(starts, dtype=torch.get_default_dtype()))

    def update(self, adapter_name: str, x: Tensor) -> Tensor:
        own = self.rasa_a[adapter_name](x)
        bases = torch.cat((own, self.rasa_shared_a[adapter_name](x)), dim=-1)
        scaled = self.rasa_scale[adapter_name](bases)
        alone, pooled = scaled.split((own.shape[-1], scaled.shape[-1] - own.shape[-1]), dim=-1)
        return self.rasa_b[adapter_name](alone) + self.rasa_shared_b[adapter_name](pooled)

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        own_a, own_b = self.rasa_a[adapter_name].weight, self.rasa_b[adapter_name].weight
        pool_a, pool_b = (getattr(self, name)[adapter_name].weight for name in _POOLS)
        a = torch.cat((own_a, pool_a))
        b = torch.cat((own_b, pool_b), dim=1)
        return a, b * self.rasa_scale[adapter_name].weight


class RasaModel(LowRankModel):
    """Layers whose pools are one parameter. Each layer has a module of its own around it, so that
    ZeRO-3, which collects a module's parameters when it is called, knows it as a tied weight.
    """

    prefix = "rasa_"
    tuner_layer_cls = RasaLayer

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        super().inject_adapter(
            model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
        )
        config = self.peft_config[adapter_name]
        trains = adapter_name in self.active_adapters and not config.inference_mode
        for layers in _pools(model, adapter_name):
            for layer in layers.values():
                with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                    layer.share(adapter_name, config, len(layers))
                layer._move_adapter_to_device_of_base_layer(adapter_name)
                for name in ("rasa_scale", *_POOLS):
                    getattr(layer, name)[adapter_name].requires_grad_(trains)
        self.tie()
        if not hasattr(self, "_ties_after_load"):
            self._ties_after_load = self.register_load_state_dict_post_hook(_tie_after_load)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        self.tie()  # PEFT makes a parameter for each module whose dtype changes

    def tie(self) -> None:
        """Make the pool of each kind's first layer that of the others, too."""
        for adapter_name in self.peft_config:
            for layers in _pools(self.model, adapter_name):
                first, *others = layers.values()
                for layer in others:
                    for name in _POOLS:
                        pool = getattr(first, name)[adapter_name].weight
                        getattr(layer, name)[adapter_name].weight = pool

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        found = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        return {name: found[name] for name in found if name not in _copies(model, adapter_name)}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        whole = dict(state_dict)
        for copy, original in _copies(model, adapter_name).items():
            names = (cls._remove_adapter_name_from_key(n, adapter_name) for n in (copy, original))
            copied, held = names
            if held in state_dict:
                whole[copied] = state_dict[held]
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, whole)


def _tie_after_load(model: RasaModel, keys: Any) -> None:
    model.tie()  # tensors that are assigned, not copied, are one for each name


def kind_of(name: str) -> str:
    """A layer's name with its block's number left out: layers of one kind share a pool."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name, count=1)


def _pools(model: nn.Module, adapter_name: str) -> list[dict[str, Any]]:
    """The layers that share a pool, by their names in `model`, for each pool."""
    pools: dict[tuple[str, int, int], dict[str, Any]] = {}
    for name, layer in layers_of(model, adapter_name):
        kind = (kind_of(name), layer.in_features, layer.out_features)
        pools.setdefault(kind, {})[name] = layer
    return list(pools.values())


def _copies(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Names in the state dict of the pools that are another layer's, and of these."""
    copies = {}
    for layers in _pools(model, adapter_name):
        first, *others = layers
        for name in others:
            for pool in _POOLS:
                end = f"{pool}.{adapter_name}.weight"
                copies[f"{name}.{end}"] = f"{first}.{end}"
    return copies


def attach(model: Any, adapter: AdapterConfig, fresh: Fresh) -> Any:
    """`model` with a fresh adapter; only it trains. Raises UserError as `lora.attach`."""
    options = options_of(model, adapter, fresh)
    config = RasaConfig(shared=adapter.rasa.shared, **options)
    return put_on(model, adapter, config, RasaLayer)


def check(model: Any, adapter: AdapterConfig, trains_head: bool) -> None:
    """What `attach` refuses before weights load. Raises UserError."""
    if adapter.rasa.shared >= adapter.rank:
        raise UserError(
            f"adapter.rasa.shared={adapter.rasa.shared} leaves a layer none of the "
            f"adapter.rank={adapter.rank} bases of its own: set it below, or raise adapter.rank."
        )
    check_targets(model, adapter.targets, trains_head=trains_head)
    check_whole(model, adapter)


def expected(model: Any, adapter: AdapterConfig) -> int:
    """r (in + out) for each layer adapted, as LoRA, and r - k + k L for its diagonal; and the
    modules that adapter.save_whole names.
    """
    count = whole_count(model, adapter)
    for (_, inputs, outputs), layers in _kinds(model, adapter).items():
        count += layers * (adapter.rank * (inputs + outputs) + _rank(adapter, layers))
    return count


def lora_rank(model: Any, adapter: AdapterConfig) -> tuple[int, str]:
    """r - k + k L of the kind with most layers."""
    layers = max(_kinds(model, adapter).values())
    rank = _rank(adapter, layers)
    shared = adapter.rasa.shared
    return rank, f"adapter.rasa.shared={shared} (updates of rank {rank}, by {layers} layers)"


def _kinds(model: Any, adapter: AdapterConfig) -> Counter[tuple[str, int, int]]:
    """How many layers share a pool, by their kind, inputs and outputs, in a model without it."""
    kinds: Counter[tuple[str, int, int]] = Counter()
    for name, sizes in adapted_linears(model, adapter).items():
        kinds[kind_of(name), *sizes] += 1
    return kinds


def _rank(adapter: AdapterConfig, layers: int) -> int:
    """Of the update of each of so many layers."""
    return adapter.rank - adapter.rasa.shared + adapter.rasa.shared * layers


METHOD = Method(
    attach=attach,
    expected=expected,
    check=check,
    tuner=Tuner(NAME, RasaConfig, RasaModel),
    as_lora=plain_lora,
    lora_rank=lora_rank,
)
