"""PEFT's side of virtual tokens (policy/adapters/virtual.py): configurations, and a tuner that
saves and loads the files of PEFT's own prompt tuning, P-tuning and prefix tuning.

PEFT chooses classes by the type that a configuration names. In this process these are the ones
behind its three types (`policy.adapters.register`), so that `PeftModel.from_pretrained` reads
anyone's adapter of virtual tokens into hooks on the backbone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper, set_additional_trainable_modules
from torch import Tensor

from policy.adapters.virtual import LAYER, Encoded, VirtualTokens, plain
from rlhf.models.parts import backbone_name

SAVED = "prompt_embeddings"  # PEFT's name of the one tensor in a saved adapter
TRAINING = "prompt_encoder."  # how the names of an encoder's tensors begin in a checkpoint
# how the names of whole modules begin in a tuner's files, and in those of PEFT's virtual tokens
_OURS, _THEIRS = "base_model.model.", "base_model."


# ---- configurations: PEFT's, for the tuner below ----


class _Tuned:
    """What turns one of PEFT's configurations into one of a tuner."""

    @property
    def is_prompt_learning(self) -> bool:
        """PEFT asks this to choose its own classes."""
        return False


@dataclass
class PromptConfig(_Tuned, PromptTuningConfig):
    """PEFT's PROMPT_TUNING."""


@dataclass
class EncodedConfig(_Tuned, PromptEncoderConfig):
    """PEFT's P_TUNING."""


@dataclass
class PrefixConfig(_Tuned, PrefixTuningConfig):
    """PEFT's PREFIX_TUNING."""


def layer_of(model: Any) -> VirtualTokens | None:
    """The virtual tokens of a PeftModel or of the transformers model in it; None where it has
    none.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = getattr(getattr(base, backbone_name(base)), LAYER, None)
    return found if isinstance(found, VirtualTokens) else None


# ---- for PEFT ----


class VirtualModel(BaseTuner):
    """PEFT's tuner around a model whose backbone has virtual tokens."""

    prefix = "virtual_values"  # in no layer's own name: PEFT skips those that it is in
    tuner_layer_cls = VirtualTokens
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Give the backbone of `model` the virtual tokens of the adapter's configuration."""
        config = self.peft_config[adapter_name]
        backbone = getattr(model, backbone_name(model))
        layer = getattr(backbone, LAYER, None)
        if layer is None:
            layer = VirtualTokens()
            setattr(backbone, LAYER, layer)
            layer.hook(model, backbone)
        weight = backbone.get_input_embeddings().weight
        layer.add(adapter_name, config, weight.dtype, weight.device)
        self.targeted_module_names.append(LAYER)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._mark_only_adapters_as_trainable(model)
        set_additional_trainable_modules(
            model=model,
            peft_config=config,
            model_config=BaseTuner.get_model_config(self),
            adapter_name=adapter_name,
            activate_adapter=adapter_name in self.active_adapters,
        )
        for _, wrapper in _whole_modules(model):
            # PEFT would look for a tuner's names: `_remap_adapter_state_dict_for_load`
            wrapper.adapter_state_dict_load_map = _nothing

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("no module is replaced")

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        layer = layer_of(self.model)
        assert layer is not None
        if merge:
            layer.merge()
        layer.unhook()
        delattr(getattr(self.model, backbone_name(self.model)), LAYER)
        del self.model.peft_config
        return self.model

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: Any, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """What is saved: the values, and of an encoder that trains its tensors, too, without which
        training could not go on.
        """
        mark = f".{LAYER}.virtual_values.{adapter_name}."
        own = {key.split(mark)[1]: value for key, value in state_dict.items() if mark in key}
        encoder = {key: value for key, value in own.items() if key.startswith("mlp_head.")}
        values = own["embedding.weight"]
        if not encoder:
            return {SAVED: values}
        hidden, width = encoder["mlp_head.0.weight"].shape
        module = Encoded(len(values), width, hidden).to(values)
        folded = torch.func.functional_call(module, own)
        return {SAVED: folded.detach()} | {TRAINING + key: value for key, value in own.items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if key.startswith(TRAINING):
            return key
        plain_key = super()._remove_adapter_name_from_key(key, adapter_name)
        if plain_key.startswith(_OURS):
            return _THEIRS + plain_key.removeprefix(_OURS)
        return plain_key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: Any
    ) -> dict[str, Tensor]:
        """The tensors of a saved adapter by the model's names. Values without their encoder, which
        every finished adapter has, are loaded in the encoder's place.
        """
        layer = layer_of(model)
        assert layer is not None
        (place,) = [name for name, module in model.named_modules() if module is layer]
        start = f"{place}.virtual_values.{adapter_name}."
        rest = dict(state_dict)
        values = rest.pop(SAVED)
        for name, wrapper in _whole_modules(model):
            for key, held in (
                type(wrapper).adapter_state_dict_load_map(wrapper, adapter_name).items()
            ):
                rest[f"{name}.{held}"] = rest.pop(f"{_THEIRS}{name.removeprefix(_OURS)}.{key}")
        encoder = {k: rest.pop(k) for k in list(rest) if k.startswith(TRAINING)}
        module = layer.virtual_values[adapter_name]
        if isinstance(module, Encoded) and encoder:
            return rest | {start + k.removeprefix(TRAINING): v for k, v in encoder.items()}
        if isinstance(module, Encoded):
            finished = plain(values.to(module.embedding.weight))
            finished.requires_grad_(module.embedding.weight.requires_grad)
            layer.virtual_values[adapter_name] = finished
        return rest | {f"{start}embedding.weight": values}


def _whole_modules(model: Any) -> Iterator[tuple[str, Any]]:
    """Modules that train in full beside the virtual tokens, as a classifier's head, by name."""
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield name, module


def _nothing(adapter_name: str) -> dict[str, str]:
    """No tensors that PEFT should look for."""
    return {}
