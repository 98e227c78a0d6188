"""How far two correct engines can be apart in half precision, measured on the trainer's own model.

bfloat16 keeps 8 bits of every number. Two engines that add up in another order round otherwise in
each layer, and of a 135M model's logprobs single ones then differ by 0.3 nats, 0.05 in the mean. No
fixed bound tells that from a wrong layer: it depends on the model, its weights and the tokens. So
the trainer computes its logprobs a second time with every layer's output moved by up to half a step
of its number format, at random. What that changes is what another engine may differ by.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_SEED = 20_251_129
_PASSING = (nn.Identity, nn.Dropout)  # layers that compute nothing
# Below this much nothing is measured: float32 itself rounds by about as much.
LEAST = 1e-4  # nats


@dataclass(frozen=True, slots=True)
class Spread:
    """Absolute differences of logprobs over some tokens, nats."""

    mean: float
    tail: float  # one in a hundred is larger


def spread(differences: Sequence[float]) -> Spread:
    """Of at least one difference."""
    values = torch.tensor(differences, dtype=torch.float64).abs()
    return Spread(float(values.mean()), float(values.quantile(0.99)))


def rounding_spread(model: Any, plain: Sequence[float], again: Callable[[], list[float]]) -> Spread:
    """How far rounding alone moves the logprobs `plain` of `model` (nats per token), at least
    LEAST. `again` computes them anew; under ZeRO-3 it is a collective.
    """
    with rounding_otherwise(model):
        moved = again()
    found = spread([a - b for a, b in zip(plain, moved, strict=True)])
    return Spread(max(found.mean, LEAST), max(found.tail, LEAST))


@contextmanager
def rounding_otherwise(model: nn.Module) -> Iterator[None]:
    """Meanwhile every layer's output in half precision is moved by up to half a step of its number
    format, by random numbers of their own, the same each time.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def move(layer: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or output.dtype not in (torch.bfloat16, torch.float16):
            return None
        if output.device not in generators:
            generators[output.device] = torch.Generator(output.device).manual_seed(_SEED)
        drawn = torch.rand(output.shape, generator=generators[output.device], device=output.device)
        half_step = torch.finfo(output.dtype).eps / 2
        return (output.float() * (1 + half_step * (2 * drawn - 1))).to(output.dtype)

    leaves = [layer for layer in model.modules() if next(layer.children(), None) is None]
    hooks = [
        layer.register_forward_hook(move) for layer in leaves if not isinstance(layer, _PASSING)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
