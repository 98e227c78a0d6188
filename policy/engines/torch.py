"""The plain engine: one process, one optimizer; and `make_engine`, which chooses between it and
`DeepSpeedEngine`, which offers the same methods over ZeRO.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conf.choices import EngineKind
from conf.schema import EngineConfig
from policy.engines.base import NonFinite, OptimSettings, new_optimizer
from policy.engines.loading import Rates, check_groups, mark_tables, one_rate, set_rates
from policy.model import no_gather, tending_of
from rlhf.process import distributed


def _adder(master: Tensor) -> Callable[[Tensor], None]:
    """A hook that moves a half-precision parameter's gradient into `master`'s, in float32."""

    def add(param: Tensor) -> None:
        gradient, param.grad = param.grad, None
        if gradient is None:
            return
        if master.grad is None:
            master.grad = gradient.float()
        else:
            master.grad.add_(gradient)

    return add


class TorchEngine:
    """One optimizer in one process; half-precision weights get float32 master copies, which it
    steps and which hold the gradients: micro-batches are added in float32, so that how many there
    are changes nothing.
    """

    def __init__(
        self,
        module: nn.Module,
        optim: OptimSettings,
        device: torch.device,
        rates: Rates | None = None,
    ) -> None:
        """rates: of the groups of parameters; None: one rate for all that train."""
        self.module = module.to(device)
        self.optim = optim
        self.rates = rates or one_rate(module)
        self.steps = 0
        self.scale = 1.0  # of the learning rate; the loop's, which sets it for each step
        # of the gradient that waits for its step, once it is clipped
        self._norm: float | None = None
        self.params = self.rates.params
        mark_tables(self.module)
        self.masters = [
            p if p.dtype == torch.float32 else p.detach().float().clone().requires_grad_()
            for p in self.params
        ]
        for param, master in zip(self.params, self.masters, strict=True):
            if master is not param:
                vars(master)["is_table"] = vars(param).get("is_table", False)
                param.register_post_accumulate_grad_hook(_adder(master))
        self.optimizer = new_optimizer(self._groups(), optim)
        self._hold()

    def _groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups: the masters of `rates.groups`."""
        masters = iter(self.masters)
        return [{"params": [next(masters) for _ in group.params]} for group in self.rates.groups]

    def _hold(self) -> None:
        """Groups whose turn has not come take no gradient, so nothing is computed for them."""
        if self.rates.every is not None:
            self.rates.hold(self.rates.phase(self.steps))

    def __call__(self, *args: Tensor, **named: Any) -> Any:
        return self.module(*args, **named)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the loss's gradient; `last` marks the last micro-batch before `step` (which only
        DeepSpeed needs to know).
        """
        self._norm = None
        loss.backward()

    def clip(self) -> float | None:
        """Clip the gradient that waits for its step; returns its norm before that. Nothing else
        changes.
        """
        if self._norm is None:
            self._norm = float(
                torch.nn.utils.clip_grad_norm_(self.masters, self.optim.max_grad_norm or math.inf)
            )
        return self._norm

    def discard(self) -> None:
        """Forget the gradient; weights, optimizer and step count stay as they are."""
        self._norm = None
        for tensor in (*self.params, *self.masters):
            tensor.grad = None

    def step(self) -> float:
        """One optimizer step. Returns the gradient's norm before clipping; raises NonFinite before
        a bad gradient is applied.
        """
        norm = self.clip()
        assert norm is not None
        if not math.isfinite(norm):
            raise NonFinite(f"the gradient's norm is {norm}")
        self._norm = None
        groups = self.optimizer.param_groups
        factors = self.rates.factors(self.rates.phase(self.steps))
        set_rates(groups, [self.rate] * len(groups), factors)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for param, master in zip(self.params, self.masters, strict=True):
                if master is not param:
                    param.copy_(master)
        self.steps += 1
        self._hold()
        return norm

    @property
    def rate(self) -> float:
        return self.optim.rate(self.steps) * self.scale

    gather = staticmethod(no_gather)

    @torch.no_grad()
    def write(self, param: nn.Parameter, value: Tensor) -> None:
        """Set a trained parameter, and its float32 copy where it has one."""
        for own, master in zip(self.params, self.masters, strict=True):
            if own is param:
                master.copy_(value)
        param.copy_(value)

    def save(self, directory: Path) -> None:
        """Trained weights, optimizer state and step count, in `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        state = {
            "masters": [m.detach() for m in self.masters],
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
        }
        torch.save(state, directory / "engine.pt")

    def load(self, directory: Path) -> None:
        """What `save` wrote. Raises UserError where its groups of parameters are not this run's."""
        state = torch.load(directory / "engine.pt", weights_only=True, map_location="cpu")
        check_groups(state["optimizer"]["param_groups"], self.optimizer.param_groups, directory)
        with torch.no_grad():
            for param, master, saved in zip(
                self.params, self.masters, state["masters"], strict=True
            ):
                master.copy_(saved)
                if master is not param:
                    param.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
        self._hold()


def freeze(module: nn.Module, cfg: EngineConfig, device: torch.device, *, half: bool) -> Any:
    """A module that only runs forward, as a reference does; under ZeRO-3 parted like the policy."""
    if cfg.kind is EngineKind.deepspeed:
        from policy.engines import deepspeed

        return deepspeed.freeze(module, cfg, device, half=half)
    return module.requires_grad_(False).eval().to(device)


def make_engine(
    module: nn.Module,
    cfg: EngineConfig,
    optim: OptimSettings,
    device: torch.device,
    *,
    half: bool,
    rates: Rates | None = None,
) -> Any:
    """The engine that the config names. `half`: the weights are bfloat16 (DeepSpeed must know);
    rates: of groups of parameters, None: one rate for all that train.
    """
    tending_of(getattr(module, "model", module)).begin(optim.total_steps)
    if cfg.kind is EngineKind.deepspeed:
        from policy.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(module, cfg, optim, device, half=half, rates=rates)
    distributed.require_one_process("engine=torch", distributed.SEVERAL_PROCESSES)
    return TorchEngine(module, optim, device, rates)
