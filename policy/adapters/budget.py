"""AdaLoRA's budget (Zhang et al. 2023, arXiv:2303.10512): which singular values stay.

An update is P diag(E) Q; in PEFT's names B [out, r], E [r, 1], A [r, in]. A triplet is one singular
value with its column of B and its row of A. How much one matters is the sum of the importance of
its singular value and the mean importance of its column and of its row. A weight's importance is
the moving average of its sensitivity |w grad|, times the moving average of how far the sensitivity
is from that average. The budget, singular values over all matrices, falls from initial_rank x
matrices to rank x matrices along a cubic curve; those beyond it are set to 0 and may come back
until the last phase, in which they stay 0.

PEFT has the same in its RankAllocator, which reads a parameter's `grad` after the step: under ZeRO
that is gone, float32 master copies have it instead of the parameter, and its threshold removes more
than it should where importances are equal. So gradients are added up here while they flow, in
float32, whatever the engine keeps; and exactly the budget stays.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from conf.methods import AdaLoraConfig
from policy.model import Write
from rlhf.process import distributed


@dataclass(frozen=True, slots=True)
class Schedule:
    """When the budget falls, in optimizer steps done: it is whole up to `begin`, at its target from
    `total` - `end` on, and between these singular values are set to 0 every `every` steps.
    """

    begin: int
    end: int
    every: int
    total: int

    @property
    def last(self) -> int:
        """The step after which the ranks stay."""
        return self.total - self.end

    def budget(self, step: int, whole: int, target: int) -> int:
        """Singular values that stay after `step`."""
        if step <= self.begin:
            return whole
        if step >= self.last:
            return target
        left = 1 - (step - self.begin) / (self.last - self.begin)
        return int((whole - target) * left**3 + target)

    def masks(self, step: int) -> bool:
        """Whether singular values are set to 0 after `step`."""
        return step >= self.last or (step > self.begin and step % self.every == 0)


@dataclass(frozen=True, slots=True)
class Triplets:
    """One matrix's update: A [r, in], E [r, 1], B [out, r]."""

    a: nn.Parameter
    e: nn.Parameter
    b: nn.Parameter

    @property
    def rank(self) -> int:
        return len(self.e)


Named = Mapping[str, Triplets]
Tensors = dict[str, Tensor]
_STATE = ("sensitivity", "uncertainty", "kept")


class Budget:
    """The importance of every triplet and what stays of them (a `policy.model.Tending`)."""

    def __init__(self, triplets: Named, target_rank: int, options: AdaLoraConfig) -> None:
        """target_rank: mean rank of a matrix at the end."""
        self.triplets = dict(triplets)
        self.whole = 0
        for one in self.triplets.values():
            self.whole += one.rank
        self.target = target_rank * len(self.triplets)
        self.options = options
        self.schedule: Schedule | None = None
        self.params: dict[str, nn.Parameter] = {}
        for name, one in self.triplets.items():
            self.params[f"{name}.A"] = one.a
            self.params[f"{name}.E"] = one.e
            self.params[f"{name}.B"] = one.b
        self.sensitivity: Tensors = {}
        self.uncertainty: Tensors = {}
        self.kept: Tensors = {}  # [r] bool each, once the ranks stay
        self._gradients: Tensors = {}  # of the step under way, of this rank
        for name, param in self.params.items():
            param.register_hook(self._adder(name))

    def _adder(self, name: str) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            if self.kept:
                return  # nothing is chosen any more
            own = gradient.detach().float()
            if name in self._gradients:
                own = own + self._gradients[name]
            self._gradients[name] = own

        return add

    @property
    def settled(self) -> int:
        """The step from which on the ranks stay."""
        return 0 if self.schedule is None else self.schedule.last

    def begin(self, steps: int) -> None:
        """The budget falls over `steps` optimizer steps."""
        options = self.options
        self.schedule = Schedule(
            begin=int(options.begin * steps),
            end=int(options.end * steps),
            every=options.every,
            total=steps,
        )

    def penalty(self) -> Tensor:
        """The penalty for bases that are not orthonormal, with its weight."""
        return self.options.orthogonality * orthogonality(self.triplets)

    def clear(self) -> None:
        """Forget the gradient of a step that is not taken."""
        self._gradients = {}

    def after_step(self, step: int, write: Write, scale: float = 1.0) -> None:
        """After optimizer step `step` (from 1): count its gradient, which was multiplied by `scale`
        when it was clipped, and set to 0 what is beyond the budget. A collective.

        write: sets a parameter wherever the engine keeps it.
        """
        if self.schedule is None:
            raise RuntimeError("AdaLoRA's schedule was not set before the first step")
        if not self.kept:
            self._count(scale)
        self.clear()
        if not self.schedule.masks(step):
            return
        kept = self.kept or self.chosen(self.schedule.budget(step, self.whole, self.target))
        for name, one in self.triplets.items():
            value = one.e.detach().clone()
            value[~kept[name].to(value.device)] = 0
            write(one.e, value)
        if step >= self.schedule.last:
            self.kept = kept
            self.sensitivity, self.uncertainty = {}, {}

    def _count(self, scale: float) -> None:
        """Bring the moving averages up to date with the gradient over all ranks, where there is
        one and it is finite.
        """
        counted = float(len(self._gradients))
        if distributed.all_max([counted])[0] == 0:
            return
        gradients: Tensors = {}
        finite = True
        for name, param in self.params.items():
            own = self._gradients.get(name)
            if own is None:
                own = torch.zeros_like(param, dtype=torch.float32)
            whole = distributed.sum_tensor(own)
            gradients[name] = whole
            finite = finite and bool(torch.isfinite(whole).all())
        if not finite:
            return  # the step was not taken
        for name, gradient in gradients.items():
            weight = self.params[name].detach().float()
            self._average(name, (weight * gradient * scale).abs())

    def _average(self, name: str, found: Tensor) -> None:
        """Take the sensitivity of a step into the moving averages."""
        if name not in self.sensitivity:
            self.sensitivity[name] = torch.zeros_like(found)
            self.uncertainty[name] = torch.zeros_like(found)
        average = self.sensitivity[name].lerp(found, 1 - self.options.beta1)
        away = (found - average).abs()
        self.sensitivity[name] = average
        self.uncertainty[name] = self.uncertainty[name].lerp(away, 1 - self.options.beta2)

    def importance(self, name: str) -> Tensor:
        """Of each triplet of the matrix `name`, [r]. 0 where no gradient was counted."""
        if f"{name}.E" not in self.sensitivity:
            return torch.zeros(self.triplets[name].rank)
        values = self._score(f"{name}.E").sum(1)
        rows = self._score(f"{name}.A").mean(1)
        columns = self._score(f"{name}.B").mean(0)
        return values + rows + columns

    def _score(self, full: str) -> Tensor:
        return self.sensitivity[full] * self.uncertainty[full]

    def chosen(self, budget: int) -> Tensors:
        """The `budget` most important triplets, of equal ones the first: [r] bool a matrix."""
        scores = []
        for name in self.triplets:
            scores.append(self.importance(name).cpu())
        order = torch.cat(scores).argsort(descending=True, stable=True)
        flat = torch.zeros(self.whole, dtype=torch.bool)
        flat[order[:budget]] = True
        kept: Tensors = {}
        for name, one in self.triplets.items():
            kept[name], flat = flat[: one.rank], flat[one.rank :]
        return kept

    def ranks(self) -> dict[str, int]:
        """Singular values of each matrix that are not 0."""
        ranks = {}
        for name, one in self.triplets.items():
            left = self.kept.get(name, one.e != 0)
            ranks[name] = int(left.sum())
        return ranks

    def state(self) -> Tensors:
        """What a resumed run needs beside the weights."""
        state: Tensors = {}
        for what in _STATE:
            for name, tensor in getattr(self, what).items():
                state[f"{what}:{name}"] = tensor
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        self.clear()
        for what in _STATE:
            getattr(self, what).clear()
        for full, tensor in state.items():
            what, name = full.split(":", 1)
            own = getattr(self, what)
            own[name] = tensor
            if name in self.params:
                own[name] = tensor.to(self.params[name].device)


def orthogonality(triplets: Named) -> Tensor:
    """How far the rows of A and the columns of B are from orthonormal: the mean over all A and B of
    the Frobenius norm of A A^T - I and B^T B - I, as the authors' code and PEFT have it (the paper
    writes squares).
    """
    norms = []
    for one in triplets.values():
        for square in (one.a @ one.a.T, one.b.T @ one.b):
            unit = torch.eye(one.rank, dtype=square.dtype, device=square.device)
            norms.append(torch.linalg.norm(square - unit))
    return torch.stack(norms).mean()
