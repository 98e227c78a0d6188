"""Groups of parameters with learning rates of their own, some of which begin to train later."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.types import UserError

# All groups exist from the start, since ZeRO never trains what was frozen when its engine was made.
# A group that waits has a learning rate of 0, so that neither the update nor weight decay moves it,
# and no gradient, so that it is not in the norm that gradients are clipped by. When its turn comes
# it starts as a fresh AdamW does: moments of 0, and step 1 in their bias correction. Gradients from
# while it waited would be those of another model, whose upper blocks had not moved yet; and a step
# count that had gone on would divide the first moments by nearly 1 each, so that the first update
# is up to (1 - beta1) / sqrt(1 - beta2) = 3.2 times as large as a fresh one's.

TAKEN = "taken"  # in a group of `WaitingAdamW`: the steps that it took


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that share a learning rate."""

    params: list[nn.Parameter]
    scale: float = 1.0  # what the learning rate is multiplied by
    wait: int = 0  # unfreezings before they train


@dataclass(frozen=True, slots=True)
class Rates:
    """All groups of a model, in the order of the optimizer's, and when those that wait begin.

    factor: what every learning rate is multiplied by at each unfreezing; every: optimizer steps
    between unfreezings, None where something else decides.
    """

    groups: tuple[Group, ...]
    factor: float = 1.0
    every: int | None = None

    @property
    def unfreezings(self) -> int:
        """How many there are until everything trains."""
        return max((group.wait for group in self.groups), default=0)

    @property
    def plain(self) -> bool:
        """Whether all parameters have the learning rate as it is, from the start."""
        return all(group.scale == 1.0 and group.wait == 0 for group in self.groups)

    @property
    def params(self) -> list[nn.Parameter]:
        """The parameters in the order of the groups."""
        return [param for group in self.groups for param in group.params]

    def phase(self, steps: int) -> int:
        """Unfreezings that have happened after so many optimizer steps."""
        return 0 if self.every is None else min(self.unfreezings, steps // self.every)

    def factors(self, phase: int) -> list[float]:
        """What the learning rate of each group is multiplied by after so many unfreezings; 0 for
        one that waits.
        """
        fallen = self.factor**phase
        return [0.0 if group.wait > phase else group.scale * fallen for group in self.groups]

    def hold(self, phase: int) -> None:
        """Let exactly the groups that train after so many unfreezings take gradients. Not under
        ZeRO, which knows gradients of what needed them when its engine was made.
        """
        for group in self.groups:
            for param in group.params:
                param.requires_grad_(group.wait <= phase)

    def silence(self, phase: Callable[[], int]) -> None:
        """Make the gradients of groups that wait 0; `phase` tells the unfreezings so far. For ZeRO,
        in place of `hold`; before the engine is made.
        """
        for group in self.groups:
            for param in group.params if group.wait else ():
                param.register_hook(_silencer(group.wait, phase))


def _silencer(wait: int, phase: Callable[[], int]) -> Callable[[Tensor], Tensor | None]:
    def silenced(gradient: Tensor) -> Tensor | None:
        return torch.zeros_like(gradient) if phase() < wait else None

    return silenced


def grouped(
    module: nn.Module, place: Callable[[str, nn.Parameter], tuple[float, int]]
) -> tuple[Group, ...]:
    """The parameters of `module` that train, by their place: scale and wait, as in `Group`. Groups
    come in the order of their first parameter, and so do the parameters in them.
    """
    found: dict[tuple[float, int], list[nn.Parameter]] = {}
    for name, param in module.named_parameters():
        if param.requires_grad:
            found.setdefault(place(name, param), []).append(param)
    return tuple(Group(params, scale, wait) for (scale, wait), params in found.items())


def rates_by_name(module: nn.Module, scale: Callable[[str], float]) -> Rates:
    """Rates whose scales come from the parameters' names in `module`."""
    return Rates(grouped(module, lambda name, param: (scale(name), 0)))


def one_rate(module: nn.Module) -> Rates:
    """One group of all parameters that train."""
    return Rates((Group([param for param in module.parameters() if param.requires_grad]),))


def set_rates(
    groups: Iterable[dict[str, Any]], rates: Sequence[float], factors: Sequence[float]
) -> None:
    """Before an optimizer step: the learning rate of each of an optimizer's `groups` is its rate
    times its factor. One with a factor of 0 takes no step.
    """
    for group, rate, factor in zip(groups, rates, factors, strict=True):
        group["lr"] = rate * factor
        if TAKEN in group and factor > 0:
            group[TAKEN] += 1


class WaitingAdamW(torch.optim.AdamW):
    """AdamW for ZeRO, which steps all groups at once: each group's bias correction counts the steps
    that the group itself took (`set_rates`).

    The count is an option of the group, like its weight decay, so every form of a checkpoint holds
    it.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            group.setdefault(TAKEN, 0)

    def step(self, closure: Any = None) -> Any:
        """One step; those of a group that waits (rate 0, gradients 0) change nothing."""
        for group in self.param_groups:
            for param in group["params"]:
                if self.state.get(param):
                    self.state[param]["step"].fill_(max(group[TAKEN] - 1, 0))
        return super().step(closure)


def check_groups(saved: Sequence[Any], groups: Sequence[Any], checkpoint: Path) -> None:
    """Raises UserError where a checkpoint's optimizer has not as many parameters in as many groups
    as this run's.
    """
    sizes = [[len(group["params"]) for group in some] for some in (saved, groups)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{checkpoint}: its optimizer has groups of {sizes[0]} tensors, this run's of "
            f"{sizes[1]}. Resume with the stage.train, stage.unfreeze, stage.depth_decay and "
            "adapter options that it was saved with."
        )
