"""Everything private that our trainers use of transformers and TRL, in this file and nowhere else.

Private means: a name with a leading underscore, a public method that isn't documented for
overriding, or a helper of an internal module. `PrivateHooks` overrides the private methods and
calls hooks with names of our own in their place, which `rlhf/offline/trainers.py` fills in; no
other file of ours knows the private names.

`USED` lists every private part with the signature that we rely on;
`tests/offline/test_private_hooks.py` says which of them an installed version no longer has.
"""

import itertools
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers.integrations.deepspeed
import transformers.trainer_utils
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import (
    deepspeed_load_checkpoint,
    unset_hf_deepspeed_config,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from rlhf.offline.step_rows import Parts
from rlhf.offline.steps import StepRates
from rlhf.process import distributed

with warnings.catch_warnings():
    # TRL promises nothing about these two; its version is pinned.
    warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

__all__ = [
    "PREFIX_CHECKPOINT_DIR",
    "TRAINER_STATE_NAME",
    "USED",
    "CPOConfig",
    "CPOTrainer",
    "DPOTrainer",
    "DataCollatorForUnpairedPreference",
    "ORPOConfig",
    "ORPOTrainer",
    "Part",
    "PrivateHooks",
    "deepspeed_load_checkpoint",
    "unset_hf_deepspeed_config",
]


class PrivateHooks(Trainer):
    """Between `StageTrainer` and TRL's trainer: private methods call the hooks below."""

    extra_columns: tuple[str, ...] = ()  # of the data, beside those that the trainer itself reads
    pretokenised = False  # the rows hold token ids already, so TRL must not tokenise them
    _signature_columns: Any
    lr_scheduler: Any

    # ---- hooks: what StageTrainer answers ----

    def train_sampler(self) -> Sampler[int]:
        """The order in which training rows are read."""
        raise NotImplementedError

    def before_optimizer_step(self, model: Any, grad_norm: Any) -> None:
        """Called once per optimizer step, when all gradients are there. With torch's engine the
        weights have not changed yet; DeepSpeed has stepped already.
        """
        raise NotImplementedError

    def after_optimizer_step(self) -> bool:
        """Called after each optimizer step, before the trainer logs, evaluates or saves. Returns
        whether the step was left out, so that its loss must not be in the logged mean.
        """
        raise NotImplementedError

    def around_checkpoint(self, directory: Path) -> AbstractContextManager[None]:
        """Around the writing of the checkpoint `directory`; waits for all ranks at its end."""
        raise NotImplementedError

    def around_best_checkpoint(self, best: Path) -> AbstractContextManager[Path]:
        """Around loading the best checkpoint; gives the directory to load it from."""
        raise NotImplementedError

    def optimizer_loaded(self, checkpoint: Path) -> None:
        """Called when the optimizer's state of `checkpoint` has been loaded."""
        raise NotImplementedError

    def restart_randomness(self, checkpoint: Path) -> bool:
        """Seed the random generators anew where `checkpoint` has no states for this launch's
        ranks. Returns whether it did; otherwise the trainer restores the states.
        """
        raise NotImplementedError

    def batches_of_step(self, usual: int) -> int:
        """How many batches of the loader the next optimizer step takes; `usual`: as many as
        transformers thinks.
        """
        return usual

    def part_step(self, batches: list[Any]) -> Parts | None:
        """The micro-batches of what the loader hands out for an optimizer step; None where these
        are micro-batches themselves, of whose number transformers knows.
        """
        return None

    def begin_optimizer_step(self, micro_batches: Sequence[dict[str, Any]]) -> None:
        """Called with all micro-batches of an optimizer step, before the first is run."""

    def rate_factor(self, step: int) -> float:
        """What the highest learning rate is multiplied by in step `step` (from 0)."""
        raise NotImplementedError

    def begin_evaluation(self, micro_batches: Any) -> None:
        """Called with the loader of the held-out micro-batches, before they are run."""

    def eval_sum(self, loss: float, inputs: dict[str, Any]) -> tuple[float, float]:
        """The sum of which a held-out micro-batch's loss is a mean, and over how many: rows, or
        tokens.
        """
        raise NotImplementedError

    # ---- methods that call the hooks, private but the first ----

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> StepRates:
        if self.lr_scheduler is None:
            self.lr_scheduler = StepRates(optimizer or self.optimizer, self.rate_factor)
        return self.lr_scheduler

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        batches = list(itertools.islice(epoch_iterator, self.batches_of_step(num_batches)))
        parts = self.part_step(batches) if batches else None
        samples = batches if parts is None else parts.inputs
        # transformers counts the tokens that train among the micro-batches of a step.
        samples, items = super().get_batch_samples(iter(samples), len(samples), device)
        if samples:
            self.begin_optimizer_step(samples)
        return (samples if parts is None else [parts]), items

    def floating_point_ops(self, inputs: Any) -> int:
        if not isinstance(inputs, Parts):
            return int(super().floating_point_ops(inputs))
        return sum(self.floating_point_ops(part) for part in inputs.inputs)

    def evaluation_loop(
        self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        """transformers takes the mean of the micro-batches' means, the last of which may have few
        rows: here each row or token weighs the same (`eval_sum`).
        """
        self.begin_evaluation(dataloader)
        self._eval_sums = [0.0, 0.0]  # loss x units, units
        output = super().evaluation_loop(
            dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs
        )
        loss, units = distributed.all_sum(self._eval_sums)
        if units:
            output.metrics[f"{metric_key_prefix}_loss"] = loss / units
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        result = super().prediction_step(model, inputs, *args, **kwargs)
        if result[0] is not None:
            total, units = self.eval_sum(float(result[0].mean()), inputs)
            if not self.repeated():
                self._eval_sums[0] += total
                self._eval_sums[1] += units
        return result

    def repeated(self) -> bool:
        """Whether this rank's last held-out micro-batch only repeats rows of others, which
        accelerate hands out so that all ranks have equally many. A micro-batch of which some rows
        are repeated counts whole.
        """
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return False
        return bool(distributed.rank() * self.args.eval_batch_size >= state.remainder)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.train_sampler()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.before_optimizer_step(model, norm)
        return norm

    def _maybe_log_save_evaluate(self, tr_loss: Any, *args: Any, **kwargs: Any) -> None:
        if self.after_optimizer_step():
            tr_loss.copy_(self._loss_before)
            # The loss that is logged next is divided by the steps since the last log: not this one.
            self._globalstep_last_logged += 1
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that was killed between its last step and its end resumes here, and transformers
        # would train one step more.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """transformers would remove older checkpoints before this one is known to be whole; they
        go when `around_checkpoint` is over.
        """
        folder = Path(self.args.output_dir)
        limit = self.args.save_total_limit
        self.args.save_total_limit = None
        try:
            with self.around_checkpoint(
                folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            ):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if distributed.is_main():
            rotate_checkpoints(str(folder), limit, self.state.best_model_checkpoint, use_mtime=True)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        with self.around_best_checkpoint(Path(best)) as directory:
            self.state.best_model_checkpoint = str(directory)
            super()._load_best_model()
            self.state.best_model_checkpoint = best

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.optimizer_loaded(Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.restart_randomness(Path(checkpoint)):
            super()._load_rng_state(checkpoint)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = dict.fromkeys([*self._signature_columns, *self.extra_columns])
        self._signature_columns = list(columns)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """SFT, reward, DPO, KTO. TRL would tokenise prompt and answer together, and drop what it
        cuts.
        """
        if self.pretokenised:
            return dataset
        return super()._prepare_dataset(dataset, *args, **kwargs)

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        """CPO and ORPO's `_prepare_dataset`, row by row."""
        return feature

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL would write a card with links of its own into every checkpoint; the run's manifest
        says more.
        """

    # ---- private state, by names of our own ----

    def remember_loss(self) -> None:
        """Keep what the trainer has summed up for its next log, in case this step is left out."""
        self._loss_before = self._tr_loss.clone()

    def load_weights(self, checkpoint: Path) -> None:
        """The weights of a checkpoint into the living model; not under DeepSpeed."""
        self._load_from_checkpoint(str(checkpoint))

    def load_optimizer(self, checkpoint: Path) -> None:
        """Optimizer and learning-rate schedule of a checkpoint, and `optimizer_loaded`."""
        self._load_optimizer_and_scheduler(str(checkpoint))

    def begin_part(self, share: float, *, last: bool) -> None:
        """Say what share of the step's rows the next micro-batch holds, and whether the step ends
        with it. A loss that is a mean over rows is divided by 1 / share; one over the step's tokens
        is a sum already.
        """
        self.current_gradient_accumulation_steps = 1 / share
        self.accelerator.gradient_state._set_sync_gradients(last)

    def share_of_step(self, items: Any) -> float:
        """What to multiply a loss by that every micro-batch adds and that a step is to have once:
        the trainer divides a mean over rows by the step's micro-batches, but not a loss over the
        step's tokens, of which it knows the number `items`.
        """
        sums = self.model_accepts_loss_kwargs and items is not None
        if sums or self.compute_loss_func is not None:
            return float(1 / self.current_gradient_accumulation_steps)
        return 1.0

    def batch_metrics(self) -> dict[str, list[float]]:
        """TRL's figures of the batches since its last log, a list per figure; to be changed in
        place.
        """
        kept = getattr(self, "_metrics", None) or self._stored_metrics  # CPO and ORPO
        metrics: dict[str, list[float]] = kept["train" if self.model.training else "eval"]
        return metrics

    def restore_token_count(self, tokens: float) -> None:
        """Tokens trained before a resume: TRL counts them, but not in its checkpoint."""
        if hasattr(self, "_total_train_tokens"):
            self._total_train_tokens = tokens

    def drop_reference_adapter(self) -> None:
        """DPO and KTO: the reference is the adapter turned off. TRL adds a second adapter for it,
        a copy of ours, which equals the base while ours is fresh.
        """
        self.model.delete_adapter("ref")


@dataclass(frozen=True, slots=True)
class Part:
    """A private part that we use: a method or attribute of a class, or a function of a module."""

    owner: type | ModuleType
    name: str
    # of a method or function, without self; None: an attribute that is set in the owner's code
    parameters: tuple[str, ...] | None = None


_STEP = ("tr_loss", "grad_norm", "model", "trial", "epoch", "ignore_keys_for_eval")
_EPOCH = ("model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch")
_EPOCH_END = ("resume_from_checkpoint", "epochs_trained", "steps_trained_in_current_epoch")
_ROTATE = ("output_dir", "save_total_limit", "best_model_checkpoint", "use_mtime")
_EVALUATION = ("prediction_loss_only", "ignore_keys", "metric_key_prefix")
_TOKENISED = ("dataset", "processing_class", "args", "dataset_name")
USED = (
    Part(Trainer, "_get_train_sampler", ("train_dataset",)),
    Part(Trainer, "get_batch_samples", ("epoch_iterator", "num_batches", "device")),
    Part(Trainer, "evaluation_loop", ("dataloader", "description", *_EVALUATION)),
    Part(Trainer, "prediction_step", ("model", "inputs", *_EVALUATION[:2])),
    Part(Trainer, "_get_grad_norm", ("model", "grad_norm")),
    Part(Trainer, "_maybe_log_save_evaluate", (*_STEP, "start_time", "learning_rate")),
    Part(
        Trainer,
        "_run_epoch",
        (*_EPOCH, "trial", "ignore_keys_for_eval", "start_time", *_EPOCH_END),
    ),
    Part(Trainer, "_save_checkpoint", ("model", "trial")),
    Part(Trainer, "_load_best_model", ()),
    Part(Trainer, "_load_optimizer_and_scheduler", ("checkpoint",)),
    Part(Trainer, "_load_rng_state", ("checkpoint",)),
    Part(Trainer, "_load_from_checkpoint", ("resume_from_checkpoint", "model")),
    Part(Trainer, "_set_signature_columns_if_needed", ()),
    Part(Trainer, "_signature_columns"),
    Part(Trainer, "_tr_loss"),
    Part(Trainer, "_globalstep_last_logged"),
    Part(
        transformers.trainer_utils,
        "rotate_checkpoints",
        (*_ROTATE, "checkpoint_prefix"),
    ),
    Part(
        transformers.integrations.deepspeed,
        "deepspeed_load_checkpoint",
        ("deepspeed_engine", "checkpoint_path", "load_module_strict"),
    ),
    Part(transformers.integrations.deepspeed, "unset_hf_deepspeed_config", ()),
    Part(SFTTrainer, "create_model_card", ("model_name", "dataset_name", "tags")),
    Part(SFTTrainer, "_total_train_tokens"),
    Part(RewardTrainer, "_total_train_tokens"),
    Part(RewardTrainer, "_metrics"),
    Part(CPOTrainer, "_stored_metrics"),
    Part(Trainer, "current_gradient_accumulation_steps"),
    Part(Trainer, "model_accepts_loss_kwargs"),
    Part(Trainer, "compute_loss_func"),
    Part(Trainer, "floating_point_ops", ("inputs",)),
    Part(DPOTrainer, "_total_train_tokens"),
    Part(DPOTrainer, "_prepare_dataset", _TOKENISED),
    Part(KTOTrainer, "_total_train_tokens"),
    Part(KTOTrainer, "_prepare_dataset", _TOKENISED),
    Part(CPOTrainer, "tokenize_row", ("feature", "model")),
    Part(CPOTrainer, "get_batch_loss_metrics", ("model", "batch", "train_eval")),
    Part(CPOTrainer, "concatenated_forward", ("model", "batch")),
    Part(ORPOTrainer, "concatenated_forward", ("model", "batch")),
    Part(ORPOTrainer, "tokenize_row", ("feature", "model")),
    Part(ORPOTrainer, "get_batch_loss_metrics", ("model", "batch", "train_eval")),
)

# Code inside a method that we rely on.
USED_CODE = (
    (TrainingArguments, "    max_steps: int"),
    (TrainingArguments, "    save_total_limit: int"),
    (Trainer, 'metrics[f"{metric_key_prefix}_loss"]'),
    (CPOTrainer, "            policy_nll_loss,\n        ) = forward_output[:5]"),
    (ORPOTrainer, "            policy_nll_loss,\n        ) = forward_output[:5]"),
    (DPOTrainer, "zip(self.loss_types, self.loss_weights, strict=True)"),
    (DPOTrainer, "batch_loss = -chosen_per_token_logps[chosen_mask.bool()].mean()"),
    (DPOTrainer, 'model.add_adapter("ref", '),
    (KTOTrainer, 'model.add_adapter("ref", '),
    (DataCollatorForUnpairedPreference, '"KL_completion_ids"'),
)
