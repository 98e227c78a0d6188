"""Bottleneck adapters: small layers behind the attention and the feed-forward layer of each block
(Houlsby et al. 2019, arXiv:1902.00751), behind the feed-forward layer alone (Pfeiffer et al. 2021,
arXiv:2005.00247), or beside it (He et al. 2022, arXiv:2110.04366).

adapter.load puts adapters of earlier tasks on the same places, which don't train any more: a fresh
one is stacked on them, or they are fused by attention that trains alone (AdapterFusion). Both are
one adapter when saved, which holds all of its blocks.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from conf.choices import Placement
from conf.methods import Composition
from conf.schema import AdapterConfig
from policy.adapters import Fresh, Method, Tuner
from policy.adapters.inserted import (
    BottleneckLayer,
    BottleneckModel,
    BottleneckPeftConfig,
    linear_widths,
    uncalled_layers,
)
from policy.adapters.lora import ALL_LINEAR, heads_of
from rlhf.models.directories import ADAPTER_CONFIG
from rlhf.models.inserted import BOTTLENECK, FUSE, STACK, BlockSpec, split_name
from rlhf.types import UserError

# What families call the last linear layer of their attention and of their feed-forward layer.
_LAST = (
    *("o_proj", "out_proj", "c_proj", "dense", "wo", "fc_out"),
    *("down_proj", "dense_4h_to_h", "fc2", "w2", "proj_out"),
)
_ATTENTION = ("attn", "attention")  # parts of the names of attention layers
_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "ff", "moe", "block_sparse_moe")
_BARE = ("fc2",)  # a feed-forward layer without a module of its own ends so (OPT)


# ---- places ----


def places(model: Any, adapter: AdapterConfig) -> list[str]:
    """Paths of the modules that get bottlenecks: by adapter.bottleneck.placement, or those that
    adapter.targets names. The weights may be on the meta device. Raises UserError where the model
    has none.
    """
    if list(adapter.targets) != ALL_LINEAR:
        return _named(model, adapter)
    placement, width = adapter.bottleneck.placement, _width(model)
    found, missing = [], 0
    for path, block in _blocks(model):
        ends = [_feed_forward(block, width, whole=placement is Placement.parallel)]
        if placement is Placement.houlsby:
            ends.insert(0, _attention(block, width))
        found += [f"{path}.{end}" for end in ends if end is not None]
        missing += ends.count(None)
    if not found or missing:
        raise UserError(
            f"adapter.bottleneck.placement={placement.value}: in {model.config.model_type} "
            f"{missing} of the places were not found. Name the modules whose outputs are "
            f"hidden states ({width} numbers) in adapter.targets."
        )
    return found


def _named(model: Any, adapter: AdapterConfig) -> list[str]:
    """Paths of the modules that adapter.targets names."""
    width, found = _width(model), []
    modules = dict(model.named_modules())
    for target in adapter.targets:
        matched = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not matched:
            raise UserError(
                f"adapter.targets={list(adapter.targets)}: no such module as {target!r} in "
                f"{model.config.model_type}."
            )
        for name in matched:
            module = modules[name]
            if _is_linear(module) and linear_widths(module)[1] != width:
                raise UserError(
                    f"adapter.targets={list(adapter.targets)}: {name} gives "
                    f"{linear_widths(module)[1]} numbers, but bottlenecks read hidden states of "
                    f"{width}. Name modules that give these, such as o_proj and down_proj."
                )
        found += matched
    return found


def _width(model: Any) -> int:
    """Of the model's hidden states."""
    return int(model.config.get_text_config().hidden_size)


def _blocks(model: Any) -> list[tuple[str, nn.Module]]:
    """The blocks of the model by their paths: the first list of as many modules as it has."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return [(f"{name}.{number}", block) for number, block in enumerate(module)]
    return []


def _attention(block: nn.Module, width: int) -> str | None:
    """The path within a block of what gives the output of its attention."""
    for name, child in block.named_children():
        named_so = any(part in name for part in _ATTENTION) and "norm" not in name
        if named_so and any(True for _ in child.children()):
            return _end(name, child, width)
    return None


def _feed_forward(block: nn.Module, width: int, *, whole: bool) -> str | None:
    """The path within a block of what gives the output of its feed-forward layer; whole: of the
    layer itself, which reads hidden states, too.
    """
    children = dict(block.named_children())
    for name in _FEED_FORWARD:
        if name in children:
            return name if whole else _end(name, children[name], width)
    for name in _BARE:
        if name in children and not whole:
            return name
    return None


def _end(name: str, module: nn.Module, width: int) -> str:
    """The path of the last linear layer of a module of a block, or of the module itself, as where
    it is a mixture of experts.
    """
    ends = []
    for part, child in module.named_children():
        if part in _LAST and _is_linear(child) and linear_widths(child)[1] == width:
            ends.append(part)
    if len(ends) == 1 and not any("expert" in part for part, _ in module.named_children()):
        return f"{name}.{ends[0]}"
    return name


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _short(paths: Sequence[str], model: Any) -> list[str]:
    """The ends of these paths within their blocks, where these name no other module, else the
    paths.
    """
    ends = set()
    for path in paths:
        parts = path.split(".")
        numbers = [place for place, part in enumerate(parts) if part.isdigit()]
        ends.add(".".join(parts[numbers[0] + 1 :] if numbers else parts))
    names = [name for name, _ in model.named_modules()]
    matched = [name for name in names if any(name == e or name.endswith(f".{e}") for e in ends)]
    return sorted(ends) if sorted(matched) == sorted(paths) else list(paths)


# ---- the adapter ----


def attach(model: Any, adapter: AdapterConfig, fresh: Fresh) -> Any:
    """`model` with bottlenecks at its places; of them the fresh ones train, or their fusion."""
    from peft import get_peft_model

    loaded = _loaded(adapter)
    options = adapter.bottleneck
    fuses = options.combine is Composition.fuse
    blocks = [spec for held in loaded for spec in held.specs]
    held = [spec.name for spec in blocks]
    if not fuses:
        blocks.append(BlockSpec(adapter.name, options.size, options.nonlinearity, options.scale))
    config = BottleneckPeftConfig(
        task_type=fresh.task,
        target_modules=_short(places(model, adapter), model),
        modules_to_save=heads_of(fresh.task),
        dropout=adapter.dropout,
        width=_width(model),
        placement=options.placement.value,
        blocks=[asdict(spec) for spec in blocks],
        combine=FUSE if fuses else STACK,
        held=held,
    )
    adapted = get_peft_model(model, config)
    uncalled = uncalled_layers(adapted)
    if uncalled:
        raise UserError(
            f"adapter.bottleneck.placement={options.placement.value}: {model.config.model_type} "
            f"does not call {uncalled[0]}, so a bottleneck there would train nothing. Name other "
            "modules in adapter.targets."
        )
    for earlier in loaded:
        earlier.put_into(adapted)
    return adapted


def check(model: Any, adapter: AdapterConfig, trains_head: bool) -> None:
    """The model has the places, and adapter.load holds bottlenecks that fit. Raises UserError."""
    places(model, adapter)
    options = adapter.bottleneck
    loaded = _loaded(adapter)
    if options.combine is Composition.fuse and len(loaded) < 2:
        raise UserError(
            f"adapter.bottleneck.combine=fuse fuses adapters of earlier tasks, but adapter.load "
            f"names {len(loaded)}. Expected two or more."
        )
    names = [spec.name for held in loaded for spec in held.specs]
    if options.combine is Composition.stack:
        names.append(adapter.name)
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise UserError(
            f"adapter.load and adapter.name: {double[0]!r} is the name of more than one "
            "bottleneck. Train each under a name of its own (adapter.name)."
        )
    for held in loaded:
        held.check(_width(model), options.placement)


def expected(model: Any, adapter: AdapterConfig) -> int:
    """2 m h + m + h at each place; 3 h^2 where a fusion trains instead."""
    width = _width(model)
    each = _block_parameters(width, adapter.bottleneck.size)
    if adapter.bottleneck.combine is Composition.fuse:
        each = 3 * width * width
    return each * len(places(model, adapter))


def frozen(model: Any, adapter: AdapterConfig) -> int:
    """2 m h + m + h at each place for every block of adapter.load."""
    width, sizes = _width(model), [spec.size for held in _loaded(adapter) for spec in held.specs]
    each = sum(_block_parameters(width, size) for size in sizes)
    return each * len(places(model, adapter))


def _block_parameters(width: int, size: int) -> int:
    return 2 * size * width + size + width


# ---- adapters of earlier tasks ----


class _Loaded:
    """One directory of adapter.load."""

    def __init__(self, directory: str, weight: float) -> None:
        """weight: factor of what its blocks add. Raises UserError for what is no adapter of this
        kind.
        """
        self.directory = directory
        folder = Path(directory).expanduser()
        try:
            text = (folder / ADAPTER_CONFIG).read_text(encoding="utf-8")
            self._config: dict[str, Any] = json.loads(text)
            self._tensors: dict[str, Tensor] = load_file(str(folder / "adapter_model.safetensors"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"adapter.load: {directory} can't be read ({type(error).__name__}: {error}). "
                "Expected the directory adapter/ of a run."
            ) from error
        if self._config.get("peft_type") != BOTTLENECK:
            raise UserError(
                f"adapter.load: {directory} holds an adapter of the kind "
                f"{self._config.get('peft_type')}. Expected bottlenecks (adapter.kind=bottleneck)."
            )
        if self._config["combine"] == FUSE:
            raise UserError(
                f"adapter.load: {directory} holds a fusion of adapters, which can't be a part of "
                "another. Name the adapters that it fuses."
            )
        self.specs = []
        for block in self._config["blocks"]:
            self.specs.append(BlockSpec(**{**block, "scale": block["scale"] * weight}))

    def check(self, width: int, placement: Placement) -> None:
        """Its blocks stand where those of the run do, and read as wide states."""
        theirs = self._config["placement"], self._config["width"]
        if theirs != (placement.value, width):
            raise UserError(
                f"adapter.load: the bottlenecks in {self.directory} are placed as {theirs[0]} and "
                f"read {theirs[1]} numbers, those of this run are placed as {placement.value} and "
                f"read {width}. Expected the same."
            )

    @torch.no_grad()
    def put_into(self, adapted: Any) -> None:
        """Copy its tensors into the blocks of the same names. Raises UserError naming what does
        not fit.
        """
        left = dict(self._tensors)
        for name, tensor in self._tensors.items():
            parts = split_name(name, BOTTLENECK)
            if parts is None:
                continue
            path, rest = parts
            layers = dict(adapted.get_base_model().named_modules())
            layer = layers.get(path)
            target = None
            if isinstance(layer, BottleneckLayer):
                target = dict(layer.inserts["default"].named_parameters()).get(rest)
            if target is None or target.shape != tensor.shape:
                continue
            target.copy_(tensor)
            del left[name]
        wanted = [name for name in left if split_name(name, BOTTLENECK) is not None]
        if wanted:
            raise UserError(
                f"adapter.load: {self.directory} holds {wanted[0]}, which the model has no place "
                "for. Expected an adapter of the same base."
            )


def _loaded(adapter: AdapterConfig) -> list[_Loaded]:
    weights = adapter.load_weights or [1.0] * len(adapter.load)
    return [_Loaded(place, weight) for place, weight in zip(adapter.load, weights, strict=True)]


METHOD = Method(
    attach=attach,
    expected=expected,
    frozen=frozen,
    check=check,
    places=places,
    tuner=Tuner(BOTTLENECK, BottleneckPeftConfig, BottleneckModel),
)
