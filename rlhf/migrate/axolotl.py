"""axolotl's options (its schemas, looked up at 067b021c8 of 2026-07-24)."""

from typing import Any

from rlhf.migrate import engines, online, shared, sources
from rlhf.migrate.axolotl_rest import REST
from rlhf.migrate.online import either
from rlhf.migrate.shared import OWN_TEMPLATE, computed, impossible
from rlhf.migrate.tables import (
    Answer,
    Fate,
    Key,
    NotPossible,
    Settings,
    Toolkit,
    computes,
    flag,
    listing,
    negated,
    number,
    to,
    whole,
    whole_or_zero,
)
from rlhf.migrate.trainer import (
    alone,
)

_RL = {
    "dpo": "dpo",
    "ipo": "ipo",
    "orpo": "orpo",
    "kto": "kto",
    "simpo": "simpo",
    "grpo": "grpo",
    "gdpo": "grpo",
}
_TEMPLATES = {
    "alpaca": "alpaca",
    "chatml": "chatml",
    "gemma": "gemma",
    "llama3": "llama-3",
    "mistral_v1": "mistral",
}


def stage_of(s: Settings) -> str:
    """Our stage. Raises NotPossible."""
    if s.command not in ("", "train"):
        raise NotPossible(f"axolotl {s.command}")
    if s.get("process_reward_model"):
        raise NotPossible("process_reward_model")
    if s.get("reward_model") is True:
        return "reward"
    kind = s.get("rl")
    if kind is None:
        return "sft"
    if str(kind) not in _RL:
        raise NotPossible(f"rl: {kind}")
    return _RL[str(kind)]


def defaults(s: Settings) -> dict[str, Any]:
    """What axolotl takes where a key is left out."""
    known: dict[str, Any] = {
        "sequence_len": 512,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1.0,
        "lr_scheduler": "cosine",
        "gradient_checkpointing": False,
        "seed": 42,
        "dtype_of_weights": True,
        **shared.none_held_out(s, "val_set_size"),
    }
    if s.given.get("warmup_steps") is None:
        known["warmup_ratio"] = 0.03
    if s.given.get("adapter"):
        known |= {"lora_dropout": 0.0}
    if s.given.get("rl") in ("dpo", "orpo", "kto"):
        known["rl_beta"] = 0.1
    return known


def _tuning(s: Settings) -> Answer:
    """adapter with load_in_4bit and load_in_8bit."""
    kind = s.get("adapter")
    options: dict[str, Any] = {}
    if kind is None:
        if flag(s.get("load_in_4bit") or False) or flag(s.get("load_in_8bit") or False):
            return impossible("a rounded model can't train without an adapter")
        return computed({"adapter": "none"})
    if kind not in ("lora", "qlora"):
        return impossible(f"adapter: {kind}")
    options["adapter"] = "lora"
    if flag(s.get("load_in_4bit") or False) or (kind == "qlora" and not s.get("load_in_8bit")):
        options["adapter.quantize"] = "nf4"
    elif flag(s.get("load_in_8bit") or False):
        options["adapter.quantize"] = "int8"
    return computed(options)


def _targets(s: Settings) -> Answer:
    """lora_target_linear, or the modules of lora_target_modules."""
    modules = s.get("lora_target_modules")
    if flag(s.get("lora_target_linear") or False):
        return computed({"adapter.targets": ["all-linear"]})
    if modules is None:
        return computed({"adapter.targets": ["q_proj", "v_proj"]})
    if isinstance(modules, str) and any(sign in modules for sign in "(\\|*"):
        return impossible("a regular expression: give names in adapter.targets")
    return computed({"adapter.targets": listing(modules)})


def _dtype(s: Settings) -> Answer:
    return shared.dtype(s)


def _template(s: Settings, value: Any) -> Answer:
    if value in _TEMPLATES:
        return computed({"data.chat_template": _TEMPLATES[value]})
    return computed({"data.chat_template": None}, OWN_TEMPLATE)


def _beta(s: Settings, value: Any) -> Answer:
    option = "stage.kl_coef" if s.online else "stage.beta"
    return Answer(Fate.taken, {option: number(value)})


def _optimizer(s: Settings, value: Any) -> Answer:
    return shared.optimizer(value)


def _length(s: Settings, value: Any) -> Answer:
    if s.online:
        return computed({"data.max_prompt_length": whole(value)})
    return Answer(Fate.taken, {"stage.max_length": whole(value)})


def _attention(value: Any) -> str | None:
    return "flash_attention_2" if value is True else shared.attention(value)


def _tracker(name: str) -> Any:
    def convert(s: Settings, value: Any) -> Answer:
        return computed({"tracking": name})

    return convert


def _log_model(value: Any) -> bool:
    return str(value).lower() in ("checkpoint", "end", "true")


def _wandb(s: Settings) -> Answer:
    """wandb_project and wandb_mode."""
    if str(s.get("wandb_mode")) == "disabled":
        return computed({"tracking": "none"})
    return computed(
        {"tracking": "wandb", "tracking.project": str(s.get("wandb_project") or "rlhf")}
    )


def _spike(s: Settings, value: Any) -> Answer:
    return impossible(
        f"a loss above {value} ends the run there; stage.spike_loss is a multiple of the last"
    )


def _part(value: Any) -> list[str]:
    """Patterns of weights that train, as patterns of modules."""
    names = [str(name).removesuffix("$").removesuffix(".weight") for name in value]
    return [name.lstrip("^") for name in names]


OWN: tuple[Key, ...] = (
    to("base_model", "model.path", str),
    to("trust_remote_code", "model.trust_remote_code", flag),
    to("attn_implementation", "model.attn_implementation", _attention),
    to(
        "flash_attention",
        "model.attn_implementation",
        lambda value: "flash_attention_2" if flag(value) else None,
    ),
    to("sdp_attention", "model.attn_implementation", lambda v: "sdpa" if flag(v) else None),
    to("eager_attention", "model.attn_implementation", lambda v: "eager" if flag(v) else None),
    *computes(
        ("bf16", "bfloat16", "fp16", "float16", "torch_dtype", "dtype_of_weights"),
        ("model.dtype",),
        _dtype,
    ),
    *computes(("rl", "reward_model"), (), lambda s: computed({}, f"stage={s.stage}")),
    *computes(
        ("adapter", "load_in_4bit", "load_in_8bit"), ("adapter", "adapter.quantize"), _tuning
    ),
    to("lora_r", "adapter.rank", whole),
    to("lora_alpha", "adapter.alpha", number),
    to("lora_dropout", "adapter.dropout", number),
    *computes(("lora_target_linear", "lora_target_modules"), ("adapter.targets",), _targets),
    to("lora_modules_to_save", "adapter.save_whole", listing),
    to("peft_use_dora", "adapter.dora", flag),
    to("peft_use_rslora", "adapter.rslora", flag),
    to("loraplus_lr_ratio", "adapter.rate_ratio", number),
    alone(
        "lora_model_dir",
        ("adapter.load",),
        lambda s, value: computed(
            {"adapter.load": listing(value)}, "merged into the model at the start; a new one trains"
        ),
    ),
    to("unfrozen_parameters", "stage.train.modules", _part),
    *computes(("datasets", "pretraining_dataset"), sources.DATA, sources.axolotl_data),
    *computes(
        (
            "datasets[].path",
            "datasets[].type",
            "datasets[].split",
            "datasets[].name",
            "datasets[].data_files",
            "datasets[].field_*",
            "datasets[].field",
            "datasets[].message_property_mappings",
            "datasets[].message_field_*",
            "datasets[].type.*",
            "pretraining_dataset[].path",
            "pretraining_dataset[].type",
            "pretraining_dataset[].name",
            "pretraining_dataset[].split",
        ),
        sources.DATA,
        sources.axolotl_data,
    ),
    alone("chat_template", ("data.chat_template",), _template),
    to("chat_template_jinja", "data.chat_template", str),
    to("default_system_message", "data.system", str),
    alone("val_set_size", ("data.eval_fraction",), lambda s, value: shared.held_out(value)),
    alone("sequence_len", ("stage.max_length", "data.max_prompt_length"), _length),
    alone("sample_packing", ("stage.packing",), shared.packing),
    to("max_packed_sequence_len", "stage.packing", lambda value: True),
    to("train_on_inputs", "stage.completion_only", negated),
    *computes(
        ("micro_batch_size", "gradient_accumulation_steps", "batch_size"),
        (*shared.BATCH, *shared.BATCH_ONLINE),
        either(shared.batch, online.batch),
    ),
    *computes(("num_epochs", "max_steps"), shared.LENGTH, either(shared.length, online.length)),
    to("learning_rate", "stage.learning_rate", number),
    to("weight_decay", "stage.weight_decay", number),
    Key("revision_of_model", ("model.revision",), shared.revision),
    to("neftune_noise_alpha", "stage.neftune_alpha", number),
    to("noisy_embedding_alpha", "stage.neftune_alpha", number),
    to("adam_beta1", "stage.adam_beta1", number),
    to("adam_beta2", "stage.adam_beta2", number),
    to("adam_epsilon", "stage.adam_eps", number),
    to("adam_eps", "stage.adam_eps", number),
    to("max_grad_norm", "stage.max_grad_norm", number),
    to("seed", "run.seed", whole),
    alone("logging_steps", ("stage.log_steps",), shared.logging),
    *computes(
        ("lr_scheduler", "lr_scheduler_kwargs", "cosine_min_lr_ratio"),
        shared.SCHEDULE,
        shared.schedule,
    ),
    *computes(("warmup_ratio", "warmup_steps"), ("stage.warmup_ratio",), shared.warmup),
    *computes(
        ("saves_per_epoch", "save_steps", "save_strategy"), ("stage.save_steps",), shared.saves
    ),
    *computes(
        ("evals_per_epoch", "eval_steps", "eval_strategy", "evaluation_strategy"),
        ("stage.eval_steps",),
        shared.evaluations,
    ),
    to("save_total_limit", "run.keep_checkpoints", whole_or_zero),
    alone("tokens", ("model.add_tokens",), shared.tokens("model.add_tokens")),
    alone(
        "special_tokens.additional_special_tokens",
        ("model.add_special_tokens",),
        shared.tokens("model.add_special_tokens"),
    ),
    alone("save_only_model", ("stage.save_optimizer",), shared.weights_alone),
    to("early_stopping_patience", "stage.patience", whole),
    alone("optimizer", shared.OPTIMIZER, _optimizer),
    to("gradient_checkpointing", "engine.gradient_checkpointing", lambda v: v not in (False, None)),
    alone("deepspeed", engines.ENGINE, engines.deepspeed),
    alone("fsdp", engines.ENGINE, lambda s, value: engines.fsdp(value)),
    *computes(
        (
            "fsdp_version",
            "fsdp_config.fsdp_version",
            "fsdp_config.sharding_strategy",
            "fsdp_config.fsdp_sharding_strategy",
            "fsdp_config.reshard_after_forward",
            "fsdp_config.fsdp_reshard_after_forward",
            "dp_shard_size",
        ),
        engines.ENGINE,
        lambda s: engines.fsdp("full_shard"),
    ),
    *computes(
        ("fsdp_config.offload_params", "fsdp_config.fsdp_offload_params"),
        engines.ENGINE,
        lambda s: engines.fsdp("full_shard offload") if _offloads(s) else computed({}),
    ),
    *computes(
        ("fsdp_config.activation_checkpointing", "fsdp_config.fsdp_activation_checkpointing"),
        ("engine.gradient_checkpointing",),
        lambda s: computed({"engine.gradient_checkpointing": True}),
    ),
    Key("context_parallel_size", ("engine.sequence_parallel",), engines.shared_rows),
    Key("sequence_parallel_degree", ("engine.sequence_parallel",), engines.shared_rows),
    to("rl_beta", "stage.beta", number),
    to("orpo_alpha", "stage.beta", number),
    to("dpo_label_smoothing", "stage.label_smoothing", number),
    to("cpo_alpha", "stage.nll_coef", number),
    to("simpo_gamma", "stage.gamma", number),
    to("kto_desirable_weight", "stage.desirable_weight", number),
    to("kto_undesirable_weight", "stage.undesirable_weight", number),
    to(
        "rpo_alpha",
        "stage.weights",
        lambda value: [1.0, float(number(value))],
        "with stage.losses=[sigmoid,sft]",
    ),
    to("center_rewards_coefficient", "stage.centering_coef", number),
    alone("trl.beta", ("stage.kl_coef", "stage.beta"), _beta),
    *computes(
        ("trl.loss_type", "trl.importance_sampling_level"),
        online.LOSS,
        lambda s: online.online_loss(_of_trl(s)),
    ),
    *computes(
        ("vllm.max_model_len",),
        ("data.max_prompt_length",),
        lambda s: computed(
            {
                "data.max_prompt_length": whole(s.get("vllm.max_model_len"))
                - whole(s.get("trl.max_completion_length") or 512)
            }
        ),
    ),
    to("vllm.gpu_memory_utilization", "rollout.gpu_memory_utilization", number),
    to("vllm.enforce_eager", "rollout.enforce_eager", flag),
    to("vllm.tensor_parallel_size", "rollout.server.tensor_parallel", whole, "with rollout=server"),
    to("vllm.data_parallel_size", "rollout.server.data_parallel", whole, "with rollout=server"),
    *computes(("wandb_project", "wandb_mode"), ("tracking", "tracking.project"), _wandb),
    to("wandb_entity", "tracking.entity", str),
    to("wandb_name", "run.name", lambda value: str(value).replace("/", "-")),
    to("wandb_run_id", "run.name", lambda value: str(value).replace("/", "-")),
    to("wandb_log_model", "tracking.log_model", _log_model),
    alone("use_wandb", ("tracking",), _tracker("wandb")),
    alone("use_tensorboard", ("tracking",), _tracker("tensorboard")),
    alone("output_dir", shared.RUN, lambda s, value: shared.run_directory(value)),
    alone("resume_from_checkpoint", ("run.resume",), lambda s, value: shared.resume(value)),
    to("auto_resume_from_checkpoints", "run.resume", flag),
    to(
        "dataset_exact_deduplication",
        "data.pipeline",
        lambda v: ["exact_duplicates"] if flag(v) else [],
        "for stage=data",
    ),
    alone("loss_watchdog_threshold", (), _spike),
)


def _offloads(s: Settings) -> bool:
    return bool(s.get("fsdp_config.offload_params", "fsdp_config.fsdp_offload_params"))


def _of_trl(s: Settings) -> Settings:
    """The settings with the keys of the block trl as TRL names them."""
    inner = {key.removeprefix("trl."): value for key, value in s.given.items()}
    return Settings(s.command, inner, s.defaults, s.file, s.ranks, s.rows, s.stage, s.schema)


TOOLKIT = Toolkit(
    "axolotl",
    "axolotl",
    (*OWN, *REST, *online.keys("trl.")),
    stage_of,
    defaults,
    telltales=("base_model", "sequence_len", "micro_batch_size", "val_set_size", "num_epochs"),
)
