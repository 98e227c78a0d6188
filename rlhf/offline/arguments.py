"""What TRL's trainers are configured with: precision, DeepSpeed's configuration, and the arguments
that all six have in common.
"""

from pathlib import Path
from typing import Any

import torch

from conf import published
from conf.choices import AdapterKind, Dtype, EngineKind, Offload, Scheduler
from conf.schema import EngineConfig, RunConfig
from conf.stages import OfflineStage
from policy.engines.deepspeed import is_universal
from rlhf.checks.launch import BatchPlan
from rlhf.models.loading import resolve_dtype

_SCHEDULERS = {
    Scheduler.constant: "constant_with_warmup",
    Scheduler.linear: "linear",
    Scheduler.cosine: "cosine",
}


def training_dtype(dtype: Dtype, adapter: AdapterKind, engine: EngineKind) -> Dtype:
    """What the weights are held in while they train.

    The torch engine steps the weights themselves, and half-precision weights lose small updates:
    full training holds them in float32 and computes in half precision by autocast. A frozen base
    under LoRA may stay in half precision, and DeepSpeed keeps float32 copies of its own.
    """
    if adapter is AdapterKind.none and engine is EngineKind.torch:
        return Dtype.float32
    return dtype


def deepspeed_config(engine: EngineConfig, *, universal: bool = False) -> dict[str, Any] | None:
    """The dict for ``TrainingArguments(deepspeed=...)``; None for the torch engine. transformers
    fills in "auto" from its other arguments.

    universal: the checkpoint to resume from is in DeepSpeed's universal form.
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
        "zero_optimization": _zero(engine),
        # torch's AdamW rather than DeepSpeed's, which would be compiled at the first run
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "checkpoint": {"load_universal": universal},
    }


def _zero(engine: EngineConfig) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage == 3:
        # "auto": from the hidden size. With the library's fixed default a small model's weights
        # would all stay whole on every rank.
        zero["stage3_param_persistence_threshold"] = "auto"
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if engine.offload is Offload.none:
        return zero
    target = {"device": engine.offload.value}
    if engine.nvme_path:
        target["nvme_path"] = engine.nvme_path
    zero["offload_optimizer"] = dict(target)
    if engine.zero_stage == 3:
        zero["offload_param"] = dict(target)
    return zero


def trainer_arguments(
    stage: OfflineStage,
    plan: BatchPlan,
    engine: EngineConfig,
    run: RunConfig,
    dtype: Dtype,
    checkpoint_dir: Path,
    resume_from: Path | None = None,
) -> dict[str, Any]:
    """Keyword arguments that TRL's configs have in common.

    TRL's defaults turn on bf16 and gradient checkpointing; both are set here explicitly. dtype:
    ``model.dtype``; resume_from: the checkpoint that training goes on from.
    """
    on_cpu = not torch.cuda.is_available()
    computed_in = resolve_dtype(dtype)
    universal = resume_from is not None and is_universal(resume_from)
    return {
        "output_dir": str(checkpoint_dir),
        "per_device_train_batch_size": plan.micro,
        "per_device_eval_batch_size": plan.micro,
        "gradient_accumulation_steps": plan.accumulation,
        "dataloader_pin_memory": not on_cpu,
        "learning_rate": published.learning_rate(stage, AdapterKind.none),
        "weight_decay": stage.weight_decay,
        "adam_beta1": stage.adam_beta1,
        "adam_beta2": stage.adam_beta2,
        "adam_epsilon": stage.adam_eps,
        "optim": "adamw_torch",
        "max_grad_norm": stage.max_grad_norm,
        "lr_scheduler_type": _SCHEDULERS[stage.scheduler],
        "max_length": stage.max_length,
        "bf16": computed_in is torch.bfloat16,
        "fp16": computed_in is torch.float16,
        "use_cpu": on_cpu,
        "gradient_checkpointing": engine.gradient_checkpointing,
        "deepspeed": deepspeed_config(engine, universal=universal),
        "seed": run.seed,
        "data_seed": run.seed,
        "logging_steps": stage.log_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it would log the last finite loss in place of a NaN
        "eval_strategy": "steps",
        "eval_steps": stage.eval_steps,
        "eval_on_start": resume_from is None,
        "save_strategy": "steps",
        "save_steps": stage.eval_steps,
        # the last ones, and the best
        "save_total_limit": run.keep_checkpoints + 1 if run.keep_checkpoints else None,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
