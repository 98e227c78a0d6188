"""Groups of parameters with learning rates of their own in TRL's trainers."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback

from conf.choices import EngineKind
from conf.schema import EngineConfig
from policy.engines.base import Rates, WaitingAdamW, set_rates


def split(
    groups: Sequence[Mapping[str, Any]], rates: Rates
) -> tuple[list[dict[str, Any]], list[int]]:
    """An optimizer's groups (such as those with weight decay and without), each parted by
    `rates.groups`; and the number among these of each part.
    """
    number = {id(p): i for i, group in enumerate(rates.groups) for p in group.params}
    parts: list[dict[str, Any]] = []
    numbers: list[int] = []
    for group in groups:
        inside: dict[int, list[nn.Parameter]] = {}
        for param in group["params"]:
            inside.setdefault(number[id(param)], []).append(param)
        # a group that is empty from the start stays, as one without parts would have it
        for place, params in sorted(inside.items()) or [(0, [])]:
            parts.append({**group, "params": params})
            numbers.append(place)
    return parts, numbers


class GroupRates(TrainerCallback):
    """Gives each group its learning rate for the time of an optimizer step.

    Between steps all groups have the schedule's, so that the schedule, what is logged and what a
    checkpoint holds are as without groups.
    """

    def __init__(self, rates: Rates, *, zero: bool) -> None:
        """zero: under DeepSpeed, which steps inside its backward pass."""
        self.rates, self.zero = rates, zero
        self.numbers: list[int] = []  # which of `rates.groups` each of the optimizer's is of
        self.unfrozen = 0

    def phase(self, step: int) -> int:
        """Unfreezings before the step after `step` steps."""
        return self.rates.phase(step)

    def group(self, optimizer: Any) -> Any:
        """Part the groups of a fresh optimizer; where some wait under ZeRO it becomes one that
        counts their steps.
        """
        parts, self.numbers = split(optimizer.param_groups, self.rates)
        if not self.zero or not self.rates.unfreezings:
            optimizer.param_groups = parts
            return optimizer
        self.rates.silence(lambda: self.unfrozen)
        options = {name: optimizer.defaults[name] for name in ("lr", "betas", "eps")}
        return WaitingAdamW(parts, **options)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.unfrozen = self.phase(state.global_step)
        if not self.zero and self.rates.unfreezings:
            self.rates.hold(self.unfrozen)
        factors = self.rates.factors(self.unfrozen)
        rates = kwargs["lr_scheduler"].get_last_lr()
        groups = kwargs["optimizer"].param_groups
        set_rates(groups, rates, [factors[number] for number in self.numbers])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rates = kwargs["lr_scheduler"].get_last_lr()
        for group, rate in zip(kwargs["optimizer"].param_groups, rates, strict=True):
            group["lr"] = rate


class WithRates(Trainer):
    """A trainer whose parameters may be in groups; `rates` None: as TRL has them."""

    optimizer: Any

    def __init__(
        self, *args: Any, rates: Rates | None = None, engine: EngineConfig, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.group_rates: GroupRates | None = None
        if rates is not None and not rates.plain:
            self.group_rates = GroupRates(rates, zero=engine.kind is EngineKind.deepspeed)
            self.add_callback(self.group_rates)

    def create_optimizer(self, model: Any = None) -> Any:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.group_rates is not None:
            self.optimizer = self.group_rates.group(optimizer)
        return self.optimizer
