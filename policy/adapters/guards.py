"""What PEFT can't adapt in a family of models, found out when the adapter is fresh."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from conf.schema import AdapterConfig
from policy.adapters.targets import ALL_LINEAR, linear_modules
from policy.model import RoundedLinear, size_of, whole
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.policy")


def put_on(model: Any, adapter: AdapterConfig, config: Any, layer: Any) -> Any:
    """`model` with the fresh adapter of PEFT's `config`, which puts a `layer` around linear ones.
    Raises UserError by the family's name for layers that PEFT can't adapt.
    """
    from peft import get_peft_model

    family, linear = model.config.model_type, linear_modules(model)
    parameters = sum(size_of(param) for param in model.parameters())
    try:
        adapted = get_peft_model(model, config)
    # PEFT reads what a family's configuration may not have
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"adapter.targets={list(adapter.targets)}: PEFT can't adapt {family} so: {error} The "
            f"model's linear modules are {', '.join(linear)}."
        ) from error
    own = _own_forwards(adapted, layer)
    if own:
        raise UserError(
            f"adapter.targets={list(adapter.targets)}: in {family} the layers "
            f"{', '.join(sorted(own))} compute something else than a linear layer, so PEFT can't "
            "adapt them. Name the others in adapter.targets: "
            f"{', '.join(sorted(set(linear) - own))}."
        )
    past = _used_past_the_adapter(adapted, layer)
    if past:
        raise UserError(
            f"adapter.targets={list(adapter.targets)}: {family} uses the weights of "
            f"{', '.join(sorted(past))} elsewhere than in these layers themselves, so an adapter "
            "would train something else than is saved. Name the others in adapter.targets: "
            f"{', '.join(sorted(set(linear) - past))}."
        )
    frozen = _joint_experts(adapted)
    if frozen and list(adapter.targets) == ALL_LINEAR:
        LOG.warning(
            "adapter.targets=%s: %s keeps its experts in joint tensors, which PEFT takes for no "
            "linear layers: %s stay as they are, %d of %d parameters.",
            list(adapter.targets),
            family,
            ", ".join(sorted(frozen)),
            sum(frozen.values()),
            parameters,
        )
    return adapted


def _joint_experts(adapted: Any) -> dict[str, int]:
    """The last parts of the names of weights of three dimensions that no adapter changes, and
    their sizes: experts side by side. Convolutions are torch's own modules.
    """
    from peft.tuners.lora.layer import ParamWrapper

    changed = {id(m.get_param()) for m in adapted.modules() if isinstance(m, ParamWrapper)}
    frozen: dict[str, int] = {}
    for module in adapted.modules():
        if type(module).__module__.startswith("torch."):
            continue
        for name, param in module.named_parameters(recurse=False):
            shape = getattr(param, "ds_shape", param.shape)
            if len(shape) == 3 and id(param) not in changed:
                frozen[name] = frozen.get(name, 0) + size_of(param)
    return frozen


def _own_forwards(adapted: Any, layer: Any) -> set[str]:
    """The last parts of the names of adapted layers that PEFT takes for linear ones, as which they
    are built, but whose forward is something else: some routers, grouped projections.
    """
    names = set()
    for name, module in adapted.named_modules():
        if type(module) is layer and not _is_linear(module.get_base_layer()):
            names.add(name.rsplit(".", 1)[-1])
    return names


def _used_past_the_adapter(adapted: Any, layer: Any) -> set[str]:
    """The last parts of the names of adapted layers whose weight the model multiplies by itself, or
    that share it with another adapted layer: merging would count an update that the passes do not,
    or count it twice.

    Seen in a pass over 16 tokens; a model that can't run one gets a warning. Nothing is seen of
    weights on the meta device.
    """
    layers = {id(m): name for name, m in adapted.named_modules() if type(m) is layer}
    if not layers or any(param.is_meta for param in adapted.parameters()):
        return set()
    names = _sharing(adapted, layers)
    with _weights_read(layer) as (read, called), torch.no_grad():
        training = adapted.training
        vocabulary = adapted.config.get_text_config().vocab_size
        ids = torch.arange(16, device=adapted.device).remainder(vocabulary)
        try:
            adapted.eval()(input_ids=ids[None])
        # A family's forward may want anything beside token ids.
        except Exception as error:  # noqa: BLE001
            LOG.warning(
                "adapter: whether %s uses weights past its adapters is not known: 16 tokens end in "
                "%s: %s",
                adapted.config.model_type,
                type(error).__name__,
                error,
            )
        adapted.train(training)
    # a layer that is called as well is asked for its weight's dtype
    names |= {layers[number] for number in read - called if number in layers}
    return {name.rsplit(".", 1)[-1] for name in names}


def _sharing(adapted: Any, layers: dict[int, str]) -> set[str]:
    """Names of the adapted `layers` (id -> name) whose weight is that of another one, too."""
    users: dict[int, list[str]] = {}
    for module in adapted.modules():
        # rounded weights are shared with none, and made anew whenever they are asked for
        if id(module) in layers and not isinstance(module.get_base_layer(), RoundedLinear):
            weight = module.get_base_layer().weight
            users.setdefault(id(weight), []).append(layers[id(module)])
    return {name for names in users.values() if len(names) > 1 for name in names}


@contextmanager
def _weights_read(layer_class: Any) -> Iterator[tuple[set[int], set[int]]]:
    """While inside, the ids of the layers of PEFT's `layer_class` whose `weight` is asked for, and
    of those that are called: their own forward asks the layer that they wrap.
    """
    read: set[int] = set()
    called: set[int] = set()
    plain, forward = layer_class.weight.fget, layer_class.forward

    def weight(layer: Any) -> Any:
        read.add(id(layer))
        return plain(layer)

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        called.add(id(layer))
        return forward(layer, *args, **kwargs)

    layer_class.weight, layer_class.forward = property(weight), call
    try:
        yield read, called
    finally:
        del layer_class.weight
        layer_class.forward = forward


def _is_linear(layer: Any) -> bool:
    """Whether a layer that is built as a linear one computes what it says."""
    own = type(layer).forward is not nn.Linear.forward
    if not isinstance(layer, nn.Linear) or not own or layer.weight.is_meta:
        return True
    numbers = torch.arange(2 * layer.in_features, device=layer.weight.device)
    rows = torch.sin(numbers.float()).reshape(2, -1).to(layer.weight.dtype)
    with torch.no_grad(), whole(list(layer.parameters())):
        try:
            found = layer(rows)
        except (RuntimeError, ValueError, TypeError):
            return False
        wanted = nn.functional.linear(rows, layer.weight, layer.bias)
    if not isinstance(found, torch.Tensor) or found.shape != wanted.shape:
        return False
    return torch.allclose(found.float(), wanted.float(), rtol=1e-2, atol=1e-3)
