"""Adapters that are small layers of their own (rlhf/models/inserted.py), inside vLLM's engine: each
layer of its model that has one gets a hook, which changes what the layer gives.

The engine runs its model eagerly then, since a hook is no part of a compiled graph. The layers
compute token by token, so prompts and single tokens of several sequences need no care.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from conf.schema import RolloutConfig
from rlhf.models.inserted import insert_into, read_inserts, split_name
from rlhf.types import AdapterWeights, FullWeights, SyncError, UserError
from rollout.vllm import VLLMGenerator
from rollout.weights import FUSED, Incoming, specs_of, weights_checksums

# Fields of an adapter's configuration that don't change what it computes.
_UNREAD = (
    *("base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "peft_version"),
    *("task_type", "dropout"),
)
# Joint layers whose rows vLLM has in another order than transformers: by head there, by kind here;
# and the families whose models vLLM has itself.
_REORDERED = ("query_key_value", "Wqkv")
_BY_KIND = ("falcon", "bloom")
_JOINT = "QKVParallelLinear"  # vLLM's class
_OTHER_ORDER = "has its rows in another order in vLLM's model"
# transformers' names of a block's parts -> other names that vLLM's models have for them
_RENAMED = {"mlp": ("block_sparse_moe",), "self_attn": ("attn",)}
# Layers whose weights vLLM's latent attention multiplies by itself, or joins.
_ABSORBED = ("kv_b_proj", "q_a_proj")


class EngineModules:
    """The inserts of one adapter, and the hooks that let an engine's layers use them."""

    def __init__(self, weights: AdapterWeights) -> None:
        """`weights`: an adapter like those of later syncs. Raises UserError for one that has other
        parts than inserts, such as a layer saved whole.
        """
        self._inserts, others = read_inserts(weights.tensors, weights.config)
        if others:
            raise UserError(
                f"rollout=vllm: the adapter holds {others[0]}, which is no layer of its own that "
                "could be put into vLLM's model. Set rollout=hf."
            )
        self._config = _read(weights.config)
        self._specs = specs_of(weights.tensors)
        self._held = self._tensors(weights.tensors)
        self._calls: dict[str, int] = dict.fromkeys(self._inserts, 0)

    def _tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The inserts' own tensors by PEFT's saved names."""
        held: dict[str, Tensor] = {}
        for name in names:
            path, rest = split_name(name, self._config["peft_type"]) or ("", "")
            held[name] = self._inserts[path].get_parameter(rest)
        return held

    def install(self, model: nn.Module) -> None:
        """Put the hooks on the layers of the engine's `model`. Raises UserError naming a layer that
        it does not have in the form that transformers' model has.
        """
        layers = dict(model.named_modules(remove_duplicate=False))
        device = next(model.parameters()).device
        found = {}
        for path, insert in self._inserts.items():
            found[path] = _find(layers, path)
            insert.to(device)
        for path, (layer, rows) in found.items():
            layer.register_forward_hook(self._hook(path, rows), with_kwargs=True)

    def _hook(self, path: str, rows: slice | None) -> Any:
        """What torch calls after the layer; `rows`: the part of a joint layer's output."""
        insert = self._inserts[path]

        def hook(layer: Any, args: Any, kwargs: Any, output: Any) -> Any:
            self._calls[path] += 1
            if rows is None:
                return insert_into(insert, args, kwargs, output)
            whole = output[0] if isinstance(output, tuple) else output
            read = args[0] if args else next(iter(kwargs.values()))
            whole[..., rows] = insert(read, whole[..., rows])
            return output

        return hook

    def check_called(self, times: int) -> None:
        """Every hooked layer was called at least so many times since the engine started. Raises
        UserError naming one that was not: vLLM computes it by other code than the layer's own.
        """
        for path, calls in self._calls.items():
            if calls < times:
                raise _not_there(path, "is not called by vLLM's code")

    def take(self, weights: AdapterWeights, version: int) -> dict[str, str]:
        """Copy an adapter's tensors into the inserts; their checksums as they were sent.

        Raises SyncError naming every parameter that is missing, unknown or of another shape, or the
        option of the configuration that is another.
        """
        theirs = _read(weights.config)
        for name in sorted(theirs | self._config):
            if theirs.get(name) != self._config.get(name):
                raise SyncError(
                    f"weight sync {version}: the trainer's adapter has {name}={theirs.get(name)}, "
                    f"the generator's {self._config.get(name)}."
                )
        incoming = Incoming(weights.tensors.items(), self._specs)
        tensors = dict(incoming)
        incoming.finish(version)
        with torch.no_grad():
            for name, tensor in tensors.items():
                self._held[name].copy_(tensor)
        # of the tensors as they are: a column's checksum is for engines that pack matrices
        return {name: incoming.checksums[name] for name in self._held}

    def checksums(self) -> dict[str, str]:
        """Checksums of what the hooks compute with, by PEFT's names."""
        return weights_checksums(self._held.items())


def check_places(family: str, paths: Iterable[str]) -> None:
    """What is known of vLLM's models before one loads: they have a layer for each of `paths` in
    transformers' model of this type. Raises UserError. Of others the engine tells at its start.
    """
    for path in paths:
        last = path.rpartition(".")[2]
        if last in _ABSORBED:
            raise _not_there(path, "is no layer that vLLM's latent attention calls")
        if last in _REORDERED and family in _BY_KIND:
            raise _not_there(path, _OTHER_ORDER)


class ModulesGenerator(VLLMGenerator):
    """An engine whose layers have an adapter's inserts. Before the first sync these are as fresh
    as they came.
    """

    def __init__(
        self,
        model_path: str,
        tokenizer: Any,
        cfg: RolloutConfig,
        *,
        max_tokens: int,
        adapter: AdapterWeights,
        **options: Any,
    ) -> None:
        """`adapter`: one like those of later syncs; all else as in `VLLMGenerator`. Raises
        UserError for what vLLM can't do, before the engine starts or as soon as it has.
        """
        modules = EngineModules(adapter)
        # A hook is no part of a compiled graph.
        eager = replace(cfg, enforce_eager=True)
        super().__init__(model_path, tokenizer, eager, max_tokens=max_tokens, **options)
        self._modules = modules
        self._wake()
        try:
            self._llm.apply_model(modules.install)
            self._write_once(max_tokens)
            modules.check_called(min(2, max_tokens - 1))
        except UserError:
            self.close()
            raise
        self.rest()

    def sync(self, weights: FullWeights | AdapterWeights, version: int) -> None:
        """Copy the trainer's adapter into the inserts and forget every prefix computed with the old
        one. Raises SyncError for whole weights and for another adapter.
        """
        if not isinstance(weights, AdapterWeights):
            raise SyncError(
                f"weight sync {version}: the trainer sent whole weights to an engine that was "
                "started for an adapter."
            )
        super().sync(weights, version)

    def _sync_adapter(self, weights: AdapterWeights, version: int) -> None:
        self.sent = self._modules.take(weights, version)

    def checksums(self) -> dict[str, str]:
        """Checksums of the adapter's tensors that the engine's layers compute with."""
        return self._modules.checksums()


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an adapter's configuration that say what it computes."""
    return {name: value for name, value in config.items() if name not in _UNREAD}


def _find(layers: Mapping[str, Any], path: str) -> tuple[Any, slice | None]:
    """The engine's layer for a module of transformers' model, and its rows where it is a part of a
    joint layer. Raises UserError.
    """
    last = path.rpartition(".")[2]
    layer, rows = None, None
    for name in _names(path):
        if layer is None:
            layer, rows = _layer(layers, name)
    if layer is None:
        raise _not_there(path, "is not a layer of vLLM's model")
    if last in _REORDERED and type(layer).__name__ == _JOINT:
        raise _not_there(path, _OTHER_ORDER)
    if getattr(layer, "tp_size", 1) > 1:
        raise _not_there(path, "is shared out among processes in vLLM's model")
    if getattr(layer, "skip_bias_add", False) and getattr(layer, "bias", None) is not None:
        raise _not_there(path, "has its bias added later in vLLM's model")
    return layer, rows


def _names(path: str) -> list[str]:
    """What vLLM may call a module of transformers' model: its Transformers backend calls every
    backbone `model`, and some of its own models have another name for a part of a block.
    """
    names = [path, f"model.{path.partition('.')[2]}"]
    for name in list(names):
        parts = name.split(".")
        for place, part in enumerate(parts):
            for other in _RENAMED.get(part, ()):
                names.append(".".join([*parts[:place], other, *parts[place + 1 :]]))
    return names


def _layer(layers: Mapping[str, Any], name: str) -> tuple[Any, slice | None]:
    """The layer of this name, or the joint layer that it is a part of, with the part's rows."""
    if name in layers:
        return layers[name], None
    prefix, _, last = name.rpartition(".")
    for fused, parts in FUSED.items():
        joint = layers.get(f"{prefix}.{fused}")
        sizes = getattr(joint, "output_sizes", None)
        if last in parts and sizes is not None and len(sizes) == len(parts):
            start = sum(sizes[: parts.index(last)])
            return joint, slice(start, start + sizes[parts.index(last)])
    return None, None


def _not_there(path: str, fault: str) -> UserError:
    return UserError(
        f"rollout=vllm: {path}, where the adapter puts a layer of its own, {fault}. Set rollout=hf."
    )
