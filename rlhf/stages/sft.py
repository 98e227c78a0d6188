"""``stage=sft``: supervised fine-tuning on TRL's SFTTrainer, from plain text, prompts with
completions, or conversations.
"""

import dataclasses

from trl import SFTConfig

from conf.schema import Config, EngineConfig
from conf.stages import SFTStage
from policy.adapters import rates_of
from policy.engines import loading, resharding
from rlhf.checks.launch import BatchPlan
from rlhf.models.facts import check_forward
from rlhf.models.loading import load_causal_lm
from rlhf.offline import setup
from rlhf.offline.held_out import shown_figures
from rlhf.offline.setup import (
    EXPERTS,
    begin,
    check_positions,
    loader_for,
    trainer_arguments,
    training_dtype,
    unbalanced,
    with_adapter,
)
from rlhf.offline.trainers import SFT
from rlhf.offline.training import (
    fit,
    greedy_samples,
    make_guard,
    save_trained,
    saves_adapter_alone,
)
from rlhf.process import distributed
from rlhf.process.randomness import seed_everything
from rlhf.run.context import RunContext
from rlhf.types import EncodedRows, RowReader

# in the closing panel: what it says, and the figure
_SHOWN = {"held-out token accuracy": "eval_mean_token_accuracy"}
adapt_checkpoint = resharding.adapt  # to this launch's ranks, before a resume


def check(cfg: Config) -> list[str]:
    """All that can be known before weights load, beside rows and memory; returns notes worth a
    warning. Raises UserError.
    """
    return setup.check(cfg)


def run(ctx: RunContext, reader: RowReader) -> None:
    """Fine-tune, keep the best weights by held-out loss, save model/ (and adapter/), sample,
    summarise.
    """
    cfg, stage = ctx.cfg, ctx.cfg.stage
    with ctx.closing():
        ctx.watchdog.phase("data")
        plan = begin(stage.batch_size, cfg.engine)
        rows = reader.read_rows(cfg, plan.micro)
        setup.check_rows(stage, cfg.engine, rows)
        ctx.add_inputs("policy", rows.files)
        ctx.watchdog.phase("build")
        trainer = make_trainer(ctx, plan, rows)
        steps, metrics = fit(trainer, ctx)
        ctx.watchdog.phase("save the model")
        adapter_alone = saves_adapter_alone(cfg.adapter, cfg.model)
        save_trained(
            trainer,
            rows.tokenizer,
            ctx.dir,
            cfg.model,
            cfg.adapter,
            adapter_alone=adapter_alone,
        )
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
                f"python -m rlhf stage=reward model.path={ctx.model_dir} data.path=<pairs>"
            ),
        )


def make_trainer(ctx: RunContext, plan: BatchPlan, rows: EncodedRows) -> SFT:
    """Load the model and build its trainer. Raises UserError for rows longer than the model
    reads.
    """
    cfg, stage, tokenizer = ctx.cfg, ctx.cfg.stage, rows.tokenizer
    seed_everything(cfg.run.seed)
    dtype = training_dtype(cfg.model.dtype, cfg.adapter.kind, cfg.engine.kind)
    loader = loader_for(cfg.model, cfg.adapter, cfg.engine)
    source = dataclasses.replace(cfg.model, dtype=dtype)
    model = loader.load(lambda: load_causal_lm(source, tokenizer))
    with loader.passing(model):
        check_forward(model, "a policy")
    check_positions(model.config, stage.max_length if stage.packing else rows.longest, cfg.adapter)
    model = with_adapter(
        model, tokenizer, stage, cfg.model, cfg.adapter, ctx.start_dir, rows, loader
    )
    args = SFTConfig(
        **trainer_arguments(
            stage,
            plan,
            cfg.engine,
            cfg.run,
            cfg.model.dtype,
            ctx.checkpoint_dir,
            ctx.resume_from,
            holds_out=rows.held_out is not None,
        ),
        packing=stage.packing,
        eval_packing=False,  # the held-out loss is that of whole rows
        neftune_noise_alpha=stage.neftune_alpha,
        completion_only_loss=False,  # the labels say which tokens train
        **EXPERTS,
    )
    guard = make_guard(ctx)
    rates = rates_of(model, stage, cfg.adapter)
    kind = SFT
    special = _special_rows(stage, cfg.engine)
    if special is not None:
        with loader.passing(model):
            kind = loading.TRAINERS[special](model, cfg.engine)
    with unbalanced(model):
        return kind(
            model=model,
            args=args,
            train_dataset=rows.train,
            eval_dataset=rows.held_out,
            processing_class=tokenizer,
            guard=guard,
            engine=cfg.engine,
            rates=rates,
        )


def _special_rows(stage: SFTStage, engine: EngineConfig) -> str | None:
    """Which trainer the rows need, of `policy.engines.loading.TRAINERS`; None: the usual one."""
    if engine.sequence_parallel > 1:
        return "shared"
    return "packed" if stage.packing else None
