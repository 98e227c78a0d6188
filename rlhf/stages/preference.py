"""Offline preference optimisation on TRL's trainers: ``stage=dpo``, ``ipo``, ``kto``, ``cpo``,
``simpo`` and ``orpo``.

The losses are TRL's. Ours are the tokens (rlhf/models/encoding.py, as in every stage), the
reference, the KL pairs of KTO, and what a run leaves behind.
"""

import dataclasses
import functools

from conf.schema import Config
from conf.stages import KTOStage, PreferenceStage
from policy.adapters import rates_of
from policy.engines import resharding
from policy.model import base_of
from rlhf.checks import launch
from rlhf.models.facts import check_forward
from rlhf.models.loading import load_causal_lm
from rlhf.offline import preference, setup
from rlhf.offline.held_out import shown_figures
from rlhf.offline.setup import (
    begin,
    check_positions,
    loader_for,
    trainer_arguments,
    training_dtype,
    with_adapter,
)
from rlhf.offline.trainers import StageTrainer
from rlhf.offline.training import (
    fit,
    free_memory,
    greedy_samples,
    make_guard,
    save_trained,
)
from rlhf.process import distributed
from rlhf.process.randomness import seed_everything
from rlhf.run.context import RunContext
from rlhf.types import EncodedRows, RowReader

# in the closing panel: what it says, and the figure
_SHOWN = {
    "held-out accuracy": "eval_rewards/accuracies",
    "held-out margin": "eval_rewards/margins",
}
adapt_checkpoint = resharding.adapt  # to this launch's ranks, before a resume


def check(cfg: Config) -> list[str]:
    """All that can be known before weights load, beside rows and memory; returns notes worth a
    warning. Raises UserError.
    """
    stage, engine = cfg.stage, cfg.engine
    notes = setup.check(cfg)
    preference.check_preference_adapter(stage, cfg.adapter)
    ranks = launch.count_ranks(engine, dry_run=cfg.run.dry_run)
    micro = launch.plan_batches(stage.batch_size, engine, ranks).micro
    if isinstance(stage, KTOStage):
        preference.check_kto_rows(stage, engine.micro_batch_size, micro)
    if isinstance(stage, PreferenceStage):
        notes += preference.sorting_note(stage, micro)
    return notes


def run(ctx: RunContext, reader: RowReader) -> None:
    """Train, keep the best weights by held-out loss, save whole weights as model/ (and adapter/ for
    LoRA), sample, summarise.
    """
    cfg, stage = ctx.cfg, ctx.cfg.stage
    with ctx.closing():
        ctx.watchdog.phase("data")
        plan = begin(stage.batch_size, cfg.engine)
        rows = reader.read_rows(cfg, plan.micro)
        setup.check_rows(stage, cfg.engine, rows)
        ctx.add_inputs("policy", rows.files)
        steps, metrics = _train(ctx, plan, rows)
        ctx.watchdog.phase("samples")
        samples = greedy_samples(cfg.model, rows, ctx.model_dir, stage.max_length, cfg.engine)
        if distributed.is_main():
            ctx.tracker.samples(steps, samples)
        ctx.watchdog.phase("finish")
        ctx.finish(
            steps=steps,
            metrics=metrics,
            figures=shown_figures(metrics, _SHOWN),
            next_command=(
                f"python -m rlhf stage=eval stage.before={cfg.model.path or '<the start>'} "
                f"stage.after={ctx.model_dir} data.path=<prompts>"
            ),
        )


def _train(
    ctx: RunContext, plan: launch.BatchPlan, rows: EncodedRows
) -> tuple[int, dict[str, float]]:
    """Train and save, and free the trainer's memory. Returns the steps and the run's figures."""
    ctx.watchdog.phase("build")
    trainer = make_trainer(ctx, plan, rows)
    steps, metrics = fit(trainer, ctx)
    ctx.watchdog.phase("save the model")
    save_trained(trainer, rows.tokenizer, ctx.dir, ctx.cfg.model, ctx.cfg.adapter)
    del trainer
    free_memory()
    return steps, metrics


def make_trainer(ctx: RunContext, plan: launch.BatchPlan, rows: EncodedRows) -> StageTrainer:
    """Load the model, copy the reference, and build the stage's trainer. Raises UserError for rows
    longer than the model reads.
    """
    cfg, stage, tokenizer = ctx.cfg, ctx.cfg.stage, rows.tokenizer
    seed_everything(cfg.run.seed)
    dtype = training_dtype(cfg.model.dtype, cfg.adapter.kind, cfg.engine.kind)
    loader = loader_for(cfg.model, cfg.adapter, cfg.engine)
    source = dataclasses.replace(cfg.model, dtype=dtype)
    load = functools.partial(loader.load, lambda: load_causal_lm(source, tokenizer))
    model = load()
    with loader.passing(model):
        check_forward(model, "a policy")
    check_positions(base_of(model).config, rows.longest, cfg.adapter)
    model = with_adapter(
        model, tokenizer, stage, cfg.model, cfg.adapter, ctx.start_dir, rows, loader
    )
    # Made before the trainer's arguments exist: from then on transformers would load ZeRO-3 models
    # in its own way.
    reference = None
    if preference.has_reference(stage):
        again = load if loader.parts else None
        reference = preference.start_of(model, cfg.adapter, again)
    arguments = trainer_arguments(
        stage,
        plan,
        cfg.engine,
        cfg.run,
        cfg.model.dtype,
        ctx.checkpoint_dir,
        ctx.resume_from,
        holds_out=rows.held_out is not None,
    )
    guard = make_guard(ctx)
    return preference.make_trainer(
        stage,
        arguments,
        model,
        reference,
        tokenizer,
        rows.train,
        rows.held_out,
        guard=guard,
        engine=cfg.engine,
        rates=rates_of(model, stage, cfg.adapter),
    )
