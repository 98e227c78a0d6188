"""Which modules of a model adapter.targets, adapter.save_whole and the patterns by layer name."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from conf.adapters import AdapterPart
from conf.schema import AdapterConfig
from policy.model import reads_pictures, size_of
from rlhf.models.directories import CLASSIFIER
from rlhf.models.naming import LANGUAGE, regions
from rlhf.types import UserError

ALL_LINEAR = ["all-linear"]
_HEAD = "score"  # a classifier's scalar head


# ---- adapted ----


def peft_targets(model: Any, adapter: AdapterConfig) -> list[str] | str:
    """adapter.targets as PEFT takes them; of a picture model the names of all layers in the part
    that adapter.part says.
    """
    if reads_pictures(model):
        return list(adapted_layers(model, adapter))
    return "all-linear" if list(adapter.targets) == ALL_LINEAR else list(adapter.targets)


def adapted_layers(model: Any, adapter: AdapterConfig) -> dict[str, Any]:
    """The layers of a transformers model that adapter.targets names, by their names; all-linear:
    the linear ones of its blocks.
    """
    inside = _in_part(model, adapter.part)
    everything = list(adapter.targets) == ALL_LINEAR
    head = model.get_output_embeddings()
    chosen = {}
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear | Conv1D)
        if everything:
            taken = linear and module is not head and name != _HEAD
        else:
            known = linear or isinstance(module, nn.Embedding)
            taken = known and _is_named(name, adapter.targets)
        if taken and inside(name):
            chosen[name] = module
    if not chosen and reads_pictures(model):
        raise UserError(
            f"adapter.part={adapter.part.value} adapter.targets={list(adapter.targets)}: that part "
            "of the model has no such module. Expected another part, or other targets."
        )
    return chosen


def _in_part(model: Any, part: AdapterPart) -> Callable[[str], bool]:
    """A test of a module's name: whether it is in the part of a picture model. All of a text model
    is. Raises UserError.
    """
    if part is AdapterPart.both or not reads_pictures(model):
        return lambda name: True
    region = regions(model)
    if region is None:
        raise UserError(
            f"{model.config.model_type}: its language model can't be told from its part for "
            "pictures. Set adapter.part=both."
        )
    wanted = part is AdapterPart.language
    return lambda name: (region(f"{name}.") == LANGUAGE) == wanted


def adapted_linears(model: Any, adapter: AdapterConfig) -> dict[str, tuple[int, int]]:
    """The linear ones among `adapted_layers`, and their numbers of inputs and outputs."""
    linears = {}
    for name, layer in adapted_layers(model, adapter).items():
        if not isinstance(layer, nn.Embedding):
            linears[name] = sizes(layer)
    return linears


def sizes(layer: Any) -> tuple[int, int]:
    """Inputs and outputs of a layer that can be adapted; of an embedding tokens and width."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    # GPT-2's linear layers are [in, out]
    first, second = getattr(layer.weight, "ds_shape", layer.weight.shape)
    return first, second


def _is_named(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def linear_modules(model: Any) -> list[str]:
    """The last parts of the names of the model's linear layers, each once."""
    names = set()
    for name, module in model.named_modules():
        if module.__class__.__name__ in ("Linear", "QuantizedLinear"):
            names.add(name.rsplit(".", 1)[-1])
    return sorted(names)


def check_targets(model: Any, targets: Sequence[str], *, trains_head: bool) -> None:
    """Each of `targets` (adapter.targets) names a module of the model, and none a module whose
    weight is another's too. The weights may be on the meta device: nothing is read of them.

    With tied embeddings an update of the head would be one of the embedding as soon as it is
    merged, which is another model than the one that trained. trains_head: whether an adapter on the
    head of a language model trains; where TRL multiplies by the head's weight itself, the adapter
    on it is passed over. Raises UserError.
    """
    if list(targets) == ALL_LINEAR:
        return  # never the head, nor the embedding
    modules = dict(model.named_modules(remove_duplicate=False))
    head = model.get_output_embeddings()
    users = _users(modules)
    for target in targets:
        matched = [name for name in modules if _is_named(name, [target])]
        if not matched:
            raise UserError(
                f"adapter.targets={list(targets)}: no such module as {target!r}; the model's "
                f"linear modules are {', '.join(linear_modules(model))}."
            )
        for name in matched:
            sharing = users.get(id(getattr(modules[name], "weight", None)), [name])
            if len(sharing) > 1:
                raise UserError(
                    f"adapter.targets={list(targets)} holds {target!r}, but the weight of {name} "
                    f"is also that of {' and '.join(n for n in sharing if n != name)} (tied "
                    "embeddings), so that the merged model would be another than the trained one. "
                    "Leave it out, or set adapter=none to train both."
                )
        if not trains_head and any(modules[name] is head for name in matched):
            raise UserError(
                f"adapter.targets={list(targets)} holds {target!r}, the head of the language "
                "model, where this stage would never train an adapter: leave it out."
            )


def _users(modules: dict[str, Any]) -> dict[int, list[str]]:
    """The names of the modules that have each weight, by its id."""
    users: dict[int, list[str]] = {}
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if weight is not None:
            users.setdefault(id(weight), []).append(name)
    return users


# ---- by layer ----


def rank_of(name: str, adapter: AdapterConfig) -> int:
    """The rank of the layer of this name, as PEFT finds it."""
    from peft.utils.other import get_pattern_key

    key = get_pattern_key(list(adapter.rank_pattern), name)
    return adapter.rank_pattern.get(key, adapter.rank)


def scale_of(name: str, adapter: AdapterConfig) -> float:
    """The factor of the low-rank update of the layer of this name, as PEFT finds it."""
    rank = rank_of(name, adapter)
    divisor = rank**0.5 if adapter.rslora else rank
    return alpha_of(name, adapter) / divisor


def alpha_of(name: str, adapter: AdapterConfig) -> float:
    """alpha of the layer of this name, as PEFT finds it."""
    from peft.utils.other import get_pattern_key

    key = get_pattern_key(list(adapter.alpha_pattern), name)
    return adapter.alpha_pattern.get(key, adapter.alpha)


def check_patterns(model: Any, adapter: AdapterConfig) -> None:
    """Each pattern of adapter.rank_pattern and adapter.alpha_pattern names an adapted layer: the
    end of its name or a regular expression for it, which PEFT matches from a dot on. The weights
    may be on the meta device. Raises UserError.
    """
    names = list(adapted_layers(model, adapter))
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, value in getattr(adapter, key).items():
            place = f"adapter.{key}: {pattern!r}"
            try:
                found = any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)
            except re.error as error:
                raise UserError(f"{place} is no regular expression ({error}).") from error
            if not found:
                raise UserError(
                    f"{place} names none of the adapted layers. They are called "
                    f"{', '.join(names[:8])}{' ...' * (len(names) > 8)}."
                )
            if value <= 0:
                raise UserError(f"{place} is {value:g}: expected a number above 0.")


# ---- trained whole ----


def heads_of(task: str) -> list[str] | None:
    """Modules that train in full beside an adapter: a classifier's scalar head."""
    return [_HEAD] if task == CLASSIFIER else None


def modules_to_save(model: Any, adapter: AdapterConfig, task: str) -> list[str] | None:
    """Modules that train in full beside an adapter: a classifier's scalar head, and those that
    adapter.save_whole names, by their whole names.
    """
    return [*(heads_of(task) or []), *whole_modules(model, adapter)] or None


def whole_modules(model: Any, adapter: AdapterConfig) -> dict[str, Any]:
    """The modules that adapter.save_whole names, by their names: PEFT, given the end of a name,
    would take ``input_layernorm`` for ``norm``.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if _is_named(name, adapter.save_whole)
    }


def whole_count(model: Any, adapter: AdapterConfig) -> int:
    """Parameters of the modules that adapter.save_whole names."""
    count = 0
    for module in whole_modules(model, adapter).values():
        count += sum(size_of(param) for param in module.parameters())
    return count


def check_whole(model: Any, adapter: AdapterConfig) -> None:
    """adapter.save_whole names modules of the model that hold no adapted layer, and whose weights
    are no other module's: PEFT trains a copy of the module, and the other would keep the old
    weights. The weights may be on the meta device. Raises UserError.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    users = _users(modules)
    adapted = adapted_layers(model, adapter)
    for end in adapter.save_whole:
        place = f"adapter.save_whole={list(adapter.save_whole)}"
        matched = [name for name in modules if _is_named(name, [end])]
        if not matched:
            raise UserError(f"{place}: no such module as {end!r}.")
        for name in matched:
            inside = [layer for layer in adapted if layer == name or layer.startswith(f"{name}.")]
            if inside:
                raise UserError(
                    f"{place} holds {end!r}, in which {inside[0]} is adapted. Leave it out, or "
                    "name other modules in adapter.targets."
                )
            for part in modules[name].modules():
                sharing = users.get(id(getattr(part, "weight", None)), [])
                if len(sharing) > 1:
                    raise UserError(
                        f"{place} holds {end!r}, but {' and '.join(sharing)} have one weight "
                        "together (tied embeddings), and only a copy of it would train. Leave it "
                        "out, or set adapter=none to train both."
                    )
