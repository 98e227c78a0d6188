"""Adapters that put small layers into a model (rlhf/models/inserted.py) as tuners of PEFT: saved
and loaded, switched on and off as PEFT's own ones. No weights can hold what they add.
"""

import logging
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from rlhf.models.inserted import ATTRIBUTES, BOTTLENECK, MOLORA, Insert, insert_into, make_insert
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.policy")


@dataclass
class InsertConfig(PeftConfig):
    """What both kinds' adapter_config.json hold."""

    # paths of the adapted modules, or their ends; PEFT's "all-linear"
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    dropout: float = field(default=0.0)


@dataclass
class BottleneckPeftConfig(InsertConfig):
    """adapter_config.json of bottleneck adapters."""

    width: int = field(default=0)  # of the model's hidden states
    placement: str = field(default="pfeiffer")
    # name, size, nonlinearity and scale of each block, in the order in which they are applied
    blocks: list[dict[str, Any]] = field(default_factory=list)
    combine: str = field(default="stack")
    held: list[str] = field(default_factory=list)  # blocks that don't train

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BOTTLENECK


@dataclass
class MoLoraPeftConfig(InsertConfig):
    """adapter_config.json of mixtures of low-rank experts."""

    r: int = field(default=4)
    alpha: float = field(default=16.0)
    experts: int = field(default=10)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MOLORA


class InsertLayer(nn.Module, BaseTunerLayer):
    """A module with inserts behind or beside it, one for each adapter by its name."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())

    @property
    def inserts(self) -> nn.ModuleDict:
        held: nn.ModuleDict = getattr(self, self.adapter_layer_names[0])
        return held

    def add(self, name: str, insert: Insert, *, inference: bool) -> None:
        """Put in the insert of a further adapter; inference: it does not train."""
        # a layer that is held rounded has buffers
        held = [*self.base_layer.parameters(), *self.base_layer.buffers()]
        dtype = torch.float32
        if held[0].is_floating_point():
            # as PEFT's: the weights that train are never in half precision
            dtype = torch.promote_types(held[0].dtype, torch.float32)
        self.inserts[name] = insert.to(held[0].device, dtype)
        self.set_adapter(self.active_adapters, inference_mode=inference)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Switched off, it still has the parts that earlier adapters brought and that don't train:
        then it is what the run starts from.
        """
        output = self.base_layer(*args, **kwargs)
        inserts: Any = self.inserts
        for name in self.active_adapters:
            if name in inserts:
                insert = inserts[name].at_start if self.disable_adapters else inserts[name]
                output = insert_into(insert, args, kwargs, output)
        return output

    def _freeze_non_trainable_peft_weights(self, adapter_names: Any = None) -> None:
        """PEFT asks this wherever it lets an adapter train."""
        inserts: Any = self.inserts
        for insert in inserts.values():
            insert.freeze_held()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise UserError(
            f"{type(self).__name__}: what this adapter adds depends on the input, so no weights "
            "can hold it. Keep the adapter beside its base."
        )

    def unmerge(self) -> None:
        self.merge()

    def __getattr__(self, name: str) -> Any:
        """A family's code may look at the module itself, such as at its configuration."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or "base_layer" not in self._modules:
                raise
            return getattr(self._modules["base_layer"], name)


class BottleneckLayer(InsertLayer):
    """A module with bottlenecks."""

    adapter_layer_names = (ATTRIBUTES[BOTTLENECK],)


class MoLoraLayer(InsertLayer):
    """A linear layer with experts."""

    adapter_layer_names = (ATTRIBUTES[MOLORA],)


class InsertModel(BaseTuner):
    """Replaces the adapted modules by layers with inserts."""

    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: Any,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        is_layer = isinstance(target, self.tuner_layer_cls)
        layer: Any = target if is_layer else self.tuner_layer_cls(target)
        insert = make_insert(asdict(peft_config), *self._widths(peft_config, layer.base_layer))
        layer.add(adapter_name, insert, inference=peft_config.inference_mode)
        if not is_layer:
            # PEFT's _replace_module asks for a parameter, and layers held rounded have none
            setattr(parent, target_name, layer)

    def _widths(self, config: Any, module: nn.Module) -> tuple[int, int]:
        raise NotImplementedError

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """PEFT looks for the name at the end; here it stands before the insert's own names."""
        attribute = f".{cls.tuner_layer_cls.adapter_layer_names[0]}."
        path, found, rest = key.partition(attribute)
        if not found:
            return super()._remove_adapter_name_from_key(key, adapter_name)
        return path + attribute + rest.removeprefix(f"{adapter_name}.")


class BottleneckModel(InsertModel):
    """PEFT's model of bottleneck adapters."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _widths(self, config: Any, module: nn.Module) -> tuple[int, int]:
        return config.width, config.width


class MoLoraModel(InsertModel):
    """PEFT's model of mixtures of low-rank experts."""

    prefix = "molora_"
    tuner_layer_cls = MoLoraLayer

    def _widths(self, config: Any, module: nn.Module) -> tuple[int, int]:
        return linear_widths(module)


def linear_widths(module: Any) -> tuple[int, int]:
    """in and out of a linear layer, or of GPT-2's layers, which hold the transposed weight. Raises
    UserError for another module.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":
        shape = getattr(module.weight, "ds_shape", module.weight.shape)
        return int(shape[0]), int(shape[1])
    raise UserError(
        f"adapter.targets: {type(module).__name__} is no linear layer, so no low-rank experts can "
        "stand beside it. Name linear layers."
    )


def uncalled_layers(adapted: Any) -> list[str]:
    """The places of an adapted model whose layers a pass over 16 tokens does not call, such as one
    whose weight the model multiplies by itself. None of a model on the meta device, and of one
    that can't run the pass, which gets a warning.
    """
    layers = {m: name for name, m in adapted.named_modules() if isinstance(m, InsertLayer)}
    if any(param.is_meta for param in adapted.parameters()):
        return []
    called: set[Any] = set()
    hooks = [m.register_forward_hook(lambda layer, *given: called.add(layer)) for m in layers]
    training, vocabulary = adapted.training, adapted.config.get_text_config().vocab_size
    ids = torch.arange(16, device=adapted.device).remainder(vocabulary)
    try:
        with torch.no_grad():
            adapted.eval()(input_ids=ids[None])
    # A family's forward may want anything beside token ids.
    except Exception as error:  # noqa: BLE001
        LOG.warning(
            "adapter: whether %s calls every adapted layer is not known: 16 tokens end in %s: %s",
            adapted.config.model_type,
            type(error).__name__,
            error,
        )
        return []
    finally:
        adapted.train(training)
        for hook in hooks:
            hook.remove()
    return [name for layer, name in layers.items() if layer not in called]
