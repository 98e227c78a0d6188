"""Checksums of a LoRA adapter as vLLM holds it: one slot of stacked tensors beside each layer, B
with the adapter's scale in it.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rollout.weights import FUSED, checksum

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


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
    model: nn.Module, names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Checksums of those tensors `names` of an adapter, of these shapes, that layers of the
    engine's `model` hold in their first slot.
    """
    layers = dict(model.named_modules(remove_duplicate=False))
    sums = {}
    for name in names:
        stacked = "lora_a_stacked" if name.endswith(_A) else "lora_b_stacked"
        path = name.removeprefix(_PREFIX).removesuffix(_A).removesuffix(_B)
        slots = _slots(layers, path, stacked)
        rows, width = shapes[name]
        if slots is not None and slots.dim() == 4:  # [slots, 1, rows, width]
            sums[name] = checksum(slots[0, 0, :rows, :width])
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
