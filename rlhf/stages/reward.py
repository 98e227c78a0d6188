"""``stage=reward``: a pairwise reward model on TRL's RewardTrainer, judged on held-out pairs beside
a length-only baseline.
"""

import dataclasses
import functools
import logging
from pathlib import Path

import numpy as np
import torch
from trl import RewardConfig as TRLRewardConfig

from conf.choices import EngineKind
from conf.schema import Config, EngineConfig, ModelConfig
from policy.adapters import rates_of
from policy.engines import resharding
from policy.engines.loading import Loader, holder_of
from reward.model import (
    Manifest,
    load_reward_module,
    reader_of,
    template_hash,
    tokenizer_fingerprint,
    write_manifest,
)
from rlhf.checks.launch import BatchPlan
from rlhf.models.directories import contents
from rlhf.models.facts import check_forward
from rlhf.models.loading import load_classifier, resolve_dtype
from rlhf.models.templates import processor_of
from rlhf.offline import judged_pairs, setup
from rlhf.offline.frozen import check_cache, read_frozen_once
from rlhf.offline.held_out import NO_HELD_OUT
from rlhf.offline.judged_pairs import Reward
from rlhf.offline.setup import (
    begin,
    check_positions,
    loader_for,
    trainer_arguments,
    training_dtype,
    with_adapter,
)
from rlhf.offline.training import fit, free_memory, make_guard, save_trained
from rlhf.process import distributed
from rlhf.process.randomness import seed_everything
from rlhf.run.context import RunContext
from rlhf.types import SOFT_LABEL, EncodedRows, RowReader

adapt_checkpoint = resharding.adapt  # to this launch's ranks, before a resume

LOG = logging.getLogger("rlhf.stages")


def check(cfg: Config) -> list[str]:
    """All that can be known before weights load, beside rows and memory; returns notes worth a
    warning. Raises UserError.
    """
    notes = setup.check(cfg)
    if cfg.stage.cache_frozen:
        check_cache(cfg.stage, cfg.model, cfg.adapter)
    return notes


def run(ctx: RunContext, reader: RowReader) -> None:
    """Train, keep the best weights by held-out loss, save a self-contained model/ (and adapter/ for
    LoRA), judge it on held-out pairs.
    """
    cfg, stage = ctx.cfg, ctx.cfg.stage
    with ctx.closing():
        ctx.watchdog.phase("data")
        plan = begin(stage.batch_size, cfg.engine)
        rows = reader.read_rows(cfg, plan.micro)
        setup.check_rows(stage, cfg.engine, rows)
        tokenizer, held_out = rows.tokenizer, rows.held_out
        ctx.add_inputs("policy", rows.files)
        if stage.soft_label and held_out is not None:
            # held-out pairs that are all ties are refused here rather than after training
            judged_pairs.better_side(np.array(held_out[SOFT_LABEL]))
        steps, metrics = _train(ctx, plan, rows)
        judged = None
        if held_out is not None:
            ctx.watchdog.phase("judge")
            dtype = resolve_dtype(cfg.model.dtype)
            judged = _judge(ctx.model_dir, rows, cfg.engine, dtype, cfg.reward.batch_tokens)
            metrics |= judged_pairs.judgement_metrics(judged, stage.bootstrap, cfg.run.seed)
        if distributed.is_main():
            manifest = manifest_of(cfg.model, rows, stage.max_length, metrics)
            write_manifest(ctx.model_dir, manifest)
        if judged is not None and distributed.is_main():
            ctx.tracker.samples(steps, judged_pairs.sample_rows(tokenizer, held_out, judged))
            ctx.tracker.images([judged_pairs.plot_judged(judged, metrics, ctx.dir / "plots")])
        ctx.watchdog.phase("finish")
        ctx.finish(
            steps=steps,
            metrics=metrics,
            figures=NO_HELD_OUT if held_out is None else judged_pairs.shown(metrics),
            next_command=(
                "python -m rlhf stage=ppo model.path=<policy> "
                f"reward.path={ctx.model_dir} data.path=<prompts>"
            ),
        )


def _judge(
    model: Path,
    rows: EncodedRows,
    engine: EngineConfig,
    dtype: torch.dtype,
    budget: int,
) -> judged_pairs.Judged:
    """Held-out pairs as the weights saved in `model` score them, read back as every later stage
    reads them. A collective. budget: tokens of one forward pass.
    """
    device = distributed.device()
    load = functools.partial(load_reward_module, model, dtype)
    holder = None if contents(str(model)).is_native else holder_of(engine, dtype)
    read, passes = reader_of(load, device, holder)
    processor = processor_of(rows.tokenizer)
    return judged_pairs.judge(read, rows.held_out, budget, device, passes, processor)


def _train(ctx: RunContext, plan: BatchPlan, rows: EncodedRows) -> tuple[int, dict[str, float]]:
    """Train and save, and free the trainer's memory. Returns the steps and the run's figures."""
    ctx.watchdog.phase("build")
    trainer = make_trainer(ctx, plan, rows)
    steps, metrics = fit(trainer, ctx)
    ctx.watchdog.phase("save the model")
    save_trained(trainer, rows.tokenizer, ctx.dir, ctx.cfg.model, ctx.cfg.adapter)
    del trainer
    free_memory()
    return steps, metrics


def make_trainer(ctx: RunContext, plan: BatchPlan, rows: EncodedRows) -> Reward:
    """Load the model and build its trainer. Raises UserError for pairs longer than the model
    reads.
    """
    cfg, stage, tokenizer = ctx.cfg, ctx.cfg.stage, rows.tokenizer
    seed_everything(cfg.run.seed)
    dtype = training_dtype(cfg.model.dtype, cfg.adapter.kind, cfg.engine.kind)
    loader = Loader()  # frozen blocks are read in whole passes
    if not stage.cache_frozen:
        loader = loader_for(cfg.model, cfg.adapter, cfg.engine)
    source = dataclasses.replace(cfg.model, dtype=dtype)
    model = loader.load(lambda: load_classifier(source, tokenizer))
    with loader.passing(model):
        check_forward(model, "a reward model")
    check_positions(model.config, rows.longest, cfg.adapter)
    model = with_adapter(
        model, tokenizer, stage, cfg.model, cfg.adapter, ctx.start_dir, rows, loader
    )
    if stage.cache_frozen:
        ctx.watchdog.phase("frozen blocks")
        folder = Path(cfg.data.cache_dir or Path(cfg.run.dir) / ".encoded").expanduser()
        read_frozen_once(
            model,
            rows,
            folder if cfg.data.cache else ctx.dir,
            resolve_dtype(cfg.model.dtype),
            casts=cfg.engine.kind is EngineKind.torch,
            budget=cfg.reward.batch_tokens,
        )
    args = TRLRewardConfig(
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
        center_rewards_coefficient=stage.centering_coef or None,
    )
    return Reward(
        model=model,
        args=args,
        train_dataset=rows.train,
        eval_dataset=rows.held_out,
        processing_class=tokenizer,
        guard=make_guard(ctx),
        engine=cfg.engine,
        rates=rates_of(model, stage, cfg.adapter),
    )


def manifest_of(
    model: ModelConfig, rows: EncodedRows, max_length: int, metrics: dict[str, float]
) -> Manifest:
    """What later stages must know of the reward model beside its weights. max_length: tokens of the
    longest pair that it may have trained on. Without held-out pairs the figures of its scores are
    0, of 0 texts.
    """
    return Manifest(
        base=model.path or model.kind.value,
        tokenizer_hash=tokenizer_fingerprint(rows.tokenizer),
        chat_template_hash=template_hash(rows.tokenizer),
        conversational=rows.conversational,
        max_length=max_length,
        dtype=str(resolve_dtype(model.dtype)).removeprefix("torch."),
        score_mean=metrics.get("eval/score_mean", 0.0),
        score_std=metrics.get("eval/score_std", 0.0),
        held_out_texts=2 * int(metrics.get("eval/pairs", 0)),
    )
