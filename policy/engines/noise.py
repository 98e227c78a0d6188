"""The gradient-noise scale: how many rows a step can hold before more of them hardly help."""

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.process import distributed
from rlhf.types import UserError

LOG = logging.getLogger("policy.engines.noise")
_ALONE = (
    "stage.noise_scale: a step of a single micro-batch says nothing about its noise. Smaller "
    "micro-batches do (engine.micro_tokens, engine.micro_batch_size)."
)


class GradientNoise:
    """The gradient-noise scale, the rows of a step beyond which more of them better its gradient
    but little (McCandlish et al. 2018, arXiv:1812.06162, appendix A.1).

    Hooks see the share of each micro-batch in a step's gradient; the whole is known by its norm. Of
    m micro-batches over all ranks, of n_i rows with the mean gradient g_i, and all N rows with G,

        trace = (sum of n_i |g_i|^2 - N |G|^2) / (m - 1)
        square = |G|^2 - trace / N

    are unbiased for the trace of independent rows' covariance and the square of their true
    gradient. The noise scale is the ratio of their exponential averages.
    """

    def __init__(self, params: Sequence[nn.Parameter], decay: float) -> None:
        """params: those that train; decay: of the averages, in [0, 1)."""
        self.params, self.decay = params, decay
        self.trace = self.square = self.weight = 0.0  # averages, and the weight of what is in them
        self._warned = False
        self._seen: set[int] = set()  # parameters, in the pass under way
        self._norm: Any = 0.0  # squared, of the pass under way
        self._sum: Any = 0.0  # of squared norms by their rows
        self._rows = self._parts = 0

    def watch(self) -> None:
        """Add the hooks, once, after those that change gradients."""
        for number, param in enumerate(self.params):
            trains = param.requires_grad
            param.requires_grad_(True).register_hook(functools.partial(self._see, number))
            param.requires_grad_(trains)

    def _see(self, number: int, gradient: Tensor) -> None:
        """A parameter's gradient in the pass under way, before it is added to any other."""
        if number in self._seen:
            raise UserError(
                "stage.noise_scale: a parameter gets its gradient in several pieces (reentrant "
                "checkpointing), whose norms don't add up. Set stage.noise_scale=null."
            )
        self._seen.add(number)
        exact = torch.promote_types(gradient.dtype, torch.float32)
        self._norm = self._norm + torch.linalg.vector_norm(gradient, dtype=exact) ** 2

    def begin(self) -> None:
        """A step begins; what an earlier one has left over is forgotten."""
        self._seen, self._norm, self._sum = set(), 0.0, 0.0
        self._rows = self._parts = 0

    def part(self, rows: int) -> None:
        """The backward pass of a micro-batch of `rows` rows is over; 0: of rows at weight 0."""
        if rows:
            self._sum = self._sum + self._norm / rows
            self._rows += rows
            self._parts += 1
        self._seen, self._norm = set(), 0.0

    def end(self, norm: float | None) -> None:
        """A step's passes are over. norm: of its whole gradient, before clipping; None: it is given
        up. A collective.
        """
        if norm is None:
            self.begin()
            return
        # gradients are averaged over ranks
        own = float(self._sum) / distributed.world_size() ** 2
        shares, rows, parts = distributed.all_sum([own, self._rows, self._parts])
        self.begin()
        if parts < 2:
            if not self._warned and distributed.is_main():
                LOG.warning(_ALONE)
            self._warned = True
            return
        trace = (rows**2 * shares - rows * norm**2) / (parts - 1)
        square = norm**2 - trace / rows
        if not math.isfinite(trace + square):
            return
        fresh = 1.0 - self.decay
        self.trace += fresh * (trace - self.trace)
        self.square += fresh * (square - self.square)
        self.weight += fresh * (1.0 - self.weight)

    def figures(self) -> dict[str, float]:
        """``train/noise_scale`` in rows, unless noise hides the gradient; its two averages."""
        if not self.weight:
            return {}
        trace, square = self.trace / self.weight, self.square / self.weight
        figures = {"train/noise_trace": trace, "train/noise_square": square}
        if trace > 0 and square > 0:
            figures["train/noise_scale"] = trace / square
        return figures

    def state_dict(self) -> dict[str, float]:
        return {"trace": self.trace, "square": self.square, "weight": self.weight}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.trace, self.square = state["trace"], state["square"]
        self.weight = state["weight"]
