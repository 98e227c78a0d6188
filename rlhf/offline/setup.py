"""What a stage on TRL's trainers does before it trains: checks, batch plan, engine, tokenizer,
adapter, and the arguments that TRL's configs have in common.
"""

import functools
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from conf import published
from conf.adapters import virtual_tokens
from conf.choices import AdapterKind, Dtype, EngineKind, OnNonFinite
from conf.schema import (
    AdapterConfig,
    Config,
    EngineConfig,
    ModelConfig,
    RunConfig,
    asked_tokens,
    facts_of,
)
from conf.stages import KTOStage, OfflineStage, PreferenceStage, RewardStage, SFTStage
from policy import adapters
from policy.adapters import Rows, spaced
from policy.engines.base import check_optimizer
from policy.engines.deepspeed import check_extensions, ensure_process_group, prepare_cpu
from policy.engines.loading import Loader, gradient_sums, loader_of, zero_options
from policy.engines.resharding import is_universal
from policy.saving import replacing, save_model, with_further
from rlhf.checks import inputs, launch
from rlhf.models.directories import CLASSIFIER, trains_on_adapter
from rlhf.models.loading import resolve_dtype, starts_whole, write_whole
from rlhf.offline import picture_rows
from rlhf.process import distributed
from rlhf.process.libraries import quiet_libraries
from rlhf.run.directory import LOOKED_UP
from rlhf.types import EncodedRows, UserError

LOG = logging.getLogger("rlhf.stages")
# columns of encoded rows whose token ids follow those of a prompt, if there is one
_ANSWERS = ("input_ids", "chosen_ids", "completion_ids")


def check(cfg: Config) -> list[str]:
    """What all of these stages check beside rows and memory; returns notes worth a warning. Raises
    UserError.
    """
    stage = cfg.stage_as(OfflineStage)
    ranks = launch.count_ranks(cfg.engine, dry_run=cfg.run.dry_run)
    launch.check_engine(cfg.engine, dry_run=cfg.run.dry_run)
    check_optimizer(stage.optimizer, cfg.engine)
    check_extensions(cfg.engine, waits=stage.unfreeze.on)
    check_saved(stage, cfg.engine.kind)
    adapters.check_budget(cfg.adapter, cfg.engine, stage.patience)
    plan = launch.plan_batches(stage.batch_size, cfg.engine, ranks)
    check_noise(stage, cfg.engine, cfg.model.dtype, plan)
    launch.check_growth(stage, cfg.engine, ranks)
    launch.check_micro_tokens(stage, cfg.engine)
    launch.check_nonfinite(stage.on_nonfinite, cfg.engine, cfg.model.dtype)
    inputs.check_trained(cfg.model)
    inputs.check_added_tokens(cfg.model, cfg.adapter, stage)
    trains_head = _trains_head(stage)
    task = _task(stage)
    adapters.check(cfg.model, cfg.adapter, task=task, trains_head=trains_head, stage=stage)
    ahead = virtual_tokens(cfg.adapter)
    packing = isinstance(stage, SFTStage) and stage.packing
    inputs.check_virtual_tokens(cfg.adapter, cfg.engine, packing=packing)
    picture_rows.check(cfg.model.path, stage, cfg.engine, ahead)
    inputs.check_row_length(stage.max_length, cfg.model, ahead)
    tokenizer = inputs.policy_tokenizer(cfg.model, cfg.data.chat_template)
    notes = launch.gradient_note(cfg.engine, cfg.model.dtype)
    notes += inputs.padding_note(cfg.model.path, tokenizer)
    return notes + inputs.rope_note(cfg.model, stage.max_length, ahead)


def check_saved(stage: OfflineStage, engine: EngineKind) -> None:
    """Checkpoints of weights alone are asked for where they are possible. Raises UserError."""
    if stage.save_optimizer:
        return
    if engine is EngineKind.deepspeed:
        raise UserError(
            "stage.save_optimizer=false: DeepSpeed writes weights and optimizer's state together. "
            "Leave it out, or set engine=torch."
        )
    if stage.on_nonfinite is OnNonFinite.rewind:
        raise UserError(
            "stage.save_optimizer=false with stage.on_nonfinite=rewind, which goes back to the "
            "optimizer of a checkpoint. Leave one of them out."
        )


def check_noise(
    stage: OfflineStage, engine: EngineConfig, dtype: Dtype, plan: launch.BatchPlan
) -> None:
    """The noise scale needs the norm of a step's gradient, and two micro-batches at least in a
    step. Raises UserError.
    """
    if stage.noise_scale is None:
        return
    launch.check_noise(stage, dtype)
    if engine.kind is EngineKind.deepspeed and engine.zero_stage == 0:
        raise UserError(
            f"stage.noise_scale={stage.noise_scale}: engine=zero0 tells TRL's trainers no "
            "gradient's norm. Set stage.noise_scale=null, or engine=zero1."
        )
    alone = plan.tokens is None and plan.ranks * plan.accumulation == 1
    if alone and not stage.batch_growth.steps:
        raise UserError(
            f"stage.noise_scale={stage.noise_scale} compares the micro-batches of a step, but a "
            f"step is one of {plan.micro} rows. Set engine.micro_batch_size below them."
        )


def begin(batch_size: int, engine: EngineConfig) -> launch.BatchPlan:
    """The batch plan, and DeepSpeed's process group where it is the engine. Raises UserError."""
    plan = launch.plan_batches(batch_size, engine, distributed.world_size())
    start_engine(engine)
    quiet_libraries()
    return plan


def check_rows(stage: OfflineStage, engine: EngineConfig, rows: EncodedRows) -> None:
    """Raises UserError where steps grow beyond the training rows (packed rows are counted later,
    once they are packed), and for rows that ranks can't share out.
    """
    if not (isinstance(stage, SFTStage) and stage.packing):
        launch.count_steps(stage, len(rows.train))
    picture_rows.check_mixed(engine, rows)


def start_engine(engine: EngineConfig) -> None:
    """DeepSpeed's process group; the torch engine needs none. Raises UserError for torch with
    several ranks.
    """
    if engine.kind is EngineKind.torch:
        distributed.require_one_process("engine=torch", distributed.SEVERAL_PROCESSES)
        return
    prepare_cpu()
    ensure_process_group()


def check_positions(model_config: Any, longest: int, adapter: AdapterConfig) -> None:
    """Raises UserError when the longest row, in tokens, doesn't fit into the model's positions,
    behind the adapter's virtual tokens.
    """
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if limit is None or longest + virtual_tokens(adapter) <= limit:
        return
    left = limit - virtual_tokens(adapter)
    raise UserError(
        f"the data has rows of {longest} tokens, but the model has {left} positions for them. Set "
        f"stage.max_length={left}."
    )


def loader_for(model: ModelConfig, adapter: AdapterConfig, engine: EngineConfig) -> Loader:
    """How the model that trains comes into memory. Under ZeRO-3 it is parted while it is read; one
    that is made of several files (an adapter's, a GGUF file), or has no file, is made whole first.
    """
    if engine.zero_stage == 3 and not starts_whole(model):
        LOG.info("model.path=%s: every rank makes the model whole before it is parted", model.path)
        return Loader()
    return loader_of(engine, resolve_dtype(model.dtype), adapter)


def with_adapter(
    model: Any,
    tokenizer: Any,
    stage: OfflineStage,
    source: ModelConfig,
    adapter: AdapterConfig,
    start: Path,
    rows: EncodedRows,
    loader: Loader,
) -> Any:
    """`model`, loaded from `source`, with the configured adapter; `model` itself for
    ``adapter=none``, of which stage.train says what trains. rows: what the stage trains on, for
    methods that look at some first; loader: what loaded it.

    The adapter names its base, ``model.path``. Where that holds an adapter, now merged into
    `model`, the whole weights are written to `start` once, and the adapter names them: of an
    adapter on an adapter PEFT and vLLM would read only the last. So they are where whole weights
    can't hold the adapter, its base has no path, or it has further adapters merged in
    (adapter.load); and the rounded weights where the base is held rounded. A collective.
    """
    model = with_further(model, adapter)
    if adapter.kind is AdapterKind.none:
        return adapters.attach(model, adapter, task=_task(stage), train=stage.train)
    base = None if source.gguf_file else source.path
    needs_base = base is None and not facts_of(adapter).merges
    if adapter.is_quantized:
        adapters.prepare(model, adapter, trains_head=_trains_head(stage))
        base = str(start)
        # rank 0 may have written it before another one looks, which then would wait for no one
        missing = distributed.broadcast(not (start / "config.json").exists())
        if missing:
            save_model(model, tokenizer, start)
    elif needs_base or asked_tokens(source) or trains_on_adapter(source.path, adapter):
        base = str(start)
        if distributed.is_main() and not (start / "config.json").exists():
            with replacing(start) as side:
                write_whole(model, tokenizer, side)
        distributed.barrier()
    put_on = functools.partial(
        adapters.attach,
        adapter=adapter,
        task=_task(stage),
        base=base,
        trains_head=_trains_head(stage),
        sample=functools.partial(sampled_rows, rows.train, adapter.sample_rows),
        record=start.parent / LOOKED_UP,
        tokenizer=tokenizer,
    )
    return loader.adapt(model, put_on)


def sampled_rows(train: Any, count: int) -> Rows:
    """Token ids of `count` rows that a stage trains on, evenly spaced, prompt and (chosen)
    answer.
    """
    rows = []
    for row in train.select(spaced(len(train), count)):
        answers = [row[name] for name in _ANSWERS if name in row]
        rows.append([*row.get("prompt_ids", ()), *answers[0]])
    return rows


def _task(stage: OfflineStage) -> str:
    """PEFT's task type."""
    return CLASSIFIER if isinstance(stage, RewardStage) else "CAUSAL_LM"


def _trains_head(stage: OfflineStage) -> bool:
    """Whether an adapter on the language model's head trains: these trainers multiply by the head's
    weight themselves.
    """
    return not isinstance(stage, (SFTStage, PreferenceStage, KTOStage))


def training_dtype(dtype: Dtype, adapter: AdapterKind, engine: EngineKind) -> Dtype:
    """What the weights are held in while they train.

    The torch engine steps the weights themselves, and half-precision weights lose small updates:
    full training holds them in float32 and computes in half precision by autocast. A frozen base
    under LoRA may stay in half precision, and DeepSpeed keeps float32 copies of its own.
    """
    if adapter is AdapterKind.none and engine is EngineKind.torch:
        return Dtype.float32
    return dtype


def deepspeed_config(
    engine: EngineConfig, *, half: bool, universal: bool = False
) -> dict[str, Any] | None:
    """The dict for ``TrainingArguments(deepspeed=...)``; None for the torch engine. transformers
    fills in "auto" from its other arguments.

    half: it trains in bfloat16; universal: the checkpoint to resume from is in DeepSpeed's
    universal form.
    """
    if engine.kind is EngineKind.torch:
        return None
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        **gradient_sums(engine, half=half),
        "zero_optimization": _zero(engine),
        # torch's AdamW rather than DeepSpeed's, which would be compiled at the first run
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "checkpoint": {"load_universal": universal},
    }


def _rows_of_loader(stage: OfflineStage, plan: launch.BatchPlan) -> int:
    """Rows of a batch of the loader, of which every step of a rank is a whole number."""
    if plan.tokens is None:
        return plan.micro
    return math.gcd(*stage.step_sizes()) // plan.ranks


def _zero(engine: EngineConfig) -> dict[str, Any]:
    # "auto": from the hidden size. With the library's fixed default a small model's weights would
    # all stay whole on every rank.
    zero = zero_options(engine, whole_below="auto")
    if engine.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return zero


# For TRL's configs of SFT, DPO and KTO: without the loss that balances experts, which they would
# add with the model's own coefficient. It is computed from each micro-batch alone, so an update
# would depend on how a step is split, and on the ranks.
EXPERTS = {"router_aux_loss_coef": 0.0}


@contextmanager
def unbalanced(model: Any) -> Iterator[None]:
    """While TRL makes its trainer: no loss that balances experts. `EXPERTS` is TRL's option, which
    it writes into the model's configuration; CPO and ORPO go by that alone, so the configuration
    asks for no router's logits from here on, in what is saved too. The model's own coefficient is
    put back, so that it is saved with it.
    """
    config = model.config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", None)
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False
    yield
    if coefficient is not None:
        config.router_aux_loss_coef = coefficient


def trainer_arguments(
    stage: OfflineStage,
    plan: launch.BatchPlan,
    engine: EngineConfig,
    run: RunConfig,
    dtype: Dtype,
    checkpoint_dir: Path,
    resume_from: Path | None = None,
    *,
    holds_out: bool = True,
) -> dict[str, Any]:
    """Keyword arguments that TRL's configs have in common.

    TRL's defaults turn on bf16 and gradient checkpointing; both are set here explicitly. dtype:
    ``model.dtype``; resume_from: the checkpoint that training goes on from; holds_out: whether
    there are held-out rows (`_looks`).
    """
    on_cpu = not torch.cuda.is_available()
    computed_in = resolve_dtype(dtype)
    half = computed_in is torch.bfloat16
    universal = resume_from is not None and is_universal(resume_from)
    return {
        "output_dir": str(checkpoint_dir),
        "per_device_train_batch_size": _rows_of_loader(stage, plan),
        "per_device_eval_batch_size": plan.rows_of_longest(stage.max_length),
        # a growing step's micro-batches are run by the trainer itself
        "gradient_accumulation_steps": 1 if stage.batch_growth.steps else plan.accumulation,
        "dataloader_pin_memory": not on_cpu,
        "learning_rate": published.learning_rate(stage, AdapterKind.none),
        "weight_decay": stage.weight_decay,
        "adam_beta1": stage.adam_beta1,
        "adam_beta2": stage.adam_beta2,
        "adam_epsilon": stage.adam_eps,
        "optim": "adamw_torch",
        "max_grad_norm": stage.max_grad_norm,
        "max_length": stage.max_length,
        "bf16": half,
        "fp16": computed_in is torch.float16,
        "use_cpu": on_cpu,
        "gradient_checkpointing": engine.gradient_checkpointing,
        "deepspeed": deepspeed_config(engine, half=half, universal=universal),
        "seed": run.seed,
        "data_seed": run.seed,
        "logging_steps": stage.log_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it would log the last finite loss in place of a NaN
        "save_only_model": not stage.save_optimizer,
        "report_to": "none",
        "disable_tqdm": True,
        **_looks(stage, run.keep_checkpoints, holds_out, starts=resume_from is None),
    }


def _looks(stage: OfflineStage, kept: int, holds_out: bool, *, starts: bool) -> dict[str, Any]:
    """When a trainer evaluates and saves, and which weights stay. Without held-out rows there is
    no best: the last weights stay, and checkpoints come every stage.save_steps, else as often as
    evaluations would.
    """
    if not holds_out:
        return {
            "eval_strategy": "no",
            "save_strategy": "steps",
            "save_steps": stage.save_steps or stage.eval_steps,
            "save_total_limit": kept or None,
        }
    return {
        "eval_strategy": "steps",
        "eval_steps": stage.eval_steps,
        "eval_on_start": starts,
        "save_strategy": "steps",
        "save_steps": stage.eval_steps,
        # the last ones, and the best
        "save_total_limit": kept + 1 if kept else None,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
    }
