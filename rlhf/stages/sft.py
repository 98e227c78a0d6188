"""``stage=sft``: supervised fine-tuning on TRL's SFTTrainer, from plain text, prompts with
completions, or conversations.
"""

import dataclasses
import logging
from typing import Any

import datasets
from trl import SFTConfig, SFTTrainer

from conf.schema import Config
from policy.engines import resharding
from rlhf.data.reading import DataRequest, sft_dataset
from rlhf.models.encoding import (
    IGNORED,
    encode_completion,
    encode_conversation,
    encode_text,
    is_chat,
    prompt_ids,
    require_template,
)
from rlhf.models.loading import load_causal_lm
from rlhf.offline import checks
from rlhf.offline import row_weights as weights
from rlhf.offline import trainer as common
from rlhf.offline.guards import guarded
from rlhf.process import distributed, watchdog
from rlhf.process.randomness import seed_everything
from rlhf.run.context import RunContext
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.stages.sft")
adapt_checkpoint = resharding.adapt  # before a resume
_SAMPLES = 4  # held-out rows that the trained policy continues


def check(cfg: Config) -> list[str]:
    """All that can be known before weights load; returns notes worth a warning. Raises
    UserError.
    """
    return checks.check(cfg)


def encode_row(
    tokenizer: Any, row: dict[str, Any], *, completion_only: bool
) -> tuple[list[int], list[int]]:
    """Token ids and labels of one row in a form of TRL's: text, prompt + completion, or messages.
    Raises ValueError as the encoders.
    """
    if "text" in row:
        return encode_text(tokenizer, row["text"])
    if "messages" in row:
        return encode_conversation(tokenizer, row["messages"], completion_only=completion_only)
    prompt, completion = row["prompt"], row["completion"]
    if not is_chat(completion):
        return encode_completion(tokenizer, prompt, completion, completion_only=completion_only)
    if is_chat(prompt) and len(completion) == 1 and completion[0].get("role") == "assistant":
        return encode_completion(
            tokenizer, prompt, str(completion[0]["content"]), completion_only=completion_only
        )
    before = prompt if is_chat(prompt) else [{"role": "user", "content": prompt}]
    return encode_conversation(
        tokenizer, [*before, *completion], completion_only=completion_only, first=len(before)
    )


def encode_dataset(
    tokenizer: Any,
    rows: datasets.Dataset,
    *,
    name: str,
    max_length: int,
    completion_only: bool,
    cut: bool,
) -> datasets.Dataset:
    """`rows` as input_ids and labels, and weight where they have one, cut to `max_length` tokens
    when `cut` (packing splits them itself).

    Rows whose trained tokens all lie beyond the cut are left out; how many were cut and left out is
    said aloud. Raises UserError for a row that can't be encoded and when no row is left.
    """
    if any(is_chat(rows[0].get(key)) for key in ("prompt", "completion", "messages")):
        require_template(tokenizer, f"{name} data")
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    row_weights: list[float] = []
    shortened = 0
    for number, row in enumerate(rows):
        watchdog.alive()
        try:
            row_ids, row_labels = encode_row(tokenizer, row, completion_only=completion_only)
        except ValueError as error:
            raise UserError(f"{name} row {number}: {error}.") from error
        if cut and len(row_ids) > max_length:
            row_ids, row_labels = row_ids[:max_length], row_labels[:max_length]
            shortened += 1
        # the first token is never predicted
        if any(label != IGNORED for label in row_labels[1:]):
            ids.append(row_ids)
            labels.append(row_labels)
            row_weights.append(row.get(weights.COLUMN, 1.0))
    dropped = len(rows) - len(ids)
    if not ids:
        raise UserError(
            f"{name}: none of the {len(rows)} rows has a token to train within "
            f"stage.max_length={max_length} tokens."
        )
    if shortened or dropped:
        LOG.warning(
            "%s: of %d rows, %d cut to stage.max_length=%d tokens, %d with nothing to train",
            name,
            len(rows),
            shortened,
            max_length,
            dropped,
        )
    encoded = datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})
    trained = [sum(label != IGNORED for label in row_labels[1:]) for row_labels in labels]
    return weights.weigh(
        encoded, row_weights if weights.COLUMN in rows.column_names else None, trained
    )


def sample_context(tokenizer: Any, row: dict[str, Any]) -> list[int]:
    """What a sample starts from: the row's prompt, its conversation up to the first answer, or the
    first quarter of its text.
    """
    if "prompt" in row:
        return prompt_ids(tokenizer, row["prompt"])
    if "messages" in row:
        first = next((i for i, m in enumerate(row["messages"]) if m.get("role") == "assistant"), 0)
        return prompt_ids(tokenizer, row["messages"][:first]) if first else []
    ids, _ = encode_text(tokenizer, row["text"])
    return ids[: max(1, len(ids) // 4)]


def run(ctx: RunContext) -> None:
    """Fine-tune, keep the best weights by held-out loss, save model/ (and adapter/), sample,
    summarise.
    """
    with ctx.closing():
        _run(ctx)


def read(
    cfg: Config, tokenizer: Any
) -> tuple[datasets.Dataset, datasets.Dataset, datasets.Dataset]:
    """Encoded training and held-out rows, and the held-out ones as they were. Raises UserError."""
    stage = cfg.stage
    train_rows, eval_rows = sft_dataset(DataRequest.of(cfg))
    if stage.packing and weights.COLUMN in train_rows.column_names:
        raise UserError(
            "stage.packing=true joins rows, and the rows' weights (column "
            f"{cfg.data.weight_column!r}) would be lost. Set stage.packing=false, or "
            "data.weight_column=null to weigh all rows the same."
        )
    encode = {"max_length": stage.max_length, "completion_only": stage.completion_only}
    train = encode_dataset(tokenizer, train_rows, name="training", cut=not stage.packing, **encode)
    return (
        train,
        encode_dataset(tokenizer, eval_rows, name="held-out", cut=True, **encode),
        eval_rows,
    )


def count_trained(cfg: Config, tokenizer: Any, micro: int) -> int:
    """Rows that train, packed where they are packed, for a dry run. Raises UserError as `read`."""
    stage = cfg.stage
    rows = read(cfg, tokenizer)[0]
    if not stage.packing:
        return len(rows)
    from trl.data_utils import pack_dataset

    return len(pack_dataset(rows, stage.max_length, SFTConfig.packing_strategy))


def _run(ctx: RunContext) -> None:
    cfg, stage = ctx.cfg, ctx.cfg.stage
    ctx.watchdog.phase("data")
    plan, tokenizer = common.begin(cfg)
    train, held_out, eval_rows = read(cfg, tokenizer)
    common.record_inputs(ctx, "policy")
    ctx.watchdog.phase("build")
    seed_everything(cfg.run.seed)
    model = load_causal_lm(
        dataclasses.replace(cfg.model, dtype=common.training_dtype(cfg)), tokenizer
    )
    longest = (
        stage.max_length
        if stage.packing
        else max(len(ids) for rows in (train, held_out) for ids in rows["input_ids"])
    )
    common.check_positions(model.config, longest)
    model = common.with_adapter(model, cfg, "CAUSAL_LM")
    args = SFTConfig(
        **common.trainer_arguments(ctx, plan),
        packing=stage.packing,
        eval_packing=False,  # the held-out loss is that of whole rows
        completion_only_loss=False,  # the labels say which tokens train
    )
    trainer = guarded(weights.weighted_sft(SFTTrainer))(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    steps, metrics = common.fit(trainer, ctx)
    ctx.watchdog.phase("save the model")
    trained = trainer.accelerator.unwrap_model(trainer.model)
    common.save_policy(trained, tokenizer, ctx)
    ctx.watchdog.phase("samples")
    if distributed.is_main():
        contexts = [
            sample_context(tokenizer, row)
            for row in eval_rows.select(range(min(_SAMPLES, len(eval_rows))))
        ]
        ctx.tracker.samples(
            steps,
            common.greedy_samples(cfg.model, tokenizer, ctx.model_dir, contexts, stage.max_length),
        )
    shown = {
        "held-out loss before": metrics.get("initial/eval_loss"),
        "held-out loss": metrics["eval_loss"],
        "held-out token accuracy": metrics["eval_mean_token_accuracy"],
        "best step": int(metrics["best_step"]),
    }
    ctx.watchdog.phase("finish")
    ctx.finish(
        steps=steps,
        metrics=metrics,
        figures=shown,
        next_command=f"python -m rlhf stage=reward model.path={ctx.model_dir} data.path=<pairs>",
    )
