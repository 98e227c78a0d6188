"""ms-swift's options (its arguments, looked up at 3602360a5 of 2026-08-22), those of its Megatron
trainers included where they mean the same.
"""

import math
from typing import Any

from rlhf.migrate import engines, online, shared, sources
from rlhf.migrate.online import either
from rlhf.migrate.shared import computed, impossible
from rlhf.migrate.swift_rest import REST
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
    number,
    to,
    whole,
)
from rlhf.migrate.trainer import KEYS, alone

_RLHF = {
    "dpo": "dpo",
    "orpo": "orpo",
    "simpo": "simpo",
    "kto": "kto",
    "cpo": "cpo",
    "rm": "reward",
    "ppo": "ppo",
    "grpo": "grpo",
}
_ESTIMATORS = {
    "grpo": {"stage.advantage": "group"},
    "rloo": {"stage.advantage": "leave_one_out"},
    "reinforce_plus_plus": {"stage.advantage": "reinforce_pp"},
}
_OFFLINE_LOSSES = ("stage.losses", "stage.weights", "stage.loss")
_BETAS = {"simpo": 2.0, "grpo": 0.04, "gkd": 0.5}


def stage_of(s: Settings) -> str:
    """Our stage. Raises NotPossible."""
    words = s.command.split()
    name = words[-1] if words else ("rlhf" if s.get("rlhf_type") else "sft")
    task = str(s.get("task_type") or "causal_lm")
    if task != "causal_lm" and name != "rlhf":
        raise NotPossible(f"task_type: {task}")
    if name in ("sft", "pt"):
        return "sft"
    if name != "rlhf":
        raise NotPossible(f"swift {name or s.command}")
    kind = str(s.get("rlhf_type") or "dpo")
    if kind not in _RLHF:
        raise NotPossible(f"rlhf_type: {kind}")
    return _RLHF[kind]


def defaults(s: Settings) -> dict[str, Any]:
    """What ms-swift takes where a key is left out."""
    lora = str(s.given.get("tuner_type", "lora")) == "lora"
    known: dict[str, Any] = {
        "tuner_type": "lora",
        "learning_rate": 1e-4 if lora else 1e-5,
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 1,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.0,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "seed": 42,
        "logging_steps": 5,
        "save_steps": 500,
        "gradient_checkpointing": True,
        "report_to": "tensorboard",
        **shared.none_held_out(s, "split_dataset_ratio"),
    }
    if "megatron" in s.command:
        del known["per_device_train_batch_size"]
    else:
        micro = whole(s.given.get("per_device_train_batch_size", 1))
        known["gradient_accumulation_steps"] = math.ceil(16 / micro / s.ranks)
    if lora:
        known |= {"lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.05}
        known["target_modules"] = "all-linear"
    kind = str(s.given.get("rlhf_type", ""))
    if kind:
        known["beta"] = _BETAS.get(kind, 0.1)
    if kind in ("grpo", "ppo"):
        known |= {"temperature": 0.9, "max_completion_length": 512}
    return known


def _tuning(s: Settings) -> Answer:
    """tuner_type with quant_method and quant_bits."""
    kind = str(s.get("tuner_type", "train_type"))
    options: dict[str, Any] = {}
    if kind in ("lora", "adalora", "vera"):
        options["adapter"] = kind
    elif kind == "full":
        options["adapter"] = "none"
    else:
        return impossible(f"tuner_type: {kind}")
    bits = s.get("quant_bits")
    if bits is not None and number(bits) > 0:
        rounded = {4: "nf4", 8: "int8"}.get(whole(bits))
        if rounded is None or str(s.get("quant_method") or "bnb") != "bnb":
            return Answer(Fate.impossible, options, f"a base in {bits} bits by another library")
        options["adapter.quantize"] = rounded
    return computed(options)


def _data(s: Settings, value: Any) -> Answer:
    named = value if isinstance(value, list) else [value]
    read = [sources.swift_source(str(name)) for name in named]
    note = "" if s.get("use_hf") else "names are of ModelScope's hub there, of Hugging Face's here"
    return sources.from_sources(read, note)


def _held_out_rows(s: Settings, value: Any) -> Answer:
    named = value if isinstance(value, list) else [value]
    if len(named) > 1:
        return impossible("data.eval_path is one path")
    return Answer(Fate.taken, {"data.eval_path": str(named[0])})


def _beta(s: Settings, value: Any) -> Answer:
    option = "stage.kl_coef" if s.online else "stage.beta"
    return Answer(Fate.taken, {option: number(value)})


def _loss(s: Settings) -> Answer:
    """loss_type with loss_weights and rpo_alpha."""
    names = listing(s.get("loss_type") or [])
    if s.stage == "kto" or s.schema == "cpo":
        return computed({"stage.loss": names[0]} if names else {})
    names = names or ["sigmoid"]
    weights = s.get("loss_weights")
    share = s.get("rpo_alpha")
    options: dict[str, Any] = {"stage.losses": names}
    if isinstance(weights, list):
        options["stage.weights"] = [number(weight) for weight in weights]
    elif share is not None and number(share) > 0:
        options |= {"stage.losses": [*names, "sft"], "stage.weights": [1.0, float(number(share))]}
    return computed(options)


def _length(s: Settings, value: Any) -> Answer:
    if s.online:
        return computed({"data.max_prompt_length": whole(value)})
    return Answer(Fate.taken, {"stage.max_length": whole(value)})


def _advantage(s: Settings, value: Any) -> Answer:
    if value not in _ESTIMATORS:
        return impossible(f"of the estimators {', '.join(_ESTIMATORS)} are here")
    return computed(dict(_ESTIMATORS[value]))


def _loss_scale(s: Settings, value: Any) -> Answer:
    if value == "all":
        return computed({"stage.completion_only": False})
    if value == "default":
        return Answer(Fate.idle, note="answers train, as here")
    return impossible("weights of single turns or words")


def _truncation(value: Any) -> bool:
    if value not in ("left", "delete"):
        raise ValueError("prompts are cut from the left, or refused")
    return bool(value == "left")


OWN: tuple[Key, ...] = (
    to("model", "model.path", str, "of Hugging Face's hub, or a directory"),
    Key("model_revision", ("model.revision",), shared.revision),
    to("torch_dtype", "model.dtype", lambda value: str(value).removeprefix("torch.")),
    to("attn_impl", "model.attn_implementation", shared.attention),
    to("attention_backend", "model.attn_implementation", shared.attention),
    *computes(("rlhf_type", "task_type"), (), lambda s: computed({}, f"stage={s.stage}")),
    *computes(
        ("tuner_type", "train_type", "quant_bits", "quant_method"),
        ("adapter", "adapter.quantize"),
        _tuning,
    ),
    to("bnb_4bit_use_double_quant", "adapter.double_quantize", flag),
    to("lora_rank", "adapter.rank", whole),
    to("lora_alpha", "adapter.alpha", number),
    to("lora_dropout", "adapter.dropout", number),
    to("target_modules", "adapter.targets", listing),
    to("modules_to_save", "adapter.save_whole", listing),
    alone(
        "new_special_tokens",
        ("model.add_special_tokens",),
        shared.tokens("model.add_special_tokens"),
    ),
    to("use_rslora", "adapter.rslora", flag),
    to("use_dora", "adapter.dora", flag),
    to("lorap_lr_ratio", "adapter.rate_ratio", number),
    alone(
        "adapters",
        ("adapter.load",),
        lambda s, value: computed(
            {"adapter.load": listing(value)}, "merged into the model at the start; a new one trains"
        ),
    ),
    alone("dataset", sources.DATA, _data),
    alone("val_dataset", ("data.eval_path",), _held_out_rows),
    alone(
        "split_dataset_ratio",
        ("data.eval_fraction",),
        lambda s, value: shared.held_out(value),
    ),
    alone(
        "columns",
        ("data.columns",),
        lambda s, value: computed(
            {"data.columns": {ours: theirs for theirs, ours in dict(value).items()}}
        ),
    ),
    alone("max_length", ("stage.max_length", "data.max_prompt_length"), _length),
    to("max_model_len", "stage.max_length", whole),
    to("system", "data.system", str),
    to("truncation_strategy", "data.truncate_prompts", _truncation),
    alone("packing", ("stage.packing",), shared.packing),
    alone("padding_free", ("stage.packing",), shared.packing),
    *computes(
        ("loss_type", "loss_weights", "rpo_alpha", "importance_sampling_level"),
        (*online.LOSS, *_OFFLINE_LOSSES),
        either(_loss, online.online_loss),
    ),
    alone("beta", ("stage.beta", "stage.kl_coef"), _beta),
    to("label_smoothing", "stage.label_smoothing", number),
    to("ld_alpha", "stage.ld_alpha", number),
    to("discopop_tau", "stage.discopop_tau", number),
    to("cpo_alpha", "stage.nll_coef", number),
    to("simpo_gamma", "stage.gamma", number),
    to("desirable_weight", "stage.desirable_weight", number),
    to("undesirable_weight", "stage.undesirable_weight", number),
    to("center_rewards_coefficient", "stage.centering_coef", number),
    alone("loss_scale", ("stage.completion_only",), _loss_scale),
    alone("advantage_estimator", ("stage.advantage",), _advantage),
    to("dynamic_sample", "stage.selection", lambda v: "unequal" if flag(v) else "all"),
    to("max_resample_times", "stage.resample", whole),
    to("overlong_filter", "stage.mask_truncated", flag),
    to("max_new_tokens", "rollout.max_response_length", whole),
    to("response_length", "rollout.max_response_length", whole),
    to("num_ppo_epochs", "stage.epochs", whole),
    to("kl_coef", "stage.kl_coef", number),
    to("missing_eos_penalty", "stage.truncation_penalty", number),
    to("early_stop_interval", "stage.patience", whole),
    to("reward_model", "reward.path", str, "a directory that stage=reward wrote; train it anew"),
    *computes(
        ("micro_batch_size", "global_batch_size"),
        (*shared.BATCH, *shared.BATCH_ONLINE),
        either(shared.batch, online.batch),
    ),
    *computes(("train_iters", "max_epochs"), shared.LENGTH, either(shared.length, online.length)),
    to("lr", "stage.learning_rate", number),
    *computes(("lr_warmup_fraction", "lr_warmup_iters"), ("stage.warmup_ratio",), shared.warmup),
    *computes(("min_lr", "lr_decay_style"), shared.SCHEDULE, shared.schedule),
    to("recompute_granularity", "engine.gradient_checkpointing", lambda v: str(v) != "none"),
    alone("accelerate_config", engines.ENGINE, engines.accelerate),
    alone("optimizer", shared.OPTIMIZER, lambda s, value: shared.optimizer(value)),
    Key("sequence_parallel_size", ("engine.sequence_parallel",), engines.shared_rows),
    Key("context_parallel_size", ("engine.sequence_parallel",), engines.shared_rows),
    to("merge_lora", "adapter.merge_on_save", flag),
)

TOOLKIT = Toolkit(
    "swift",
    "ms-swift",
    (*OWN, *REST, *online.keys(), *KEYS),
    stage_of,
    defaults,
    telltales=(
        "tuner_type",
        "train_type",
        "rlhf_type",
        "split_dataset_ratio",
        "torch_dtype",
        "model",
    ),
)
