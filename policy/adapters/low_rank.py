"""What tuners of our own for PEFT share whose update of a linear layer is the product of two
matrices: the layer and the model around it, merging, and the plain LoRA with the same update.

A parameter stands in a small module that is called with the input (`nn.Linear`, `Scale`), never in
a ``ParameterDict``: DeepSpeed's ZeRO-3 collects a module's parameters when it is called.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _get_in_out_features,
    check_adapters_to_merge,
)
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from conf.schema import AdapterConfig
from policy.adapters import Fresh
from policy.adapters.targets import modules_to_save, peft_targets
from policy.model import Gather
from policy.saving import adapter_weights, plain_values
from rlhf.types import AdapterWeights


@dataclass
class LowRankConfig(PeftConfig):
    """What PEFT saves beside the weights of every such method."""

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list):
                setattr(self, name, set(value))


class Scale(nn.Module):
    """A number for each entry of the last dimension, by which it is multiplied."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class LowRankLayer(nn.Module, BaseTunerLayer):
    """A linear layer W that is frozen, and by adapters' names updates of it: y = W x + B A x.

    A method says in `adapter_layer_names` which of its ``ModuleDict`` s by adapters' names train,
    and in `other_param_names` which others it has.
    """

    other_param_names: tuple[str, ...] = ("dropouts",)

    if TYPE_CHECKING:  # what torch says of a module's attributes hides PEFT's

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer())
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.transposed = isinstance(self.get_base_layer(), Conv1D)  # its weight is [in, out]
        self.merged_adapters: list[str] = []
        for name in (*self.adapter_layer_names, *self.other_param_names):
            setattr(self, name, nn.ModuleDict())

    @abstractmethod
    def put(self, adapter_name: str, config: Any, layer_name: str) -> None:
        """Make the modules of a fresh adapter, whose update is 0."""

    @abstractmethod
    def update(self, adapter_name: str, x: Tensor) -> Tensor:
        """The update's part of the output: `x` [..., in] -> [..., out]."""

    @abstractmethod
    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r], every scale in them: the update is B A."""

    def has(self, adapter_name: str) -> bool:
        return adapter_name in getattr(self, self.adapter_layer_names[0])

    def own_parameters(self) -> list[nn.Parameter]:
        """Those of all adapters, without the frozen layer's."""
        named = self.named_parameters()
        return [param for name, param in named if not name.startswith("base_layer.")]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if self.has(name):
                (param, *_) = getattr(self, self.adapter_layer_names[0])[name].parameters()
                dropped = self.dropouts[name](self._cast_input_dtype(x, param.dtype))
                result = result + self.update(name, dropped)
        return result.to(dtype)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The update in the shape of the frozen layer's weight."""
        a, b = self.factors(adapter_name)
        if self.transposed:
            return (b @ a).T
        return b @ a

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of the active adapters, or of `adapter_names`, to the frozen weight.

        Raises ValueError with `safe_merge` for a sum that isn't finite; the weight is as it was.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if not self.has(name):
                continue
            weight = self.get_base_weight()
            update = self.get_delta_weight(name).to(weight)
            if safe_merge and not torch.isfinite(weight + update).all():
                raise ValueError(f"the weight merged with the adapter {name} is not finite")
            weight += update  # in place: ZeRO-3 knows the tensor
            self.set_base_weight(weight)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take the updates that were merged off the weight again, up to rounding."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            weight = self.get_base_weight()
            weight -= self.get_delta_weight(name).to(weight)
            self.set_base_weight(weight)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class LowRankModel(BaseTuner):
    """A model whose target layers are replaced by layers of `tuner_layer_cls`."""

    tuner_layer_cls: type[LowRankLayer]
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer: Any = target
        if not isinstance(target, self.tuner_layer_cls):
            if not isinstance(target, nn.Linear | Conv1D):
                raise ValueError(
                    f"{current_key} is a {type(target).__name__}, and only linear layers can be "
                    "adapted so"
                )
            layer = self.tuner_layer_cls(target)
            layer._active_adapter = self.active_adapter
        layer.put(adapter_name, peft_config, current_key)
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        layer.set_adapter(self.active_adapters)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)


def layers_of(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, LowRankLayer]]:
    """The layers that hold the adapter, by their names in `model`."""
    for name, module in model.named_modules():
        if isinstance(module, LowRankLayer) and module.has(adapter_name):
            yield name, module


def random_linear(inputs: int, outputs: int) -> nn.Linear:
    """A matrix that starts as LoRA's A: Kaiming's uniform distribution, variance 1 / (3 inputs)."""
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
    return linear


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A matrix that starts as LoRA's B: 0."""
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.zeros_(linear.weight)
    return linear


def dropout_of(probability: float) -> nn.Module:
    if probability > 0:
        return nn.Dropout(probability)
    return nn.Identity()


def options_of(model: Any, adapter: AdapterConfig, fresh: Fresh) -> dict[str, Any]:
    """What `LowRankConfig` has of the options."""
    return {
        "task_type": fresh.task,
        "r": adapter.rank,
        "alpha": adapter.alpha,
        "dropout": adapter.dropout,
        "target_modules": peft_targets(model, adapter),
        "modules_to_save": modules_to_save(model, adapter, fresh.task),
    }


def plain_lora(model: Any, gather: Gather, adapter_name: str = "default") -> AdapterWeights:
    """The LoRA whose product is the adapter's update in each layer of a PeftModel, with the modules
    that train in full beside it: what programs can read that know LoRA only.

    Scales are in B, so alpha is the rank everywhere. Layers may differ in rank (``rank_pattern``).
    Collective under ZeRO-3.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, layer in layers_of(model, adapter_name):
        with gather(layer.own_parameters()), torch.no_grad():
            a, b = (factor.clone() for factor in layer.factors(adapter_name))
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        ranks[name.removeprefix("base_model.model.")] = len(a)
    native = adapter_weights(model, gather)
    prefix = model.base_model.prefix
    tensors |= {name: value for name, value in native.tensors.items() if prefix not in name}
    rank = max(ranks.values())
    others = {name: own for name, own in ranks.items() if own != rank}
    config = model.peft_config[adapter_name]
    plain = LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=config.inference_mode,
        r=rank,
        lora_alpha=rank,
        lora_dropout=config.dropout,
        target_modules=sorted(config.target_modules),
        modules_to_save=config.modules_to_save,
        rank_pattern=others,
        alpha_pattern=dict(others),
    )
    return AdapterWeights(tensors, plain_values(plain.to_dict()))
