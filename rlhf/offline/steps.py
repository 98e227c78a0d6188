"""The optimizer steps of TRL's trainers: their learning rates, and when a step must not be applied.

`Guard` answers losses and gradients that are NaN, infinite or a spike. `rlhf/offline/trainers.py`
calls all of this. `HeldOutRows` compares no losses on different rows after a resume. Which rows a
step trains is step_rows.py's.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from conf.choices import EngineKind, OnNonFinite
from conf.schema import EngineConfig
from conf.stages import OfflineStage
from policy.engines.base import Brake, GradientNoise
from policy.engines.loading import Rates, WaitingAdamW, set_rates
from rlhf.offline.step_rows import CARRIED
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


# ---- the held-out rows of a run that is resumed ----


def content_hash(rows: datasets.Dataset) -> str:
    """A hash of the tokens, labels and weights of encoded rows, hexadecimal."""
    columns = [name for name in sorted(rows.column_names) if _is_content(name)]
    digest = hashlib.sha256(json.dumps(columns).encode())
    for row in rows.select_columns(columns):
        digest.update(json.dumps([row[name] for name in columns]).encode())
    return digest.hexdigest()[:40]


def _is_content(column: str) -> bool:
    return column.endswith("ids") or column.startswith("label") or column in CARRIED


class HeldOutRows(TrainerCallback, ExportableState):
    """Writes into each checkpoint which rows its held-out loss was measured on.

    A resumed run with other ones evaluates before its first step: its best weights are those with
    the lowest loss from there on, where the checkpoint that it resumes from counts too.
    """

    def __init__(self, rows: str) -> None:
        """rows: a hash of this launch's held-out rows."""
        self.rows = rows
        self.since = 0  # the step of the first evaluation on them
        self.changed = False  # this launch's rows, since the checkpoint that it resumes from

    def state(self) -> dict[str, Any]:
        """What transformers writes into a checkpoint."""
        return {"args": {"rows": self.rows}, "attributes": {"since": self.since}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare with the checkpoint's rows, where it says which they were."""
        known = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step == 0 or known is None:
            return
        self.since = known["attributes"]["since"]
        if known["args"]["rows"] == self.rows:
            return
        self.changed, self.since = True, state.global_step
        args.eval_on_start = True
        # before stage.patience compares with it
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        if distributed.is_main():
            LOG.warning(
                "resume: the held-out rows are not those of the checkpoint at step %d, so losses "
                "from before don't compare: the best weights are those of the lowest loss on the "
                "new rows, from step %d on.",
                state.global_step,
                state.global_step,
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The checkpoint that the run resumes from is the best so far."""
        if not self.changed:
            return
        self.changed = False
        loss = kwargs["metrics"]["eval_loss"]
        if math.isfinite(loss):
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            state.best_metric, state.best_global_step = loss, state.global_step
            state.best_model_checkpoint = str(folder)


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


class StallWatch(TrainerCallback, ExportableState):
    """stage.unfreeze.patience: unfreezes more blocks when the held-out loss stalls, and keeps what
    it knows in the checkpoints.
    """

    def __init__(self, groups: GroupRates, stage: OfflineStage, held_out: HeldOutRows) -> None:
        """held_out: added to the trainer before this."""
        self.groups, self.stage, self.held_out = groups, stage, held_out
        self.best: float | None = None
        self.waited = 0  # evaluations since the best

    def state(self) -> dict[str, Any]:
        """What transformers writes into a checkpoint."""
        known = {"best": self.best, "waited": self.waited, "stalls": self.groups.stalls}
        return {"args": {}, "attributes": known}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        known = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step == 0 or known is None:
            return
        self.groups.stalls = known["attributes"]["stalls"]
        if not self.held_out.changed:
            self.best, self.waited = (known["attributes"][name] for name in ("best", "waited"))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loss = float(kwargs["metrics"]["eval_loss"])
        least = self.stage.min_improvement
        if math.isfinite(loss) and (self.best is None or self.best - loss > least):
            self.best, self.waited = loss, 0
            return
        self.waited += 1
        patience = self.stage.unfreeze.patience
        if patience is not None and self.waited >= patience:
            self.groups.stalls += 1
            self.waited = 0
