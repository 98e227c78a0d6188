"""Optimizers beside AdamW (stage.optimizer), for the torch engine and TRL's trainers on it.

bitsandbytes holds the state in 8 bits, in blocks of 256 with a scale each; tensors of less than
4096 elements keep 32 bits. Its paged kinds let CUDA move the state to the host where memory is
short; on a CPU they are the plain ones. Adafactor is transformers', with the stage's learning rate
and without momentum, as its Trainer has it. Muon is written here, since torch's takes no vectors.
"""

import functools
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.optimization import Adafactor

from conf.schedule import OptimizerKind
from policy.adapters.quantized import bitsandbytes
from policy.engines.base import OptimSettings

_MOMENTUM = 0.95
_NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)  # the authors' coefficients
Groups = list[dict[str, Any]]

_NAMES = {
    OptimizerKind.adamw_8bit: "AdamW8bit",
    OptimizerKind.paged_adamw: "PagedAdamW32bit",
    OptimizerKind.paged_adamw_8bit: "PagedAdamW8bit",
    OptimizerKind.lion: "Lion32bit",
    OptimizerKind.lion_8bit: "Lion8bit",
}


def _of_bitsandbytes(name: str, groups: Groups, optim: OptimSettings) -> Any:
    kind = getattr(bitsandbytes().optim, name)
    options: dict[str, Any] = {"lr": optim.learning_rate, "weight_decay": optim.weight_decay}
    if "Adam" in name:
        options["eps"] = optim.eps
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    return kind(groups, betas=optim.betas, **options)


def _adafactor(groups: Groups, optim: OptimSettings) -> Any:
    return Adafactor(
        groups,
        lr=optim.learning_rate,
        weight_decay=optim.weight_decay,
        scale_parameter=False,
        relative_step=False,
    )


class Muon(torch.optim.Optimizer):
    """Muon with AdamW for what is no matrix of a block: vectors, a classifier's head, and what
    `policy.engines.loading.mark_tables` marked. One rate is for both: a step of Muon is scaled to
    the size of AdamW's (Liu et al. 2025, arXiv:2502.16982).
    """

    def __init__(self, groups: Groups, optim: OptimSettings) -> None:
        defaults = {
            "lr": optim.learning_rate,
            "betas": optim.betas,
            "eps": optim.eps,
            "weight_decay": optim.weight_decay,
        }
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of each parameter that has a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                param.mul_(1 - group["lr"] * group["weight_decay"])
                if is_matrix(param):
                    self._orthogonal(param, param.grad, group)
                else:
                    self._adam(param, param.grad, group)

    def _orthogonal(self, param: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["momentum"] = torch.zeros_like(param)
        state["momentum"].lerp_(gradient, 1 - _MOMENTUM)
        update = orthogonal(gradient.lerp(state["momentum"], _MOMENTUM))
        size = 0.2 * math.sqrt(max(param.shape))
        param.add_(update.to(param.dtype), alpha=-group["lr"] * size)

    def _adam(self, param: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (first, second) = self.state[param], group["betas"]
        if not state:
            state["step"] = torch.zeros(())
            state["mean"], state["square"] = torch.zeros_like(param), torch.zeros_like(param)
        state["step"] += 1
        steps = float(state["step"])
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = (state["square"] / (1 - second**steps)).sqrt_().add_(group["eps"])
        param.addcdiv_(state["mean"], root, value=-group["lr"] / (1 - first**steps))


def is_matrix(param: Tensor) -> bool:
    """Whether Muon steps a parameter."""
    return param.ndim == 2 and min(param.shape) > 1 and not getattr(param, "is_table", False)


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns, about: five steps of Newton-Schulz."""
    a, b, c = _NEWTON_SCHULZ
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix.bfloat16() if wide else matrix.bfloat16().T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


ALL: dict[OptimizerKind, Callable[[Groups, OptimSettings], Any]] = {
    OptimizerKind.adafactor: _adafactor,
    OptimizerKind.muon: Muon,
    **{kind: functools.partial(_of_bitsandbytes, name) for kind, name in _NAMES.items()},
}
