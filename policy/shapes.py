"""Shape checks on entry of the pure maths: a wrong broadcast is the commonest silent bug in
token-level losses.
"""

import torch
from torch import Tensor


def same_shape(rank: int, **tensors: Tensor) -> None:
    """Raise ``ValueError`` unless all named tensors have `rank` dimensions and one common shape (no
    broadcasting).
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) != 1 or any(len(shape) != rank for shape in shapes.values()):
        raise ValueError(f"expected {rank}-dimensional tensors of one shape, found {shapes}")


def check_mask(mask: Tensor) -> None:
    """Raise ``ValueError`` unless `mask` is boolean: 0/1 numbers would index instead of select."""
    if mask.dtype is not torch.bool:
        raise ValueError(f"expected a boolean mask, found {mask.dtype}")


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` where `mask` is True, a scalar. Selects rather than multiplies, so NaN under
    the mask stays out (0 * NaN is NaN).
    """
    return torch.where(mask, values, 0.0).sum()
