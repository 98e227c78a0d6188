"""``stage=reward``: a pairwise reward model on TRL's RewardTrainer, judged on held-out pairs beside
a length-only baseline.
"""

import dataclasses
from typing import Any

import numpy as np
from trl import RewardConfig as TRLRewardConfig

from conf.schema import Config, ModelConfig
from policy.engines import resharding
from reward.model import (
    Manifest,
    load_reward_module,
    template_hash,
    tokenizer_fingerprint,
    write_manifest,
)
from rlhf.checks.launch import BatchPlan
from rlhf.data.encoded import Store
from rlhf.data.loading import tell_unread
from rlhf.data.reading import DataRequest, check_first_strength, preference_records
from rlhf.models.encoding import is_chat
from rlhf.models.loading import load_classifier, resolve_dtype
from rlhf.offline import judged_pairs, setup
from rlhf.offline.pairs import EncodedPairs, encode_pairs, padding_token
from rlhf.offline.row_weights import SOFT_LABEL
from rlhf.offline.setup import (
    begin,
    check_positions,
    record_inputs,
    trainer_arguments,
    training_dtype,
    with_adapter,
)
from rlhf.offline.trainers import Reward
from rlhf.offline.training import fit, free_memory, make_guard, save_trained
from rlhf.process import distributed
from rlhf.process.randomness import seed_everything
from rlhf.run.context import RunContext

adapt_checkpoint = resharding.adapt  # to this launch's ranks, before a resume


def check(cfg: Config) -> list[str]:
    """All that can be known before weights load; returns notes worth a warning. Raises
    UserError.
    """
    notes = setup.check(cfg)
    if cfg.stage.margin or cfg.stage.soft_label:
        check_first_strength(DataRequest.of(cfg))
    return notes


def read(request: DataRequest, tokenizer: Any) -> tuple[EncodedPairs, EncodedPairs, bool]:
    """Encoded training and held-out pairs, and whether they are conversations. Raises UserError."""
    stage = request.stage
    train, held_out = preference_records(request)
    tell_unread(request.keys, tokenizer, stage.name)
    encode = {
        "max_length": stage.max_length,
        "margin": stage.margin,
        "soft_label": stage.soft_label,
        "store": Store.of(request),
    }
    return (
        encode_pairs(tokenizer, train, name="training", **encode),
        encode_pairs(tokenizer, held_out, name="held-out", **encode),
        is_chat(train[0].value["chosen"]),
    )


def count_trained(request: DataRequest, tokenizer: Any, micro: int) -> int:
    """Pairs that train, for a dry run. Raises UserError as `read`."""
    return len(read(request, tokenizer)[0].data)


def run(ctx: RunContext) -> None:
    """Train, keep the best weights by held-out loss, save a self-contained model/ (and adapter/ for
    LoRA), judge it on held-out pairs.
    """
    cfg, stage = ctx.cfg, ctx.cfg.stage
    with ctx.closing():
        ctx.watchdog.phase("data")
        plan, tokenizer = begin(cfg)
        train, held_out, conversational = read(DataRequest.of(cfg), tokenizer)
        record_inputs(ctx, "policy")
        if stage.soft_label:
            # held-out pairs that are all ties are refused here rather than after training
            judged_pairs.better_side(np.array(held_out.data[SOFT_LABEL]))
        tokenizer.pad_token = padding_token(tokenizer, train, held_out)
        steps, metrics = _train(ctx, plan, tokenizer, train, held_out)
        ctx.watchdog.phase("judge")
        # The figures are those of the saved weights, read back as every later stage reads them.
        device = distributed.device()
        module = load_reward_module(ctx.model_dir, resolve_dtype(cfg.model.dtype)).to(device)
        judged = judged_pairs.judge(module, held_out.data, cfg.reward.batch_tokens, device)
        metrics |= judged_pairs.judgement_metrics(judged, stage.bootstrap, cfg.run.seed)
        if distributed.is_main():
            manifest = manifest_of(cfg.model, tokenizer, stage.max_length, conversational, metrics)
            write_manifest(ctx.model_dir, manifest)
            ctx.tracker.samples(steps, judged_pairs.sample_rows(tokenizer, held_out.data, judged))
            plot = judged_pairs.plot_judged(judged, metrics, ctx.dir / "plots")
            ctx.tracker.images([plot])
        ctx.watchdog.phase("finish")
        ctx.finish(
            steps=steps,
            metrics=metrics,
            figures=judged_pairs.shown(metrics),
            next_command=(
                "python -m rlhf stage=ppo model.path=<policy> "
                f"reward.path={ctx.model_dir} data.path=<prompts>"
            ),
        )


def _train(
    ctx: RunContext, plan: BatchPlan, tokenizer: Any, train: EncodedPairs, held_out: EncodedPairs
) -> tuple[int, dict[str, float]]:
    """Train and save, and free the trainer's memory. Returns the steps and the run's figures."""
    ctx.watchdog.phase("build")
    trainer = make_trainer(ctx, plan, tokenizer, train, held_out)
    steps, metrics = fit(trainer, ctx)
    ctx.watchdog.phase("save the model")
    save_trained(trainer, tokenizer, ctx.dir, ctx.cfg.model)
    del trainer
    free_memory()
    return steps, metrics


def make_trainer(
    ctx: RunContext, plan: BatchPlan, tokenizer: Any, train: EncodedPairs, held_out: EncodedPairs
) -> Reward:
    """Load the model and build its trainer. Raises UserError for pairs longer than the model
    reads.
    """
    cfg, stage = ctx.cfg, ctx.cfg.stage
    seed_everything(cfg.run.seed)
    dtype = training_dtype(cfg.model.dtype, cfg.adapter.kind, cfg.engine.kind)
    model = load_classifier(dataclasses.replace(cfg.model, dtype=dtype), tokenizer)
    check_positions(model.config, max(train.longest(), held_out.longest()))
    model = with_adapter(model, tokenizer, stage, cfg.model, cfg.adapter, ctx.start_dir)
    args = TRLRewardConfig(
        **trainer_arguments(
            stage, plan, cfg.engine, cfg.run, cfg.model.dtype, ctx.checkpoint_dir, ctx.resume_from
        ),
        center_rewards_coefficient=stage.centering_coef or None,
    )
    return Reward(
        model=model,
        args=args,
        train_dataset=train.data,
        eval_dataset=held_out.data,
        processing_class=tokenizer,
        guard=make_guard(ctx),
        engine=cfg.engine,
    )


def manifest_of(
    model: ModelConfig,
    tokenizer: Any,
    max_length: int,
    conversational: bool,
    metrics: dict[str, float],
) -> Manifest:
    """What later stages must know of the reward model beside its weights. max_length: tokens of the
    longest pair that it may have trained on.
    """
    return Manifest(
        base=model.path or model.kind.value,
        tokenizer_hash=tokenizer_fingerprint(tokenizer),
        chat_template_hash=template_hash(tokenizer),
        conversational=conversational,
        max_length=max_length,
        dtype=str(resolve_dtype(model.dtype)).removeprefix("torch."),
        score_mean=metrics["eval/score_mean"],
        score_std=metrics["eval/score_std"],
        held_out_texts=2 * int(metrics["eval/pairs"]),
    )
