"""What we use of vLLM beside its public interface, and what we change in it.

    engine_environment            variables, while an engine starts
    kept_apart                    transformers' classes, as they were before vLLM changed them
    multiply_one_adapter_at_once  LoRA on a CPU, as fast as a batch of one adapter can be
    sent_checksums                of an adapter's tensors, as vLLM's layers have to hold them
    held_checksums                of the same tensors, as the layers do hold them
    has_head                      whether the head is a layer of its own
    Streamed                      GPT-OSS's weights, in the form that a reload takes
    pack_experts                  experts in the form of vLLM's kernel, again after a reload
    rotate_natively               latent attention's positions on a CPU
    stop_engine_only              the engine ends, the trainer's process group stays

vLLM's modules come as arguments: rollout/vllm.py and, in a server, rollout/server/extension.py
import them. Where an upgrade of vLLM takes
one of these parts away, tests/rollout/test_vllm_private.py names it.
"""

import functools
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from conf.schema import vllm_lora_rank
from rlhf.types import UserError
from rollout.weights import FUSED, checksum

_NAMES = ("__module__", "__qualname__", "__doc__")  # what a subclass has like its class
_MISSING = object()
_PREFIX = "base_model.model."  # of PEFT's names
# GPT-OSS: all experts of a layer in one tensor [experts, ...], and a logit per head that takes
# part in the softmax of attention.
_JOINED = re.compile(r"(.*\.mlp\.experts)\.((?:gate_up|down)_proj(?:_bias)?)")
_SINKS = ".self_attn.sinks"
_A, _B = ".lora_A.weight", ".lora_B.weight"

# Loggers whose warnings mean nothing here: RotaryEmbedding got no weights in a sync (it has none;
# Incoming names missing ones), and without a tokenizer the engine knows no end of sequence (each
# request names it).
QUIET = (
    "vllm.engine.arg_utils",  # that a seed is set, which a seed per request makes moot
    "vllm.model_executor.model_loader.reload.layerwise",
    "vllm.renderers.base",  # that there is no tokenizer, which is as it should be
    "vllm.v1.worker.cpu_worker",  # that threads can't be set after binding
)
# The engine stays in this process, so that weights go over as tensors; nothing is reported to
# vLLM's makers.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
_ENVIRONMENT_DEFAULTS = {"VLLM_LOGGING_LEVEL": "WARNING"}
# What starting an engine changes for everyone else: our own ranks read the first, every child
# process would inherit the second.
_RESTORED = ("LOCAL_WORLD_SIZE", "LD_PRELOAD")
_OVERRIDING = "VLLM_CPU_KVCACHE_SPACE"  # would win over rollout.kv_cache_gib

# ---- the environment ----


def errors_only(record: logging.LogRecord) -> bool:
    """A logger's filter."""
    return record.levelno >= logging.ERROR


@contextmanager
def engine_environment() -> Iterator[None]:
    """vLLM's environment variables, set before it is imported; what it changes for other code is
    put back afterwards.
    """
    os.environ.update(_ENVIRONMENT)
    for name, value in _ENVIRONMENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.pop(_OVERRIDING, None)
    before = {name: os.environ.get(name) for name in _RESTORED}
    try:
        yield
    finally:
        for name, old in before.items():
            if old is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = old


# ---- transformers' classes ----


@contextmanager
def kept_apart(backend: Any) -> Iterator["KeptApart"]:
    """While an engine starts: transformers' classes are given back as they were before.

    For families that vLLM has no model of its own for (SmolLM3, OLMo, GPT-NeoX and more) it builds
    transformers' model and decorates its decoder's class in place: a further base class, another
    `__init__` and another `__call__`. Every other model of that class in this process, the
    trainer's above all, would then fail ("Current vLLM config is not set", "no attribute
    'do_not_compile'"). So what vLLM adds moves into a subclass that only the engine's own modules
    have (`KeptApart.claim`).

    `backend`: vLLM's module that builds transformers' models; its `support_torch_compile` decorates
    them.
    """
    kept, original = KeptApart(), backend.support_torch_compile
    backend.support_torch_compile = kept.recording(original)
    try:
        yield kept
    finally:
        backend.support_torch_compile = original
        kept.give_back()


class KeptApart:
    """The classes that were decorated, each with its subclass once `give_back` has run."""

    def __init__(self) -> None:
        # class -> its attributes and bases of before
        self._before: dict[type, tuple[dict[str, Any], tuple[type, ...]]] = {}
        self._subclasses: dict[type, type] = {}

    def recording(self, decorator: Callable[..., Any]) -> Callable[..., Any]:
        """`decorator`, a function that makes class decorators, with a note of each class before it
        is changed.
        """

        def make(*args: Any, **kwargs: Any) -> Callable[[type], type]:
            decorate = decorator(*args, **kwargs)

            def noted(cls: type) -> type:
                self._before.setdefault(cls, (dict(vars(cls)), cls.__bases__))
                changed: type = decorate(cls)
                return changed

            return noted

        return make

    def give_back(self) -> None:
        """Make every class what it was before."""
        for cls, (attributes, bases) in self._before.items():
            self._subclasses[cls] = _moved_to_subclass(cls, attributes, bases)
        self._before.clear()

    def claim(self, model: nn.Module) -> None:
        """Let the modules of the engine's `model` have what was added to their classes."""
        for module in model.modules():
            subclass = self._subclasses.get(type(module))
            if subclass is not None:
                module.__class__ = subclass


def _moved_to_subclass(cls: type, attributes: dict[str, Any], bases: tuple[type, ...]) -> type:
    """Give `cls` its `attributes` and `bases` of before; returns a subclass with what was added."""
    added = {n: v for n, v in vars(cls).items() if attributes.get(n, _MISSING) is not v}
    for name in added:
        if name in attributes:
            setattr(cls, name, attributes[name])
        else:
            delattr(cls, name)
    further = tuple(base for base in cls.__bases__ if base not in bases)
    cls.__bases__ = bases
    names = {name: getattr(cls, name) for name in _NAMES}
    return type(cls.__name__, (cls, *further), added | names)


# ---- LoRA on a CPU ----


def engine_lora_rank(adapter_rank: int, wished: int | None) -> int:
    """`conf.schema.vllm_lora_rank`. Raises UserError."""
    try:
        return vllm_lora_rank(adapter_rank, wished)
    except ValueError as error:
        raise UserError(str(error)) from error


def lora_options(adapter_rank: int, wished: int | None) -> dict[str, Any]:
    """The engine's options for LoRA adapters, one at a time. Raises UserError."""
    rank = engine_lora_rank(adapter_rank, wished)
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}


def multiply_one_adapter_at_once(wrapper: Any) -> None:
    """Make `wrapper` (vLLM's PunicaWrapperCPU class) multiply a batch that has one adapter, as ours
    always has, by that adapter's matrices. Everything else goes vLLM's own way.

    vLLM's own code copies both matrices for every token of the batch, since each could have another
    adapter: with a 135M model, 16 sequences and rank 8 that doubled the time of a decoding step
    (measured: 176 ms against 92 ms without an adapter). The results agree to float32 rounding.
    """
    if getattr(wrapper.add_lora_linear, "one_adapter", False):
        return
    linear = _faster_linear(wrapper.add_lora_linear)
    linear.one_adapter = True
    wrapper.add_lora_linear = linear
    wrapper.add_lora_logits = _faster_logits(wrapper.add_lora_logits)


def _faster_linear(original: Any) -> Any:
    @functools.wraps(original)
    def add_lora_linear(
        self: Any,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """y[:, slice i] += scale * x A_i^T B_i^T. `x` [n, in], `y` [n, out]; A_i [slots, 1, rank,
        in], B_i [slots, 1, size i, rank].
        """
        rows, outputs = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        slot = _single_slot(self.token_lora_indices, x, rows, outputs)
        if slot is None:
            original(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **kwargs)
            return
        start = 0
        for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            outputs[:, start : start + size].addmm_(rows @ a[slot, 0].T, b[slot, 0].T, alpha=scale)
            start += size

    return add_lora_linear


def _faster_logits(original: Any) -> Any:
    @functools.wraps(original)
    def add_lora_logits(
        self: Any,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        **kwargs: Any,
    ) -> None:
        """y += scale * x A^T B^T at the head, whose matrices vLLM keeps (as zeros) for an adapter
        without them.
        """
        rows, outputs = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        slot = _single_slot(self.sampler_indices, x, rows, outputs)
        if slot is None or lora_b_stacked.shape[2] != outputs.shape[1]:
            original(self, y, x, lora_a_stacked, lora_b_stacked, scale, **kwargs)
            return
        a, b = lora_a_stacked[slot, 0], lora_b_stacked[slot, 0]
        outputs.addmm_(rows @ a.T, b.T, alpha=scale)

    return add_lora_logits


def _single_slot(adapters: Tensor, x: Tensor, rows: Tensor, outputs: Tensor) -> int | None:
    """The slot of the one adapter that all tokens have, where numbers are float32; else None.
    `adapters` [n]: each token's slot; `rows` [n, in], `outputs` [n, out].
    """
    plain = x.dtype is torch.float32 and len(rows) == len(outputs) == len(adapters)
    if not plain or not len(adapters):
        return None
    slot = int(adapters[0])
    if slot < 0 or not bool((adapters == slot).all()):
        return None
    return slot


# ---- what the layers hold ----


def sent_checksums(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, str]:
    """Checksums of an adapter's tensors, under PEFT's names, as an engine of this dtype has to hold
    them. Without those of B where layers have scales of their own.
    """
    scale = config["lora_alpha"] / config["r"]
    if config.get("use_rslora"):
        scale = config["lora_alpha"] / math.sqrt(config["r"])
    one_scale = not config.get("alpha_pattern") and not config.get("rank_pattern")
    sums = {}
    for name, tensor in tensors.items():
        if name.endswith(_A):
            sums[name] = checksum(tensor.to(dtype))
        elif name.endswith(_B) and one_scale:
            sums[name] = checksum(tensor.to(dtype) * scale)
    return sums


def held_checksums(
    model: nn.Module,
    names: Iterable[str],
    shapes: Mapping[str, tuple[int, ...]],
    slot: int = 0,
) -> dict[str, str]:
    """Checksums of those tensors `names` of an adapter, of these shapes, that layers of the
    engine's `model` hold in this slot: one of stacked tensors beside each layer, B with the
    adapter's scale in it.
    """
    layers = dict(model.named_modules(remove_duplicate=False))
    sums = {}
    for name in names:
        stacked = "lora_a_stacked" if name.endswith(_A) else "lora_b_stacked"
        path = name.removeprefix(_PREFIX).removesuffix(_A).removesuffix(_B)
        slots = _slots(layers, path, stacked)
        rows, width = shapes[name]
        if slots is not None and slots.dim() == 4:  # [slots, 1, rows, width]
            sums[name] = checksum(slots[slot, 0, :rows, :width])
    return sums


def _slots(layers: Mapping[str, Any], path: str, stacked: str) -> Tensor | None:
    """The stacked tensor of the layer at `path`, or of its part in a joint layer (FUSED)."""
    found = getattr(layers.get(path), stacked, None)
    if found is not None and len(found) == 1:
        return _tensor(found[0])
    prefix, _, last = path.rpartition(".")
    for fused, parts in FUSED.items():
        joint = getattr(layers.get(f"{prefix}.{fused}"), stacked, None)
        if last in parts and joint is not None and len(joint) == len(parts):
            return _tensor(joint[parts.index(last)])
    return None


def _tensor(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


# ---- a reload, and the end ----


def has_head(model: Any) -> bool:
    """Whether vLLM's `model` has a head of its own, apart from or tied to the embedding."""
    layers = model.named_modules(remove_duplicate=False)
    return any(name.rsplit(".", 1)[-1] == "lm_head" for name, _ in layers)


class Streamed:
    """Tensors on their way into vLLM's reload, in the form in which it takes them.

    vLLM's GptOssModel copies joined experts and sinks straight into its parameters,
    which during a reload are on the meta device: they would stay as they were, without an error.
    Experts one by one take a way that the reload waits for; sinks are put in place afterwards.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], family: str) -> None:
        """`family`: transformers' model type; all but gpt_oss pass as they are."""
        self._tensors = tensors
        self._cut = family == "gpt_oss"
        self._sinks: dict[str, Tensor] = {}  # by vLLM's names

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._tensors:
            joined = _JOINED.fullmatch(name)
            if not self._cut:
                yield name, tensor
            elif joined is not None:
                for number, expert in enumerate(tensor):
                    yield f"{joined[1]}.{number}.{joined[2]}", expert
            else:
                if name.endswith(_SINKS):
                    # a copy: under ZeRO-3 the tensor is gone before the reload ends
                    self._sinks[name.replace(_SINKS, ".attn.sinks")] = tensor.detach().clone()
                yield name, tensor

    @torch.no_grad()
    def put_sinks(self, model: Any) -> None:
        """Write the sinks that passed into vLLM's `model`."""
        for name, sinks in self._sinks.items():
            model.get_parameter(name).copy_(sinks)


def pack_experts(model: Any) -> None:
    """Bring experts into the form of vLLM's CPU kernel, as it does at its start. After a reload it
    does not: UnquantizedFusedMoEMethod._setup_kernel returns before.
    """
    for layer in model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(layer)


def rotate_natively(model: Any) -> None:
    """Latent attention's positions by vLLM's PyTorch code on a CPU. Its CPU kernel takes the
    stride between heads for that between tokens where queries come as [tokens, heads, size], as
    they do in these layers alone (measured: logprobs off by 0.2 nats).
    """
    for layer in model.modules():
        rotation = getattr(layer, "rotary_emb", None)
        if hasattr(layer, "mla_attn") and rotation is not None:
            rotation._forward_method = rotation.forward_native


def stop_engine_only(client: Any) -> None:
    """Stop the engine of vLLM's core `client`. Its own shutdown() also destroys the default process
    group, which may be the trainer's.
    """
    client._finalizer.detach()
    client.engine_core.model_executor.shutdown()
    client.engine_core.scheduler.shutdown()
