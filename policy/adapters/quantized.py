"""Frozen linear layers that hold their weights in 4 or 8 bits (``adapter.quantize``).

nf4: blocks of 64 weights, each weight one of 16 values that are as likely under a normal
distribution, times the block's largest; with double quantisation the blocks' scales are held in 8
bits themselves (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3). int8: each output's
weights in 8 bits, times their largest over 127 (the weights of LLM.int8, Dettmers et al. 2022,
arXiv:2208.07339, section 2).

bitsandbytes rounds and reads the weights, on CPU and CUDA. The layers are ours: every pass computes
with the whole weights that the held ones stand for, so a model of the rounded weights in full
(`round_weights`) gives the same numbers bit for bit, and a generator that holds them samples what
trains. bitsandbytes' own layers do not: on some CPUs a layer that was evaluated once takes a kernel
without gradients from then on, and the 8-bit layer rounds activations as well.
"""

import functools
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.choices import LoraInit, Quantization
from conf.schema import AdapterConfig
from policy.adapters import Holding, loftq
from policy.adapters.starts import Pair
from policy.adapters.targets import adapted_layers, rank_of, scale_of
from policy.model import RoundedLinear
from rlhf.process.libraries import require
from rlhf.types import UserError

LOG = logging.getLogger("rlhf")
BLOCK = 64  # weights that share a scale; the paper's, and the library's default
SCALES_BLOCK = 256  # scales that share a scale of their own
_HEAD = "score"  # a classifier's head, which trains


@dataclass(frozen=True, slots=True)
class Rounding:
    """How the frozen weights are held: nf4 or int8."""

    method: Quantization
    double: bool = True  # nf4: the scales in 8 bits


def rounding_of(adapter: AdapterConfig) -> Rounding:
    """What adapter.quantize says of the model beside the adapter."""
    return Rounding(adapter.quantize, adapter.double_quantize)


def check(adapter: AdapterConfig) -> None:
    """Raises UserError where the library is missing, without importing it."""
    try:
        importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        require("bitsandbytes", "quantize")


def bitsandbytes() -> ModuleType:
    """The library, imported now. Raises UserError where it is missing.

    Without the package `kernels`, by which it would fetch code from a hub as it is imported; our
    layers use none of it.
    """
    if sys.modules.get("bitsandbytes") is None:
        sys.modules.pop("bitsandbytes", None)  # see rlhf.process.libraries.hide_bitsandbytes
    if "bitsandbytes" in sys.modules:
        return sys.modules["bitsandbytes"]
    log = logging.getLogger("bitsandbytes")
    level, kernels = log.level, sys.modules.get("kernels")
    log.setLevel(logging.ERROR)  # it warns of the missing kernels
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        return require("bitsandbytes", "quantize")
    finally:
        log.setLevel(level)
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels


class QuantizedLinear(RoundedLinear):
    """`weight` [outputs, inputs] is what the held weights stand for, made anew each time: writing
    into it changes nothing.

    The held tensors are buffers that no state dict has: they are remade from the model's files.
    """

    packed: Tensor
    scales: Tensor
    lost: Pair | None  # LoftQ's A and B, until an adapter starts at them

    def __init__(self, layer: nn.Linear, rounding: Rounding, weight: Tensor | None = None) -> None:
        """weight: held in place of the layer's own, in its shape and dtype."""
        nn.Module.__init__(self)  # nn.Linear's own would make a parameter `weight`
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.rounding = rounding
        self.dtype = layer.weight.dtype
        self.register_parameter("bias", layer.bias)
        self.lost = None
        if weight is None:
            weight = layer.weight.detach()
        for name, held in _held(weight, rounding).items():
            self.register_buffer(name, held, persistent=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weights that the layer computes with, [outputs, inputs]; no parameter."""
        if self.rounding.method is Quantization.int8:
            return _from_int8(self.packed, self.scales, self.dtype)
        return self._from_nf4()

    def _from_nf4(self) -> Tensor:
        functional = bitsandbytes().functional
        scales = self.scales
        if self.rounding.double:
            state = functional.QuantState(
                absmax=self.scales_scales,
                code=self.scales_values,
                blocksize=SCALES_BLOCK,
                dtype=torch.float32,
            )
            scales = functional.dequantize_blockwise(scales, state) + self.scales_mean
        state = functional.QuantState(
            absmax=scales,
            shape=torch.Size((len(scales), BLOCK)),
            dtype=self.dtype,
            blocksize=BLOCK,
            quant_type="nf4",
        )
        blocks: Tensor = functional.dequantize_4bit(self.packed, state)
        count = self.out_features * self.in_features
        return blocks.reshape(-1)[:count].view(self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        kind, dtype = input.device.type, None
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            input = input.to(dtype)
        with torch.autocast(kind, enabled=False):
            product: Tensor = _Product.apply(input, self.bias, self, dtype)
        return product

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves follow; a change of dtype is one of the weights that are read, not of the held
        ones.
        """
        kept = dict(self._buffers)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        for name, held in kept.items():
            moved = self._buffers[name]
            if held is not None and moved is not None and moved.dtype is not held.dtype:
                self._buffers[name] = held.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, held as {self.rounding.method.value}"


class _Product(torch.autograd.Function):
    """A product with weights that are read in the forward pass and once more in the backward pass,
    so that autograd keeps none of them.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, bias: Tensor | None, layer: Any, dtype: torch.dtype | None
    ) -> Tensor:
        ctx.layer, ctx.dtype = layer, dtype
        weight = layer.weight
        if dtype is not None:
            weight = weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        (gradient,) = gradients
        of_input = of_bias = None
        if ctx.needs_input_grad[0]:
            with torch.autocast(gradient.device.type, enabled=False):
                of_input = gradient @ ctx.layer.weight.to(gradient.dtype)
        if ctx.needs_input_grad[1]:
            rows = gradient.reshape(-1, gradient.shape[-1])
            of_bias = rows.sum(0).to(ctx.layer.bias.dtype)
        return of_input, of_bias, None, None


def _held(weight: Tensor, rounding: Rounding) -> dict[str, Tensor]:
    """The tensors that hold a weight [outputs, inputs]."""
    functional = bitsandbytes().functional
    if rounding.method is Quantization.int8:
        codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return {"packed": codes, "scales": scales}
    # A row for each block: the library's CPU kernel reads rows that are no multiple of a block with
    # scales of other blocks (0.50.2).
    flat = weight.reshape(-1)
    packed, state = functional.quantize_4bit(
        F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK),
        blocksize=BLOCK,
        compress_statistics=rounding.double,
        quant_type="nf4",
    )
    held = {"packed": packed, "scales": state.absmax}
    if rounding.double:
        held["scales_scales"] = state.state2.absmax
        held["scales_values"] = state.state2.code.clone()
        held["scales_mean"] = state.offset
    return held


def _from_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    weight: Tensor = bitsandbytes().functional.int8_vectorwise_dequant(codes, scales)
    return weight.to(dtype)


# ---- models ----


def quantize(model: Any, adapter: AdapterConfig) -> int:
    """Hold the linear layers of a transformers model rounded, in place; the rest stays, and so do
    heads and the modules of adapter.save_whole. Returns the parameters that are held
    so.

    Raises UserError for a model that has no such layer.
    """
    count, rounding, hold = 0, rounding_of(adapter), _holder(model, adapter)
    for parent, name, layer in list(_layers(model, adapter.save_whole)):
        setattr(parent, name, hold(layer))
        count += layer.weight.numel()
    if not count:
        raise UserError(
            f"adapter.quantize={rounding.method.value}: {model.config.model_type} has no plain "
            "linear layer to hold rounded. Set adapter.quantize=none."
        )
    LOG.info(
        "adapter.quantize=%s: %d of %d parameters are held rounded",
        rounding.method.value,
        count,
        count + sum(param.numel() for param in model.parameters()),
    )
    return count


def round_weights(model: Any, adapter: AdapterConfig) -> Any:
    """`model` with the weights that `quantize` would hold, as plain weights, in place."""
    hold = _holder(model, adapter)
    for _, _, layer in _layers(model, adapter.save_whole):
        layer.weight.data.copy_(hold(layer).weight)
    return model


def _holder(model: Any, adapter: AdapterConfig) -> Callable[[nn.Linear], QuantizedLinear]:
    """What makes a rounded layer of a linear one. LoftQ rounds adapted ones other than others."""
    rounding, adapted = rounding_of(adapter), {}
    if adapter.init is LoraInit.loftq:
        adapted = {id(layer): name for name, layer in adapted_layers(model, adapter).items()}

    def hold(layer: nn.Linear) -> QuantizedLinear:
        name = adapted.get(id(layer))
        if name is None:
            return QuantizedLinear(layer, rounding)
        held, lost = loftq.alternate(
            layer.weight,
            functools.partial(QuantizedLinear, layer, rounding),
            rank=rank_of(name, adapter),
            scale=scale_of(name, adapter),
            rounds=adapter.loftq_rounds,
        )
        held.lost = lost
        return held

    return hold


def _layers(model: Any, whole: Collection[str]) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers of a model that can be held rounded, each once, with the module and the
    attribute that hold it.
    """
    head = model.get_output_embeddings()
    users: dict[int, int] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            users[id(param)] = users.get(id(param), 0) + 1
    for name, module in model.named_modules():
        for attribute, layer in module.named_children():
            path = f"{name}.{attribute}" if name else attribute
            kept = any(path == end or path.endswith(f".{end}") for end in (*whole, _HEAD))
            # a family's own kind of layer may compute something else with its weight
            if type(layer) is not nn.Linear or layer is head or kept:
                continue
            if users[id(layer.weight)] == 1:
                yield module, attribute, layer


HOLDING = Holding(check=check, quantize=quantize, round_weights=round_weights)
