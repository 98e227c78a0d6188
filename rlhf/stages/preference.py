"""Offline preference optimisation on TRL's trainers: ``stage=dpo``, ``ipo``, ``kto``, ``cpo``,
``simpo`` and ``orpo``.

The losses are TRL's. Ours are the tokens (rlhf/models/encoding.py, as in every stage), the
reference, the KL pairs of KTO, and what a run leaves behind.
"""

import dataclasses
import logging
from typing import Any

import datasets

from conf.choices import KTOLoss, PreferenceLoss
from conf.schema import Config
from conf.stages import KTOStage
from policy.model import base_of
from rlhf.data.reading import preference_dataset, unpaired_dataset
from rlhf.models.loading import load_causal_lm
from rlhf.offline import preference
from rlhf.offline.arguments import BatchPlan, trainer_arguments, training_dtype
from rlhf.offline.fitting import fit, make_guard
from rlhf.offline.kto import balance_note, without_lone_row
from rlhf.offline.opening import begin, check_positions, record_inputs, with_adapter
from rlhf.offline.row_weights import COLUMN
from rlhf.offline.rows import encode_preferences, longest_row, preference_contexts
from rlhf.offline.saving import free_memory, greedy_samples, save_trained
from rlhf.offline.trainers import StageTrainer
from rlhf.process import distributed
from rlhf.run.context import RunContext, seed_everything
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.stages")
_SAMPLES = 4  # held-out prompts that the trained policy answers
_SORTING = (PreferenceLoss.aot, PreferenceLoss.aot_unpaired)
Sides = tuple[datasets.Dataset, datasets.Dataset]  # training and held-out rows


def read(cfg: Config, tokenizer: Any, micro: int) -> Sides:
    """Encoded training and held-out rows of the stage; `micro`: rows of a forward pass. Raises
    UserError.
    """
    stage = cfg.stage
    unpaired = isinstance(stage, KTOStage)
    raw_train, raw_held_out = unpaired_dataset(cfg) if unpaired else preference_dataset(cfg)
    check_weights(cfg.data.weight_column, getattr(stage, "losses", []), raw_train)
    sides = ("completion",) if unpaired else ("chosen", "rejected")
    length = stage.max_length
    train = encode_preferences(tokenizer, raw_train, sides, name="training", max_length=length)
    held_out = encode_preferences(
        tokenizer, raw_held_out, sides, name="held-out", max_length=length
    )
    if not unpaired:
        return train, held_out
    check_balance(stage, train)
    # A file sorted by label would give passes with nothing to compare.
    held_out = held_out.shuffle(seed=cfg.run.seed)
    if stage.loss is KTOLoss.kto:
        held_out = without_lone_row(held_out, micro, "held-out")
        if len(train) < stage.batch_size:  # otherwise every step is a whole batch
            train = without_lone_row(train, micro, "training")
    return train, held_out


def check_balance(stage: KTOStage, train: datasets.Dataset) -> None:
    """Warn of good and bad answers out of balance. Raises UserError where all are of one kind."""
    good = sum(train["label"])
    if not 0 < good < len(train):
        kind = "good" if good else "bad"
        raise UserError(
            f"training: each of the {len(train)} answers of at most "
            f"stage.max_length={stage.max_length} tokens is judged {kind}."
        )
    note = balance_note(good, len(train) - good, stage.desirable_weight, stage.undesirable_weight)
    if note is not None:
        LOG.warning("%s", note)


def check_weights(column: str | None, losses: list[PreferenceLoss], rows: datasets.Dataset) -> None:
    """Log what the rows' weights do. Raises UserError for losses that compare the sorted rows of a
    batch. column: ``data.weight_column``.
    """
    if COLUMN not in rows.column_names:
        return
    sorting = [loss.value for loss in losses if loss in _SORTING]
    if sorting:
        raise UserError(
            f"stage.losses={sorting[0]} sorts the rows of a batch, so no row has a loss that its "
            f"weight (column {column!r}) could multiply. "
            "Use another loss, or set data.weight_column=null to weigh all rows the same."
        )
    LOG.info(
        "the column %r multiplies each row's gradient; the losses that are logged weigh all rows "
        "the same",
        column,
    )


def run(ctx: RunContext) -> None:
    """Train, keep the best weights by held-out loss, save whole weights as model/ (and adapter/ for
    LoRA), sample, summarise.
    """
    with ctx.closing():
        _run(ctx)


def _run(ctx: RunContext) -> None:
    cfg, stage = ctx.cfg, ctx.cfg.stage
    ctx.watchdog.phase("data")
    plan, tokenizer = begin(cfg)
    rows = read(cfg, tokenizer, plan.micro)
    record_inputs(ctx, "policy")
    steps, metrics = _train(ctx, plan, tokenizer, rows)
    ctx.watchdog.phase("samples")
    if distributed.is_main():
        contexts = preference_contexts(rows[1], _SAMPLES)
        samples = greedy_samples(cfg.model, tokenizer, ctx.model_dir, contexts, stage.max_length)
        ctx.tracker.samples(steps, samples)
    ctx.watchdog.phase("finish")
    figures = {
        "held-out loss before": metrics.get("initial/eval_loss"),
        "held-out loss": metrics["eval_loss"],
        "held-out accuracy": metrics.get("eval_rewards/accuracies"),
        "held-out margin": metrics.get("eval_rewards/margins"),
        "best step": int(metrics["best_step"]),
    }
    ctx.finish(
        steps=steps,
        metrics=metrics,
        figures={name: value for name, value in figures.items() if value is not None},
        next_command=(
            f"python -m rlhf stage=eval stage.before={cfg.model.path or '<the start>'} "
            f"stage.after={ctx.model_dir} data.path=<prompts>"
        ),
    )


def _train(
    ctx: RunContext, plan: BatchPlan, tokenizer: Any, rows: Sides
) -> tuple[int, dict[str, float]]:
    """Train and save, and free the trainer's memory. Returns the steps and the run's figures."""
    ctx.watchdog.phase("build")
    trainer = make_trainer(ctx, plan, tokenizer, rows)
    steps, metrics = fit(trainer, ctx)
    ctx.watchdog.phase("save the model")
    save_trained(trainer, tokenizer, ctx.dir, ctx.cfg.model)
    del trainer
    free_memory()
    return steps, metrics


def make_trainer(ctx: RunContext, plan: BatchPlan, tokenizer: Any, rows: Sides) -> StageTrainer:
    """Load the model, copy the reference, and build the stage's trainer. Raises UserError for rows
    longer than the model reads.
    """
    cfg, stage = ctx.cfg, ctx.cfg.stage
    seed_everything(cfg.run.seed)
    dtype = training_dtype(cfg.model.dtype, cfg.adapter.kind, cfg.engine.kind)
    model = load_causal_lm(dataclasses.replace(cfg.model, dtype=dtype), tokenizer)
    mixed = isinstance(stage, KTOStage) and stage.loss is KTOLoss.kto
    longest = max(longest_row(side, mixed=mixed) for side in rows)
    check_positions(base_of(model).config, min(longest, stage.max_length))
    model = with_adapter(model, cfg.adapter, cfg.model.path, "CAUSAL_LM")
    # Copied before the trainer's arguments exist: from then on transformers would load ZeRO-3
    # models in shards.
    reference = preference.start_of(model) if preference.has_reference(stage) else None
    arguments = trainer_arguments(
        stage, plan, cfg.engine, cfg.run, cfg.model.dtype, ctx.checkpoint_dir, ctx.resume_from
    )
    guard = make_guard(ctx)
    return preference.make_trainer(
        stage, arguments, model, reference, tokenizer, *rows, guard=guard, engine=cfg.engine
    )
