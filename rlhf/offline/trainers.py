"""Our trainers: one subclass of TRL's for each (others: judged_pairs.py, likelihood.py, kto.py).

    transformers.Trainer         the loop over steps
    TRL's SFTTrainer, ...        the loss and its metrics
    PrivateHooks                 names of our own for what the two keep private (private_hooks.py)
    StageTrainer (below)         what every stage adds: whole batches, row weights, guards, resume
    SFT, Reward, ...             StageTrainer in front of TRL's class, and how its rows are weighed

`StageTrainer` stands first in each class, so its methods run before TRL's.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import SFTTrainer

from conf.choices import OnNonFinite
from conf.schema import EngineConfig
from policy.engines import resharding
from policy.engines.base import GradientNoise, NonFinite, OptimSettings, Plateau, as_asked
from policy.engines.deepspeed import in_kernels
from policy.engines.loading import Rates, mark_tables
from policy.model import is_peft, load_tending, save_tending
from rlhf.models.encoding import IGNORED
from rlhf.offline import step_rows
from rlhf.offline.picture_rows import own_names, with_pictures
from rlhf.offline.private_hooks import PrivateHooks, deepspeed_load_checkpoint
from rlhf.offline.step_rows import (
    CARRIED,
    GrowingBatches,
    Parts,
    StepRows,
    Tended,
    WholeBatches,
    WithWeights,
    parts_of,
)
from rlhf.offline.steps import GroupRates, Guard
from rlhf.process import checkpoints, distributed, randomness
from rlhf.types import WEIGHT, UserError

LOG = logging.getLogger("rlhf.stages")
Inputs = dict[str, Any]
Carried = dict[str, Tensor]  # weights and soft labels, [B] each, by the names of their columns
Loss = Callable[..., Any]  # a trainer's compute_loss(model, inputs, return_outputs=)


class StageTrainer(PrivateHooks):
    """What every stage adds to TRL's trainer. guard: what is done about bad losses and gradients;
    engine: of this launch; rates: of groups.
    """

    extra_columns = step_rows.EXTRA
    data_collator: Any
    optimizer: Any
    schedule: OptimSettings
    plateau: Plateau | None = None
    noise: GradientNoise | None = None

    def __init__(
        self,
        *args: Any,
        guard: Guard,
        engine: EngineConfig,
        rates: Rates | None = None,
        **kwargs: Any,
    ) -> None:
        self.guard, self.engine = guard, engine
        self.group_rates = GroupRates.of(rates, engine)
        super().__init__(*args, **kwargs)
        self.tended = Tended(self.model)
        self.data_collator = with_pictures(WithWeights(self.data_collator), self.processing_class)
        if self.group_rates is not None:
            self.add_callback(self.group_rates)

    # ---- the learning rate ----

    def set_schedule(self, schedule: OptimSettings, plateau: Plateau | None) -> None:
        """The run's steps and their rates: packing decides how many rows there are."""
        self.schedule, self.plateau = schedule, plateau
        self.args.max_steps = schedule.total_steps

    def rate_factor(self, step: int) -> float:
        stage = self.guard.stage
        factor = self.schedule.factor(step)
        factor *= stage.batch_growth.rate_scale(stage.batch_size, step)
        return factor if self.plateau is None else factor * self.plateau.scale

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            mark_tables(self.model)
            optimizer = as_asked(super().create_optimizer(model), self.schedule)
            if self.group_rates is not None:
                optimizer = self.group_rates.group(optimizer)
            self.optimizer = in_kernels(optimizer, self.engine)
        return self.optimizer

    # ---- rows: whole batches, and weights ----

    def train_sampler(self) -> WholeBatches | GrowingBatches:
        stage, rows = self.guard.stage, len(self.train_dataset)

        def done() -> int:
            return int(self.state.global_step)

        if not self.grows:
            return WholeBatches(rows, stage.batch_size, self.args.seed, done)
        sizes = [stage.step_size(step) for step in range(self.args.max_steps)]
        return GrowingBatches(rows, sizes, self.args.seed, self.unit, done)

    @property
    def grows(self) -> bool:
        """Whether steps have more and more rows."""
        return bool(self.guard.stage.batch_growth.steps)

    @property
    def unit(self) -> int:  # rows of a batch of the loader, over all ranks
        return int(self.args.per_device_train_batch_size) * distributed.world_size()

    def batches_of_step(self, usual: int) -> int:
        size = self.guard.stage.step_size(self.state.global_step)
        return size // self.unit if self.grows else usual

    def get_train_dataloader(self) -> Any:
        """Rows as they are, where micro-batches are parted by tokens."""
        if self.engine.micro_batch_tokens is None:
            return super().get_train_dataloader()
        collate, self.data_collator = self.data_collator, StepRows
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate

    def part_step(self, batches: list[Any]) -> Parts | None:
        budget, rows = self.engine.micro_batch_tokens, self.args.per_device_train_batch_size
        if budget is None and not self.grows:
            return None
        return parts_of(batches, budget, self.data_collator, rows)

    def run_parts(self, model: Any, parts: Parts, tokens: Any) -> Tensor:
        """Forward and backward passes of a whole step, whose losses and figures weigh by rows."""
        losses: list[Tensor] = []
        for inputs, count, share in zip(parts.inputs, parts.counts, parts.shares(), strict=True):
            before = {name: len(values) for name, values in self.batch_metrics().items()}
            self.begin_part(share, last=len(losses) == len(parts.inputs) - 1)
            losses.append(super().training_step(model, inputs, tokens))
            if self.noise is not None:
                self.noise.part(count)
            for name, values in self.batch_metrics().items():
                added = values[before.get(name, 0) :]
                if len(added) == 1:  # a mean over the micro-batch; others are a figure a row
                    values.extend(added * (count - 1))
        return torch.stack(losses).sum()

    def weighted_loss(
        self, plain: Loss, model: Any, inputs: Inputs, carried: Carried, return_outputs: bool
    ) -> Any:
        """The loss of rows that have weights or soft labels, as `compute_loss` returns it.

        plain: TRL's own loss; inputs: the batch without what is in `carried`.
        """
        raise NotImplementedError

    def compute_loss(
        self,
        model: Any,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's loss, weighed where the rows have weights, and refused where it is not finite."""
        plain = functools.partial(super().compute_loss, num_items_in_batch=num_items_in_batch)
        carried = {key: inputs[key] for key in CARRIED if key in inputs}
        if carried:
            rest = step_rows.without_carried(inputs)
            result = self.weighted_loss(plain, model, rest, carried, return_outputs)
        else:
            result = plain(model, inputs, return_outputs=return_outputs)
        if self.model.training:
            self.guard.micro_batches.append(inputs)
            self.check_loss(result[0] if return_outputs else result)
            result = self.tended.with_penalty(self, result, num_items_in_batch)
        return result

    # ---- held-out loss: a mean over all of it, however it is split ----

    def eval_sum(self, loss: float, inputs: Inputs) -> tuple[float, float]:
        """A micro-batch's loss times its rows, and its rows."""
        rows = float(next(len(value) for value in inputs.values() if hasattr(value, "__len__")))
        return loss * rows, rows

    # ---- guards: losses and gradients that are NaN, infinite or a spike ----

    def check_loss(self, loss: Tensor) -> None:
        # All ranks learn of it, so that none waits for a rank that has stopped.
        if distributed.all_max([float(not bool(torch.isfinite(loss).all()))])[0]:
            self.refuse("loss", float(loss.detach()))

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """One forward and backward pass, of which an optimizer step has several, or all of a
        step's.
        """
        if not self.guard.micro_batches:
            self.remember_loss()
            self.tended.tending.clear()
        if isinstance(inputs, Parts):
            loss = self.run_parts(model, inputs, num_items_in_batch)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
            if self.noise is not None:
                self.noise.part(self.args.per_device_train_batch_size)
        if self.guard.stage.spike_loss is not None:
            self.guard.losses.append(float(loss))
        return loss

    def before_optimizer_step(self, model: Any, grad_norm: Any) -> None:
        """Refuse a bad gradient; with ``stage.on_nonfinite=skip`` a refused step has no gradient
        left to apply.
        """
        guard = self.guard
        self.tended.norm = grad_norm
        # With float16 the loss scaler leaves out such steps itself.
        finite = grad_norm is None or math.isfinite(float(grad_norm))
        if not finite and not self.args.fp16:
            self.refuse("gradient's norm", float(grad_norm))
        if guard.problem is None:
            self.check_spikes(grad_norm)
        if guard.problem is not None and guard.stage.on_nonfinite is OnNonFinite.skip:
            model.zero_grad(set_to_none=True)  # AdamW passes over what has no gradient
        if self.noise is not None:
            self.noise.end(None if guard.problem else float(grad_norm))
        guard.micro_batches = []

    def check_spikes(self, grad_norm: Any) -> None:
        """Refuse a loss or gradient's norm far above those of the last steps. A collective."""
        guard, what, value = self.guard, "loss", 0.0
        try:
            if guard.stage.spike_loss is not None:
                value = distributed.all_sum([math.fsum(guard.losses)])[0] / distributed.world_size()
                guard.brake.check("loss", {"the loss": value})
            if guard.stage.spike_grad_norm is not None and grad_norm is not None:
                what, value = "gradient's norm", float(grad_norm)
                guard.brake.check("grad_norm", {"the gradient's norm": value})
        except NonFinite as error:
            self.refuse(what, value, str(error))

    def refuse(self, what: str, value: float, why: str | None = None) -> None:
        """The step under way must not be applied. Raises TrainingDiverged where the run stops."""
        self.guard.refuse(self.state.global_step + 1, what, value, self.processing_class, why)

    def after_optimizer_step(self) -> bool:
        """Go back or on after a refused step, as ``stage.on_nonfinite`` says."""
        guard = self.guard
        guard.losses = []
        if guard.problem is None:
            self.tended.after_step(self)
            return False
        self.tended.tending.clear()
        figures = {"train/skipped": 1.0}
        if guard.stage.on_nonfinite is OnNonFinite.rewind:
            self.rewind(guard.checkpoint())
            figures["train/rewinds"] = float(guard.rewinds)
        else:
            LOG.warning("the step was left out (stage.on_nonfinite=skip): %s", guard.problem)
        guard.record(self.state.global_step, figures)
        guard.skipped += 1
        guard.problem = None
        return True

    def rewind(self, checkpoint: Path) -> None:
        """Weights and optimizer as `checkpoint` has them. A collective under DeepSpeed.

        Training goes on with the rows that follow. Step count, learning rate and the order of rows
        are not turned back: what the steps in between have learned is lost.
        """
        if distributed.is_main():
            LOG.warning(
                "weights and optimizer go back to %s, on with other rows (rewind %d): %s",
                checkpoint.name,
                self.guard.rewinds,
                self.guard.problem,
            )
        schedule = self.lr_scheduler.state_dict()
        if self.is_deepspeed_enabled:
            checkpoint = self.load_zero(checkpoint)
        else:
            self.load_weights(checkpoint)
        self.load_optimizer(checkpoint)
        self.lr_scheduler.load_state_dict(schedule)
        rates = self.lr_scheduler.get_last_lr()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    # ---- checkpoints: sealed when whole, loaded on any number of ranks ----

    @contextmanager
    def around_checkpoint(self, directory: Path) -> Iterator[None]:
        """Seal a checkpoint that was written. Raises UserError for a disk that takes no more."""
        what, folder = f"checkpoint {directory}", directory.parent
        with checkpoints.storing(what, directory, folder), own_names(self.model):
            yield
            distributed.barrier()
            if distributed.is_main():
                self.guard.save(directory)
                save_tending(self.model, directory)
                resharding.record(directory, self.engine)
                checkpoints.seal(directory)
                checkpoints.clear_universal(folder)
        distributed.barrier()

    @contextmanager
    def around_best_checkpoint(self, best: Path) -> Iterator[Path]:
        """The best checkpoint in a form that this launch loads: it may have been written before a
        resume on another number of ranks. Raises UserError for one that was damaged since.
        """
        found = checkpoints.problem(best) if distributed.is_main() else None
        problem = distributed.broadcast(found)
        if problem is not None:
            raise UserError(
                f"the best checkpoint {best} can't be loaded back: {problem}. Train anew with "
                "run.overwrite=true."
            )
        directory = resharding.adapt_on_all_ranks(best, self.engine)
        zero = self.is_deepspeed_enabled
        with resharding.reading(self.model_wrapped, directory) if zero else nullcontext():
            yield directory
        distributed.barrier()
        if distributed.is_main():
            checkpoints.clear_universal(best.parent)

    def load_zero(self, checkpoint: Path) -> Path:
        """Weights and optimizer of a sealed checkpoint, whatever ranks wrote it, into the living
        DeepSpeed engine. Returns the directory they came from. A collective.
        """
        directory = resharding.adapt_on_all_ranks(checkpoint, self.engine)
        with resharding.reading(self.model_wrapped, directory):
            deepspeed_load_checkpoint(
                self.model_wrapped, str(directory), load_module_strict=not is_peft(self.model)
            )
        return directory

    def optimizer_loaded(self, checkpoint: Path) -> None:
        """Repair what DeepSpeed leaves out of a universal form, and load the method's state."""
        if resharding.is_universal(checkpoint):
            resharding.repair_universal(self.model_wrapped, checkpoint)
        load_tending(self.model, checkpoint)

    def restart_randomness(self, checkpoint: Path) -> bool:
        """On another number of ranks than the checkpoint's, whose states fit no rank of this
        launch (transformers would leave them out without a word).
        """
        saved = resharding.recorded(checkpoint)
        if saved is None or saved.ranks == distributed.world_size():
            return False
        randomness.begin_anew(saved.ranks, self.args.seed * 1_000_003 + self.state.global_step)
        return True


# ---- one class per trainer of TRL's ----


class SFT(StageTrainer, SFTTrainer):
    """Supervised fine-tuning. A row's weight multiplies the log-probability of each of its tokens;
    the loss divides by the number of tokens, as without weights.
    """

    def eval_sum(self, loss: float, inputs: Inputs) -> tuple[float, float]:
        """A micro-batch's loss times its tokens that train, and their number."""
        tokens = float((inputs["labels"][..., 1:] != IGNORED).sum())
        return loss * tokens, tokens

    def weighted_loss(
        self, plain: Loss, model: Any, inputs: Inputs, carried: Carried, return_outputs: bool
    ) -> Any:
        weights = carried[WEIGHT]
        weighed = False

        def weigh_tokens(outputs: Any) -> None:
            nonlocal weighed
            # TRL calls the model once more, for metrics that need whole logits.
            if getattr(outputs, "log_probs", None) is None:
                return
            outputs.log_probs = outputs.log_probs * weights[:, None].to(outputs.log_probs.dtype)
            weighed = True

        changed = step_rows.changed(model, weigh_tokens)
        result = plain(changed, inputs, return_outputs=return_outputs)
        if not weighed:
            raise RuntimeError(
                "SFTTrainer took its loss from something else than the model's log_probs, so the "
                "rows' weights had no effect"
            )
        return result
