"""``stage=sft``: supervised fine-tuning on TRL's SFTTrainer, from plain text, prompts with
completions, or conversations.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import datasets
from trl import SFTConfig
from trl.data_utils import pack_dataset

from conf.schema import Config
from policy.engines import resharding
from rlhf.checks.launch import BatchPlan
from rlhf.data.converting import Record
from rlhf.data.encoded import Store
from rlhf.data.loading import tell_unread
from rlhf.data.reading import DataRequest, sft_records
from rlhf.models.loading import load_causal_lm
from rlhf.offline import setup
from rlhf.offline.row_weights import COLUMN
from rlhf.offline.rows import encode_sft, lengths, sft_context
from rlhf.offline.setup import (
    begin,
    check_positions,
    record_inputs,
    trainer_arguments,
    training_dtype,
    with_adapter,
)
from rlhf.offline.trainers import SFT
from rlhf.offline.training import fit, greedy_samples, make_guard, save_trained, saves_adapter_alone
from rlhf.process import distributed
from rlhf.process.randomness import seed_everything
from rlhf.run.context import RunContext
from rlhf.types import UserError

adapt_checkpoint = resharding.adapt  # to this launch's ranks, before a resume
_SAMPLES = 4  # held-out rows that the trained policy continues


def check(cfg: Config) -> list[str]:
    """All that can be known before weights load; returns notes worth a warning. Raises
    UserError.
    """
    return setup.check(cfg)


@dataclass(frozen=True, slots=True)
class Rows:
    """The stage's rows: encoded for training and evaluation, and the first held-out ones as
    read.
    """

    train: datasets.Dataset
    held_out: datasets.Dataset
    samples: list[Record]

    def longest(self) -> int:
        """Tokens of the longest encoded row."""
        return max(int(lengths(r, "input_ids").max()) for r in (self.train, self.held_out))


def read(request: DataRequest, tokenizer: Any) -> Rows:
    """Read and encode the stage's rows. Raises UserError."""
    stage = request.stage
    train, held_out = sft_records(request)
    tell_unread(request.keys, tokenizer, stage.name)
    if stage.packing and COLUMN in train[0].value:
        raise UserError(
            "stage.packing=true joins rows, and the rows' weights (column "
            f"{request.data.weight_column!r}) would be lost. Set stage.packing=false, or "
            "data.weight_column=null to weigh all rows the same."
        )
    encode = {
        "max_length": stage.max_length,
        "completion_only": stage.completion_only,
        "rewritten": stage.rewritten_turns,
        "store": Store.of(request),
    }
    return Rows(
        encode_sft(tokenizer, train, name="training", cut=not stage.packing, **encode),
        encode_sft(tokenizer, held_out, name="held-out", cut=True, **encode),
        list(held_out[:_SAMPLES]),
    )


def count_trained(request: DataRequest, tokenizer: Any, micro: int) -> int:
    """Rows that train, packed where they are packed, for a dry run. Raises UserError as `read`."""
    rows = read(request, tokenizer).train
    if not request.stage.packing:
        return len(rows)
    return len(pack_dataset(rows, request.stage.max_length, SFTConfig.packing_strategy))


def run(ctx: RunContext) -> None:
    """Fine-tune, keep the best weights by held-out loss, save model/ (and adapter/), sample,
    summarise.
    """
    cfg, stage = ctx.cfg, ctx.cfg.stage
    with ctx.closing():
        ctx.watchdog.phase("data")
        plan, tokenizer = begin(cfg)
        rows = read(DataRequest.of(cfg), tokenizer)
        record_inputs(ctx, "policy")
        ctx.watchdog.phase("build")
        trainer = make_trainer(ctx, plan, tokenizer, rows)
        steps, metrics = fit(trainer, ctx)
        ctx.watchdog.phase("save the model")
        adapter_alone = saves_adapter_alone(cfg.adapter, cfg.model)
        save_trained(trainer, tokenizer, ctx.dir, cfg.model, adapter_alone=adapter_alone)
        ctx.watchdog.phase("samples")
        if distributed.is_main():
            contexts = [sft_context(tokenizer, record.value) for record in rows.samples]
            samples = greedy_samples(
                cfg.model, tokenizer, ctx.model_dir, contexts, stage.max_length
            )
            ctx.tracker.samples(steps, samples)
        ctx.watchdog.phase("finish")
        ctx.finish(
            steps=steps,
            metrics=metrics,
            figures={
                "held-out loss before": metrics.get("initial/eval_loss"),
                "held-out loss": metrics["eval_loss"],
                "held-out token accuracy": metrics["eval_mean_token_accuracy"],
                "best step": int(metrics["best_step"]),
            },
            next_command=(
                f"python -m rlhf stage=reward model.path={ctx.model_dir} data.path=<pairs>"
            ),
        )


def make_trainer(ctx: RunContext, plan: BatchPlan, tokenizer: Any, rows: Rows) -> SFT:
    """Load the model and build its trainer. Raises UserError for rows longer than the model
    reads.
    """
    cfg, stage = ctx.cfg, ctx.cfg.stage
    seed_everything(cfg.run.seed)
    dtype = training_dtype(cfg.model.dtype, cfg.adapter.kind, cfg.engine.kind)
    model = load_causal_lm(dataclasses.replace(cfg.model, dtype=dtype), tokenizer)
    check_positions(model.config, stage.max_length if stage.packing else rows.longest())
    model = with_adapter(model, tokenizer, stage, cfg.model, cfg.adapter, ctx.start_dir)
    args = SFTConfig(
        **trainer_arguments(
            stage, plan, cfg.engine, cfg.run, cfg.model.dtype, ctx.checkpoint_dir, ctx.resume_from
        ),
        packing=stage.packing,
        eval_packing=False,  # the held-out loss is that of whole rows
        completion_only_loss=False,  # the labels say which tokens train
    )
    return SFT(
        model=model,
        args=args,
        train_dataset=rows.train,
        eval_dataset=rows.held_out,
        processing_class=tokenizer,
        guard=make_guard(ctx),
        engine=cfg.engine,
    )
