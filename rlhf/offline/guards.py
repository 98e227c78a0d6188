"""What a TRL trainer gets here beyond its loss: steps of whole batches, sealed checkpoints, and an
answer to NaN, infinities and spikes.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils.data import Sampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from conf.choices import OnNonFinite
from conf.stages import OfflineStage
from policy.engines import resharding
from policy.engines.base import Brake, NonFinite
from rlhf.offline.resume import OtherRanks
from rlhf.process import checkpoints, distributed
from rlhf.types import TrainingDiverged, UserError

LOG = logging.getLogger("rlhf.stages")
_DUMPS = 5  # batches written before further ones replace each other
_STATE = "guard.json"  # in each checkpoint


class WholeBatches(Sampler[int]):
    """Shuffled passes over `rows`, each cut to whole batches of `batch_size`, so that a step trains
    the same rows however it is split.

    The order is a function of `seed` and the pass alone, and the pass one of the steps done: every
    rank draws the same, and a resumed run what an uninterrupted one would. Rows left over differ
    from pass to pass. Fewer rows than one batch are a batch.
    """

    def __init__(
        self, rows: int, batch_size: int, seed: int, steps_done: Callable[[], int]
    ) -> None:
        self.rows, self.seed, self.steps_done = rows, seed, steps_done
        self.batches = max(1, rows // batch_size)  # per pass
        self.length = min(rows, self.batches * batch_size)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(
            self.seed * 100_003 + self.steps_done() // self.batches
        )
        return iter(torch.randperm(self.rows, generator=generator)[: self.length].tolist())


class Guard:
    """What must not be applied in a run of a trainer, and what is done about it: stage.on_nonfinite
    and the spike rules.
    """

    def __init__(
        self,
        stage: OfflineStage,
        run_dir: Path,
        checkpoint_dir: Path,
        record: Callable[[int, dict[str, float]], None],
    ) -> None:
        """`record` takes the figures of a step that was left out."""
        self.stage, self.run_dir, self.checkpoint_dir, self.record = (
            stage,
            run_dir,
            checkpoint_dir,
            record,
        )
        self.brake = Brake.from_stage(stage)
        self.bad: str | None = None  # why the optimizer step under way must not be applied
        # of the optimizer step under way, on this rank
        self.micro_batches: list[dict[str, Any]] = []
        self.losses: list[float] = []  # of the same
        self.skipped = self.rewinds = self.dumps = 0

    def refuse(
        self, step: int, what: str, value: float, tokenizer: Any, why: str | None = None
    ) -> None:
        """Save the batch of `step`, once, and raise TrainingDiverged where the run is to stop.
        `why`: in place of "the `what` is `value`".
        """
        if self.bad is not None:
            return
        self.dumps += 1
        name = f"step{step}" if self.dumps <= _DUMPS else "last"
        where = save_batch(self.run_dir, self.micro_batches, tokenizer, name, step, {what: value})
        self.bad = (
            f"step {step}: {why or f'the {what} is {value}'}. The batch that caused it: "
            f"{where} (its texts beside it as .json)."
        )
        if self.stage.on_nonfinite is OnNonFinite.stop:
            raise TrainingDiverged(
                f"{self.bad} Training stopped (stage.on_nonfinite=stop). Look at its rows, or "
                f"lower stage.learning_rate={self.stage.learning_rate}."
            )

    def checkpoint(self) -> Path:
        """Where a rewind goes to, the same on every rank. Raises TrainingDiverged where there is
        none, or where it was tried too often.
        """
        found = distributed.broadcast(
            checkpoints.newest(self.checkpoint_dir)[0] if distributed.is_main() else None
        )
        self.rewinds += 1
        if found is None or self.rewinds > self.stage.rewinds:
            why = (
                "there is no whole checkpoint to go back to"
                if found is None
                else f"stage.rewinds={self.stage.rewinds} times it was tried already"
            )
            raise TrainingDiverged(f"{self.bad} stage.on_nonfinite=rewind: {why}.")
        place: Path = found[0]
        return place

    def save(self, directory: Path) -> None:
        state = {"brake": self.brake.state_dict(), "skipped": self.skipped, "rewinds": self.rewinds}
        (directory / _STATE).write_text(json.dumps(state), encoding="utf-8")

    def load(self, directory: Path) -> None:
        """The counts of a run that goes on; what a rewind has counted since stays."""
        place = directory / _STATE
        if not place.is_file():  # written before there were such rules
            return
        state = json.loads(place.read_text(encoding="utf-8"))
        self.brake.load_state_dict(state["brake"])
        self.skipped, self.rewinds = (
            max(self.skipped, state["skipped"]),
            max(self.rewinds, state["rewinds"]),
        )


class Guarding(OtherRanks):
    """To be mixed into a Trainer, before it: no loss or gradient that is NaN, infinite or a spike
    is applied (`Guard`).

    A rewind takes weights and optimizer back to the newest checkpoint and goes on with the rows
    that follow; step count, learning rate and the order of rows are not turned back, so the steps
    in between have been for nothing.
    """

    guard: Guard
    global_batch: int  # rows per optimizer step, over all ranks
    # The trainer's:
    train_dataset: Any
    processing_class: Any
    optimizer: Any
    lr_scheduler: Any
    _tr_loss: Any
    _globalstep_last_logged: int
    _load_from_checkpoint: Any

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        result = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )  # type: ignore[misc]
        if self.model.training:
            loss = result[0] if return_outputs else result
            self.guard.micro_batches.append(inputs)
            # All ranks learn of it, so that none waits for a rank that has stopped.
            if distributed.all_max([float(not bool(torch.isfinite(loss).all()))])[0]:
                self._refuse("loss", float(loss.detach()))
        return result

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if not self.guard.micro_batches:
            # what the trainer has summed up for its next log
            self._loss_before = self._tr_loss.clone()
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self.guard.stage.spike_loss is not None:
            self.guard.losses.append(float(loss))
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> WholeBatches:
        return WholeBatches(
            len(self.train_dataset),
            self.global_batch,
            self.args.seed,
            lambda: self.state.global_step,
        )

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # transformers calls this once per optimizer step; with torch's engine the weights have not
        # changed by then
        guard = self.guard
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        # float16's loss scaler skips such steps itself
        if norm is not None and not math.isfinite(float(norm)) and not self.args.fp16:
            self._refuse("gradient's norm", float(norm))
        if guard.bad is None:
            self._look_for_spikes(norm)
        if guard.bad is not None and guard.stage.on_nonfinite is OnNonFinite.skip:
            model.zero_grad(set_to_none=True)  # AdamW passes over what has no gradient
        guard.micro_batches = []
        return norm

    def _look_for_spikes(self, norm: Any) -> None:
        guard, what, value = self.guard, "loss", 0.0
        try:
            if guard.stage.spike_loss is not None:
                value = distributed.all_sum([math.fsum(guard.losses)])[0] / distributed.world_size()
                guard.brake.check("loss", {"the loss": value})
            if guard.stage.spike_grad_norm is not None and norm is not None:
                what, value = "gradient's norm", float(norm)
                guard.brake.check("grad_norm", {"the gradient's norm": value})
        except NonFinite as error:
            self._refuse(what, value, str(error))

    def _maybe_log_save_evaluate(self, tr_loss: Any, *args: Any, **kwargs: Any) -> None:
        # transformers calls this after each optimizer step, before it saves or evaluates
        guard = self.guard
        guard.losses = []
        if guard.bad is not None:
            if guard.stage.on_nonfinite is OnNonFinite.rewind:
                self._rewind(guard.checkpoint())
                guard.record(
                    self.state.global_step,
                    {"train/skipped": 1.0, "train/rewinds": float(guard.rewinds)},
                )
            else:
                LOG.warning("the step was left out (stage.on_nonfinite=skip): %s", guard.bad)
                guard.record(self.state.global_step, {"train/skipped": 1.0})
            guard.skipped += 1
            guard.bad = None
            tr_loss.copy_(self._loss_before)
            # the loss that is logged next is the mean of the steps that trained
            self._globalstep_last_logged += 1
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)  # type: ignore[misc]

    def _rewind(self, checkpoint: Path) -> None:
        """Weights and optimizer as `checkpoint` has them. A collective under DeepSpeed."""
        if distributed.is_main():
            LOG.warning(
                "weights and optimizer go back to %s, on with other rows (rewind %d): %s",
                checkpoint.name,
                self.guard.rewinds,
                self.guard.bad,
            )
        schedule = self.lr_scheduler.state_dict()
        if self.is_deepspeed_enabled:
            checkpoint = self._load_zero(checkpoint)
        else:
            self._load_from_checkpoint(str(checkpoint))
        self._load_optimizer_and_scheduler(str(checkpoint))
        self.lr_scheduler.load_state_dict(schedule)
        for group, rate in zip(
            self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True
        ):
            group["lr"] = rate

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that resumes after its last step, because it was killed before its end, would take
        # one step more.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As transformers saves, then sealed, and only then may older ones go; a disk that takes no
        more is a UserError.
        """
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        folder = Path(self.args.output_dir)
        place = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            with checkpoints.storing(f"checkpoint {place}", place, folder):
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
                distributed.barrier()
                if distributed.is_main():
                    self.guard.save(place)
                    resharding.record(place, self.engine)
                    checkpoints.seal(place)
                    checkpoints.clear_universal(folder)
        finally:
            self.args.save_total_limit = limit
        distributed.barrier()
        if distributed.is_main():
            rotate_checkpoints(str(folder), limit, self.state.best_model_checkpoint, use_mtime=True)

    def _load_best_model(self) -> None:
        wrong = (
            checkpoints.problem(Path(self.state.best_model_checkpoint))
            if distributed.is_main()
            else None
        )
        wrong = distributed.broadcast(wrong)
        if wrong is not None:
            raise UserError(
                f"the best checkpoint {self.state.best_model_checkpoint} can't be loaded back: "
                f"{wrong}. Train anew with run.overwrite=true."
            )
        super()._load_best_model()

    def _refuse(self, what: str, value: float, why: str | None = None) -> None:
        self.guard.refuse(self.state.global_step + 1, what, value, self.processing_class, why)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL writes a card with links of its own into every checkpoint; the run's manifest says
        more.
        """


def guarded(trainer_class: type) -> type:
    """`trainer_class` with `Guarding`: it stops, leaves a bad step out, or goes back."""
    return type("Guarded", (Guarding, trainer_class), {})


def save_batch(
    directory: Path,
    micro_batches: Sequence[dict[str, Any]],
    tokenizer: Any,
    name: str,
    step: int,
    figures: dict[str, float],
) -> Path:
    """This rank's micro-batches of one optimizer step as tensors, and their texts as JSON beside
    it. Returns the tensors' file.
    """
    place = directory / f"diverged_{name}_rank{distributed.rank()}.safetensors"
    tensors = {
        f"{i}.{k}": v.detach().cpu().clone()
        for i, batch in enumerate(micro_batches)
        for k, v in batch.items()
        if isinstance(v, torch.Tensor)
    }
    save_file(tensors, str(place))
    texts = [
        [
            text
            for k, ids in batch.items()
            if k.endswith("input_ids")
            for text in tokenizer.batch_decode(ids)
        ]
        for batch in micro_batches
    ]
    content = {
        "step": step,
        "rank": distributed.rank(),
        **{k: str(v) for k, v in figures.items()},
        "micro_batches": texts,
    }
    place.with_suffix(".json").write_text(
        json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return place
