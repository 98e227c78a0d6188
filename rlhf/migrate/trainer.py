"""The keys of transformers' TrainingArguments, which LLaMA-Factory, ms-swift and TRL share."""

from rlhf.migrate import engines, shared
from rlhf.migrate.online import batch as online_batch
from rlhf.migrate.online import either
from rlhf.migrate.online import length as online_length
from rlhf.migrate.tables import (
    Answer,
    Convert,
    Key,
    Settings,
    computes,
    flag,
    idle,
    missing,
    number,
    to,
    whole,
    whole_or_zero,
)

WORKERS = "how rows are read is decided inside"
DISPLAY = "progress, curves and samples are always kept"
HUB = "nothing is uploaded to a hub"
LAUNCH = "said where a run is launched"
INSIDE = "set inside"
FUSED = "fused kernels change the speed, and there are none here"
PARALLEL = "a model's layers can't be split over devices here: data parallelism and ZeRO are there"


def alone(name: str, options: tuple[str, ...], convert: Convert) -> Key:
    """A key whose value alone is looked at."""
    return Key(name, options, convert)


def _epochs_online(s: Settings) -> Answer:
    return online_length(s)


BATCH_OPTIONS = (*shared.BATCH, "stage.prompts_per_step", "stage.minibatches")

KEYS: tuple[Key, ...] = (
    *computes(
        ("per_device_train_batch_size", "gradient_accumulation_steps"),
        (*BATCH_OPTIONS, "stage.samples_per_prompt"),
        either(shared.batch, online_batch),
    ),
    *computes(
        ("num_train_epochs", "max_steps"),
        shared.LENGTH,
        either(shared.length, _epochs_online),
    ),
    *idle(
        "held-out rows are evaluated in micro-batches like those that train",
        "per_device_eval_batch_size",
        "eval_accumulation_steps",
    ),
    to("learning_rate", "stage.learning_rate", number),
    to("weight_decay", "stage.weight_decay", number),
    to("adam_beta1", "stage.adam_beta1", number),
    to("adam_beta2", "stage.adam_beta2", number),
    to("adam_epsilon", "stage.adam_eps", number),
    to("max_grad_norm", "stage.max_grad_norm", number),
    to("seed", "run.seed", whole),
    alone("logging_steps", ("stage.log_steps",), shared.logging),
    *computes(("lr_scheduler_type", "lr_scheduler_kwargs"), shared.SCHEDULE, shared.schedule),
    *computes(("warmup_ratio", "warmup_steps"), ("stage.warmup_ratio",), shared.warmup),
    *computes(("save_strategy", "save_steps"), ("stage.save_steps",), shared.saves),
    *computes(
        ("eval_strategy", "evaluation_strategy", "eval_steps"),
        ("stage.eval_steps", "data.eval_fraction"),
        shared.evaluations,
    ),
    to("save_total_limit", "run.keep_checkpoints", whole_or_zero),
    alone("optim", shared.OPTIMIZER, lambda s, value: shared.optimizer(value)),
    *computes(("bf16", "fp16"), ("model.dtype",), shared.dtype),
    to("gradient_checkpointing", "engine.gradient_checkpointing", flag),
    alone("deepspeed", engines.ENGINE, engines.deepspeed),
    alone("fsdp", engines.ENGINE, lambda s, value: engines.fsdp(value)),
    *idle("ZeRO sets it inside", "fsdp_config.*", "fsdp_transformer_layer_cls_to_wrap"),
    alone("report_to", ("tracking",), lambda s, value: shared.tracker(value)),
    alone("output_dir", shared.RUN, lambda s, value: shared.run_directory(value)),
    to("run_name", "run.name", lambda value: str(value).replace("/", "-")),
    to("overwrite_output_dir", "run.overwrite", flag),
    alone("resume_from_checkpoint", ("run.resume",), lambda s, value: shared.resume(value)),
    alone("save_only_model", ("stage.save_optimizer",), shared.weights_alone),
    to("neftune_noise_alpha", "stage.neftune_alpha", number),
    *missing(
        FUSED,
        """
        use_liger_kernel liger_kernel_config torch_compile torch_compile_*
        """,
    ),
    *missing("rows are not grouped by their length", "group_by_length", "length_column_name"),
    *missing(
        "the held-out loss chooses the weights that stay",
        "metric_for_best_model",
        "greater_is_better",
    ),
    *idle("the best weights are always loaded at the end", "load_best_model_at_end"),
    *idle("the stage says it", "do_train", "do_eval"),
    *idle(
        WORKERS,
        """
        dataloader_* remove_unused_columns no_remove_unused_columns label_names
        accelerator_config accelerator_config.*
        """,
    ),
    *idle(
        DISPLAY,
        """
        logging_first_step logging_strategy log_level disable_tqdm logging_dir
        logging_nan_inf_filter include_num_input_tokens_seen
        """,
    ),
    *idle(
        HUB,
        """
        push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_model_revision
        """,
    ),
    *idle(
        LAUNCH,
        """
        ddp_* local_rank fsdp_min_num_params ddp average_tokens_across_devices
        """,
    ),
    *idle("weights are always safetensors", "save_safetensors", "safe_serialization"),
    *idle(
        INSIDE,
        """
        gradient_checkpointing_kwargs gradient_checkpointing_kwargs.* tf32 full_determinism
        torch_empty_cache_steps include_for_metrics batch_eval_metrics data_seed
        """,
    ),
)
