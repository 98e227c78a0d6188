"""LoftQ (Li et al. 2023, arXiv:2310.08659, algorithm 1): a LoRA beside rounded weights that starts
at what rounding loses.

In turn, Q = round(W - s B A) and s B A = the best approximation of W - Q at the adapter's rank (its
largest singular values), from B A = 0 on. The frozen weights are the last Q, and the layer starts
at Q + s B A, nearer to W than the rounded W is. The factors share the singular values equally.

Singular vectors are computed in double precision and under a seed of their own: Q depends on them
from the second round on, and the trainer, its other ranks and what writes start/ each compute it.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from policy.adapters.starts import Pair

# A matrix whose shorter side is longer gets its first singular vectors by a random projection and
# as many power iterations (Halko et al. 2011).
_LARGEST_EXACT = 1024
_ITERATIONS = 16
_BEYOND = 16  # directions beyond the rank that the projection looks at

Held = TypeVar("Held", bound=nn.Module)


@torch.no_grad()
def alternate(
    weight: Tensor, hold: Callable[[Tensor], Held], *, rank: int, scale: float, rounds: int
) -> tuple[Held, Pair]:
    """The layer that holds the last Q, and A [rank, inputs] and B [outputs, rank] in float32.

    weight: W [outputs, inputs]; hold: makes a layer that holds a matrix rounded and reads it as
    `weight`; scale: the factor s of B A, above 0; rounds: at least 1.
    """
    whole = weight.detach().double()
    update = torch.zeros_like(whole)
    for _ in range(rounds):
        held = hold((whole - update).to(weight.dtype))
        rounded: Tensor = held.weight  # type: ignore[assignment]
        up, down = _factors(whole - rounded.double(), rank)
        update = up @ down
    share = math.sqrt(scale)
    return held, ((down / share).float().cpu(), (up / share).float().cpu())


def _factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a matrix [m, n] at a rank, as a product [m, rank] [rank, n]."""
    shorter = min(matrix.shape)
    if shorter <= _LARGEST_EXACT or rank + _BEYOND >= shorter:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        right = right.T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix, rank + _BEYOND, _ITERATIONS)
    roots = values[:rank].sqrt()
    return left[:, :rank] * roots, roots[:, None] * right[:, :rank].T
