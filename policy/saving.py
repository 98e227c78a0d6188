"""A policy's weights on their way out: as tensors for a generator, and as files from which the next
stage loads them.
"""

import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conf.schema import AdapterConfig
from policy.model import Gather, RoundedLinear, base_of, is_peft, no_gather, reads_pictures
from rlhf.models.directories import ADAPTER_NAME, adapter_name, further, merges_first, readable
from rlhf.models.facts import save_tokenizer, set_ends
from rlhf.process import distributed
from rlhf.types import AdapterWeights, FullWeights

LOG = logging.getLogger("rlhf.policy")
_PEFT_PREFIX = "base_model.model."
# A module that trains in full beside an adapter is there twice: as it was, and as it is.
_REPLACED = ".original_module"
_TRAINED_WHOLE = re.compile(r"\.modules_to_save\.[^.]+\.")
# how the names of tensors begin that only training needs: an encoder of virtual tokens
_ENCODER = "prompt_encoder."
AsLora = Callable[[Any, Gather], AdapterWeights]
WeightsOf = Callable[[Any, Gather], FullWeights | AdapterWeights]


# ---- tensors ----


@torch.no_grad()
def mix_weights(target: Any, source: Any, share: float) -> None:
    """target = share * source + (1 - share) * target, tensor by tensor; adapters of `source` merged
    in. Whole weights only (not ZeRO-3).
    """
    held = target.state_dict()
    done: set[int] = set()
    for name, tensor in iterate_weights(source):
        own = held[name]
        # tied tensors come under each name
        if own.data_ptr() not in done and own.is_floating_point():
            done.add(own.data_ptr())
            own.lerp_(tensor.to(own), share)


def _clean_name(name: str) -> str:
    """transformers' name of a tensor that PEFT put into a wrapper."""
    name = _TRAINED_WHOLE.sub(".", name)
    return name.removeprefix(_PEFT_PREFIX).replace(".base_layer.", ".")


def _persistent(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The module's own parameters and saved buffers, tied ones too; of a layer that is held rounded
    the weight that it stands for.
    """
    if isinstance(module, RoundedLinear):
        yield prefix + "weight", module.weight
    for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
        yield prefix + name, param.detach()
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        if name not in module._non_persistent_buffers_set:
            yield prefix + name, buffer.detach()


def iterate_weights(model: Any, gather: Gather = no_gather) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model's state dict by transformers' name, adapters merged in, gathered
    one layer at a time.

    Under ZeRO-3 every rank must consume the whole iterator. The trained weights are left bit for
    bit as they were: a merged layer gets its original back rather than the sum less the update,
    which would drift. Merged and gathered tensors are copies.
    """
    lora_layers = _lora_layers(model)
    inside = {id(sub) for layer in lora_layers.values() for sub in layer.modules()}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if name in lora_layers:
            with gather(list(module.parameters())):
                merged = [(_clean_name(prefix + n), t) for n, t in _merged_copies(module)]
            yield from merged
        elif id(module) not in inside and _REPLACED not in name:
            params = list(module.parameters(recurse=False))
            with gather(params) if params else nullcontext():
                own = [(_clean_name(n), t) for n, t in _persistent(module, prefix)]
                if gather is not no_gather:  # what is gathered is gone afterwards
                    own = [(n, t.clone()) for n, t in own]
            yield from own


def _merged_copies(layer: Any) -> list[tuple[str, Tensor]]:
    """Copies of what a layer's base holds, with its adapter merged in; the base stays as it was.

    A module of several adapted parameters, such as fused experts, has a wrapper around each other
    for each of them. A base that is held rounded is merged in full.
    """
    wrappers = [sub for sub in layer.modules() if _is_adapted(sub)]
    merged = []
    with _in_full(layer) as base:
        originals = [(param, param.detach().clone()) for param in base.parameters()]
        for wrapper in wrappers:
            wrapper.merge(safe_merge=False)
        for name, module in base.named_modules():
            prefix = f"{name}." if name else ""
            merged += [(n, t.clone()) for n, t in _persistent(module, prefix)]
        with warnings.catch_warnings():
            # PEFT warns that dividing by (IA)^3's factors is inexact; the originals are put back.
            warnings.simplefilter("ignore")
            for wrapper in reversed(wrappers):
                wrapper.unmerge()
        for param, original in originals:
            param.data.copy_(original)
    return merged


@contextmanager
def _in_full(layer: Any) -> Iterator[Any]:
    """The base of a layer that PEFT adapted; where that is held rounded, a plain layer with the
    weights that it stands for, in its place for as long.
    """
    base = layer.get_base_layer()
    if not isinstance(base, RoundedLinear):
        yield base
        return
    holder: Any = next(m for m in layer.modules() if getattr(m, "base_layer", None) is base)
    holder.base_layer = base.whole()
    try:
        yield holder.base_layer
    finally:
        holder.base_layer = base


def _is_adapted(module: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _lora_layers(model: Any) -> dict[str, Any]:
    """Adapted layers by name, of wrappers around each other the outermost."""
    out: dict[str, Any] = {}
    if not is_peft(model):
        return out
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in out)
        if _is_adapted(module) and not inner:
            out[name] = module
    return out


def full_weights(model: Any, gather: Gather = no_gather) -> FullWeights:
    """Whole weights; of a model that reads pictures, without adapters, those that train."""
    if is_peft(model) or not reads_pictures(model):
        return FullWeights(iterate_weights(model, gather))
    held = model.named_parameters(remove_duplicate=False)
    kept = frozenset(name for name, param in held if not param.requires_grad)
    sent = ((name, t) for name, t in iterate_weights(model, gather) if name not in kept)
    return FullWeights(sent, kept)


def adapter_weights(model: Any, gather: Gather = no_gather) -> AdapterWeights:
    """The adapter alone, under the names that PEFT saves, frozen parts of it too."""
    from peft import get_peft_model_state_dict

    config = model.peft_config[model.active_adapter]
    held = dict(_adapter_parameters(model, config.peft_type))
    with gather(list(held.values())):
        # The base weights may be partitioned (empty) under ZeRO-3: hand PEFT the adapter's tensors
        # only.
        own = {name: param.detach().clone() for name, param in held.items()}
    # shared ones under each name: PEFT looks for them under one
    for name, buffer in model.named_buffers(remove_duplicate=False):
        own[name] = buffer.detach()
    tensors = get_peft_model_state_dict(
        model, state_dict=own, adapter_name=model.active_adapter, save_embedding_layers=False
    )
    finished = {name: t for name, t in tensors.items() if not name.startswith(_ENCODER)}
    return AdapterWeights(finished, plain_values(config.to_dict()))


def named(weights_of: WeightsOf, name: str) -> WeightsOf:
    """`weights_of`, whose adapters have this name among several that a generator holds."""

    def taken(model: Any, gather: Gather) -> FullWeights | AdapterWeights:
        weights = weights_of(model, gather)
        if isinstance(weights, AdapterWeights):
            return replace(weights, name=name)
        return weights

    return taken


def _adapter_parameters(model: Any, kind: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that PEFT adds for adapters of a kind, and those that train beside them."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(kind)
    for name, param in model.named_parameters():
        if param.requires_grad or (prefix is not None and prefix in name):
            yield name, param


def plain_values(config: dict[str, Any]) -> dict[str, Any]:
    """PEFT's configuration as JSON holds it."""
    return {name: _plain_value(value) for name, value in config.items()}


def _plain_value(value: Any) -> Any:
    """A value of PEFT's configuration as JSON holds it: sets sorted, enumerations by their
    value.
    """
    if isinstance(value, set):
        return sorted(value)
    return getattr(value, "value", value)


def with_further(model: Any, adapter: AdapterConfig) -> Any:
    """`model` with the adapters of adapter.load merged in, in turn, each times its weight, as exact
    as a sum of updates is; all of it trains. Raises UserError.

    Merged first, not active beside a new adapter: switching that off leaves the model that the run
    starts from, as a reference has to, and a generator needs one adapter.
    """
    from peft import PeftModel

    if not merges_first(adapter):
        return model
    for place, held, weight in further(adapter):
        LOG.info("adapter.load: %g times %s (%s)", weight, adapter_name(held) or "-", place)
        with readable(f"adapter.load: {place}"), warnings.catch_warnings():
            # PEFT would fill missing weights with random numbers.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, str(held.directory))
        if weight != 1:
            _weigh(adapted, weight)
        model = adapted.merge_and_unload().requires_grad_(True)
    return model


def _weigh(adapted: Any, weight: float) -> None:
    """Multiply the scale of each layer's update."""
    from peft.tuners.lora import LoraLayer

    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            for name in layer.scaling:
                layer.scaling[name] *= weight


# ---- files ----


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A folder beside `directory` to write into. It replaces `directory` as a whole at the end, so
    that a reader never sees half of it; after an error nothing is left of it.
    """
    side = directory.with_name(directory.name + ".part")
    shutil.rmtree(side, ignore_errors=True)
    side.mkdir(parents=True)
    try:
        yield side
        if directory.exists():
            shutil.rmtree(directory)
        side.rename(directory)
    except BaseException:
        shutil.rmtree(side, ignore_errors=True)
        raise


@contextmanager
def rescuing(model: Any, directory: Path, gather: Gather = no_gather) -> Iterator[None]:
    """Around saving: after any error the tensors that trained are in rescued.safetensors of
    `directory` under torch's names, and the error says so. Not under ZeRO-3, where one rank's error
    would leave the others waiting.
    """
    from safetensors.torch import save_file

    try:
        yield
    except Exception as error:
        if gather is not no_gather or not distributed.is_main():
            raise
        file = directory / "rescued.safetensors"
        kept = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if _trains(p)}
        directory.mkdir(parents=True, exist_ok=True)
        save_file(kept, str(file))
        error.add_note(f"The {len(kept)} tensors that trained are in {file}, by torch's names.")
        raise


def _trains(param: torch.nn.Parameter) -> bool:
    return param.requires_grad


def save_model(
    model: Any,
    tokenizer: Any,
    directory: Path,
    gather: Gather = no_gather,
    dtype: torch.dtype | None = None,
) -> None:
    """Whole weights (an adapter merged in; in `dtype` where given), configuration, tokenizer and
    chat template.

    Collective under ZeRO-3; rank 0 writes, to the side: `directory` is replaced as a whole.
    """
    state: dict[str, torch.Tensor] = {}
    base = base_of(model)
    tied = _tied_names(base)
    for name, tensor in iterate_weights(model, gather):
        if name in tied or not distributed.is_main():
            continue
        value = tensor.detach().cpu()
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        state[name] = value.clone().contiguous()
    if distributed.is_main():
        set_ends(base, tokenizer)  # trainers put the tokenizer's alone in their place
        with replacing(directory) as side:
            base.save_pretrained(side, state_dict=state)
            save_tokenizer(tokenizer, side)
    distributed.barrier()


def save_adapter(
    model: Any,
    directory: Path,
    gather: Gather = no_gather,
    weights_of: AsLora = adapter_weights,
    name: str = "default",
) -> None:
    """The adapter alone, as `weights_of` gives it, in PEFT's format, under its `name` among several
    (`rlhf.models.directories.adapter_name`). Collective under ZeRO-3; rank 0 writes, to the side:
    `directory` is replaced as a whole.
    """
    assert is_peft(model), "only an adapter model has an adapter to save"
    _write_adapter(weights_of(model, gather), directory, name)


def save_as_lora(
    as_lora: AsLora | None,
    model: Any,
    directory: Path,
    gather: Gather = no_gather,
    name: str = "default",
) -> None:
    """The plain LoRA with the same update as the model's adapter, which every program reads, where
    its method has one that is not its own form. Collective as `save_adapter`.
    """
    if as_lora is not None:
        _write_adapter(as_lora(model, gather), directory, name)


def _order_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in the order of its keys. The library writes them in a
    random one, and the same weights should give the same file.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(size))


def _write_adapter(weights: AdapterWeights, directory: Path, name: str) -> None:
    """PEFT's two files, by rank 0."""
    from safetensors.torch import save_file

    if distributed.is_main():
        tensors = {n: t.cpu().contiguous() for n, t in weights.tensors.items()}
        with replacing(directory) as side:
            # PEFT's names hold none of the adapter, and other programs read them as they are
            metadata = {"format": "pt", ADAPTER_NAME: name}
            file = side / "adapter_model.safetensors"
            save_file(tensors, str(file), metadata=metadata)
            _order_metadata(file)
            (side / "adapter_config.json").write_text(
                json.dumps(weights.config, indent=2, default=str), encoding="utf-8"
            )
    distributed.barrier()


def _tied_names(base: Any) -> set[str]:
    """State-dict names that only alias another tensor and are left out of a checkpoint."""
    if not getattr(base.config, "tie_word_embeddings", False):
        return set()
    keys = getattr(base, "_tied_weights_keys", None) or {}
    return set(keys)
