"""The optimizer steps of TRL's trainers: their learning rates, and when a step must not be applied.

`Guard` answers losses and gradients that are NaN, infinite or a spike. `rlhf/offline/trainers.py`
calls all of this. Which rows a step trains is step_rows.py's; what looks at held-out rows is
held_out.py's.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from conf.choices import EngineKind, OnNonFinite
from conf.schema import EngineConfig
from conf.stages import OfflineStage
from policy.engines.base import Brake, GradientNoise
from policy.engines.loading import Rates, WaitingAdamW, set_rates
from rlhf.process import checkpoints, distributed
from rlhf.run.directory import BadBatches, write_tensors
from rlhf.types import TrainingDiverged

LOG = logging.getLogger("rlhf.stages")
_STATE = "guard.json"  # in each checkpoint
Row = dict[str, Any]
Inputs = dict[str, Any]


# ---- learning rates ----


class StepRates(LambdaLR):
    """The rate of each parameter group: its own highest one, times `factor` of the step."""

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float]) -> None:
        super().__init__(optimizer, factor)

    def refresh(self) -> None:
        """Take up that `factor` has changed for the step that comes next."""
        rates = []
        for group, base, factor in zip(
            self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(self.last_epoch)
            rates.append(group["lr"])
        self._last_lr = rates


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
    """Gives each group its learning rate for the time of an optimizer step. Between steps all have
    the schedule's, so that the schedule, what is logged and checkpoints are as without groups.
    """

    def __init__(self, rates: Rates, *, zero: bool) -> None:
        """zero: under DeepSpeed, which steps inside its backward pass."""
        self.rates, self.zero = rates, zero
        self.numbers: list[int] = []  # which of `rates.groups` each of the optimizer's is of
        self.stalls = 0  # of the held-out loss, where these unfreeze (`StallWatch`)
        self.unfrozen = 0

    @staticmethod
    def of(rates: Rates | None, engine: EngineConfig) -> "GroupRates | None":
        """None where one rate is for all."""
        if rates is None or rates.plain:
            return None
        return GroupRates(rates, zero=engine.kind is EngineKind.deepspeed)

    def phase(self, step: int) -> int:
        """Unfreezings before the step after `step` steps."""
        by_loss = min(self.rates.unfreezings, self.stalls)
        return by_loss if self.rates.every is None else self.rates.phase(step)

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

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.rates.unfreezings and "loss" in kwargs["logs"]:
            kwargs["logs"]["train/unfreezings"] = float(self.unfrozen)


# ---- steps that must not be applied ----


class Guard:
    """Knows which steps of a run must not be applied, and what ``stage.on_nonfinite`` and the
    limits on spikes say about them.
    """

    def __init__(
        self,
        stage: OfflineStage,
        run_dir: Path,
        checkpoint_dir: Path,
        record: Callable[[int, dict[str, float]], None],
    ) -> None:
        """run_dir: where refused batches are kept; record: takes the step and the figures of a step
        that was left out.
        """
        self.stage = stage
        self.checkpoint_dir = checkpoint_dir
        self.record = record
        self.bad_batches = BadBatches(run_dir, "diverged_{}_rank{}", "step{}")
        self.brake = Brake.from_stage(stage)
        # Of the optimizer step under way, on this rank:
        self.problem: str | None = None  # why it must not be applied
        self.micro_batches: list[dict[str, Any]] = []
        self.losses: list[float] = []
        # Of the run:
        self.skipped = self.rewinds = 0

    def refuse(
        self, step: int, what: str, value: float, tokenizer: Any, why: str | None = None
    ) -> None:
        """Keep the batch of `step`, once. Raises TrainingDiverged where the run is to stop.

        why: the reason in a message, where it is more than "the `what` is `value`".
        """
        if self.problem is not None:
            return
        path = self.bad_batches.next_path(step)
        path = save_batch(path, self.micro_batches, tokenizer, step, {what: value})
        reason = why or f"the {what} is {value}"
        self.problem = (
            f"step {step}: {reason}. The batch that caused it: {path} (its texts beside it as "
            ".json)."
        )
        if self.stage.on_nonfinite is OnNonFinite.stop:
            raise TrainingDiverged(
                f"{self.problem} Training stopped (stage.on_nonfinite=stop). Look at its rows, or "
                f"lower stage.learning_rate={self.stage.learning_rate}."
            )

    def checkpoint(self) -> Path:
        """The checkpoint that a rewind goes to, the same on every rank, and count the rewind.

        Raises TrainingDiverged where there is none, or after more than ``stage.rewinds`` rewinds.
        """
        self.rewinds += 1
        return checkpoints.rewind_target(
            self.checkpoint_dir, self.rewinds, self.stage.rewinds, str(self.problem)
        )

    def save(self, directory: Path) -> None:
        """Write the counts and the spikes' windows into a checkpoint."""
        state = {"brake": self.brake.state_dict(), "skipped": self.skipped, "rewinds": self.rewinds}
        (directory / _STATE).write_text(json.dumps(state), encoding="utf-8")
        if not self.stage.save_optimizer:
            checkpoints.mark_weights_alone(directory)

    def load(self, directory: Path) -> None:
        """Read what `save` wrote; counts that a rewind has raised since stay."""
        path = directory / _STATE
        if not path.is_file():  # a checkpoint from before there were guards
            return
        state = json.loads(path.read_text(encoding="utf-8"))
        self.brake.load_state_dict(state["brake"])
        self.skipped = max(self.skipped, state["skipped"])
        self.rewinds = max(self.rewinds, state["rewinds"])


def save_batch(
    path: Path,
    micro_batches: Sequence[dict[str, Any]],
    tokenizer: Any,
    step: int,
    figures: dict[str, float],
) -> Path:
    """This rank's micro-batches of one optimizer step as tensors, and their texts as JSON beside
    them. path: without a suffix. Returns the tensors' file.
    """
    tensors: dict[str, torch.Tensor] = {}
    texts: list[list[str]] = []
    for number, batch in enumerate(micro_batches):
        texts.append([])
        for column, value in batch.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{number}.{column}"] = value
            if column.endswith("input_ids"):
                texts[-1].extend(tokenizer.batch_decode(value))
    file = path.with_suffix(".safetensors")
    write_tensors(file, tensors)
    content = {
        "step": step,
        "rank": distributed.rank(),
        **{key: str(value) for key, value in figures.items()},
        "micro_batches": texts,
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.with_suffix(".json").write_text(text, encoding="utf-8")
    return file


# ---- the noise of gradients ----


class NoiseWatch(TrainerCallback, ExportableState):
    """stage.noise_scale: writes its figures beside the loss, and its averages into checkpoints."""

    def __init__(self, noise: GradientNoise) -> None:
        self.noise = noise

    def state(self) -> dict[str, Any]:
        """What transformers writes into a checkpoint."""
        return {"args": {}, "attributes": self.noise.state_dict()}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        known = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and known is not None:
            self.noise.load_state_dict(known["attributes"])
        self.noise.watch()

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "learning_rate" in logs:
            logs.update(self.noise.figures())


# ---- callbacks of a checkpoint ----


class KnownCallbacks(TrainerCallback):
    """A checkpoint from before a callback was there holds no state of it, such as one without
    ``stage.patience``: transformers fails with a KeyError when it writes the next one.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self.callbacks = [one for one in callbacks if isinstance(one, ExportableState)]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the states that are missing."""
        for callback in self.callbacks:
            state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
