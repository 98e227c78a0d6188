"""LLaMA-Factory's options (its hparams, looked up at ff6d4d12e of 2026-08-18)."""

from pathlib import Path
from typing import Any

from rlhf.migrate import shared
from rlhf.migrate.llama_factory_rest import REST
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
    missing,
    negated,
    number,
    to,
    whole,
)
from rlhf.migrate.trainer import KEYS, alone

_STAGES = {"pt": "sft", "sft": "sft", "rm": "reward", "ppo": "ppo", "dpo": "dpo", "kto": "kto"}
# pref_loss: our stage, and what it is told
_PREFERENCE: dict[str, tuple[str, dict[str, Any]]] = {
    "sigmoid": ("dpo", {"stage.losses": ["sigmoid"]}),
    "hinge": ("dpo", {"stage.losses": ["hinge"]}),
    "ipo": ("ipo", {"stage.losses": ["ipo"]}),
    "orpo": ("orpo", {}),
    "simpo": ("simpo", {}),
}
_TEMPLATES = {
    "alpaca": "alpaca",
    "chatml": "chatml",
    "gemma": "gemma",
    "llama2": "llama-2",
    "llama3": "llama-3",
    "mistral": "mistral",
    "vicuna": "vicuna",
    "zephyr": "zephyr",
}
_TUNING = ("adapter", "stage.train.layers", "stage.train.modules", "adapter.quantize")
_REGISTRY = ("data.registry", "data.dataset")


def stage_of(s: Settings) -> str:
    """Our stage. Raises NotPossible."""
    if s.given.get("export_dir") is not None and s.given.get("stage") is None:
        return "export"
    if s.command not in ("", "train"):
        raise NotPossible(f"llamafactory-cli {s.command}")
    name = str(s.get("stage"))
    if name not in _STAGES:
        raise NotPossible(f"stage: {name}")
    if name == "dpo":
        return _PREFERENCE.get(str(s.get("pref_loss")), ("dpo", {}))[0]
    return _STAGES[name]


def defaults(s: Settings) -> dict[str, Any]:
    """What LLaMA-Factory takes where a key is left out."""
    if s.given.get("export_dir") is not None and s.given.get("stage") is None:
        return {}
    known: dict[str, Any] = {
        "stage": "sft",
        "finetuning_type": "lora",
        "pref_loss": "sigmoid",
        "pref_beta": 0.1,
        "cutoff_len": 2048,
        "learning_rate": 5e-5,
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.0,
        "seed": 42,
        "gradient_checkpointing": True,
        **shared.none_held_out(s, "val_size"),
    }
    if str(s.given.get("finetuning_type", "lora")) == "lora":
        rank = whole(s.given.get("lora_rank", 8))
        known |= {"lora_rank": 8, "lora_alpha": 2 * rank, "lora_target": "all"}
    if s.given.get("stage") == "ppo":
        known |= {"ppo_epochs": 4, "temperature": 0.95, "top_p": 0.7, "top_k": 50}
        known["max_new_tokens"] = 1024
    return known


def _tuning(s: Settings) -> Answer:
    """finetuning_type with quantization_bit."""
    kind = str(s.get("finetuning_type"))
    bits = s.get("quantization_bit")
    options: dict[str, Any] = {}
    if kind in ("lora", "oft"):
        options["adapter"] = kind
    elif kind == "full":
        options["adapter"] = "none"
    elif kind == "freeze":
        options |= {
            "adapter": "none",
            "stage.train.layers": whole(s.get("freeze_trainable_layers") or 2),
        }
    else:
        return impossible(f"finetuning_type: {kind}")
    if bits is not None and kind == "oft":
        return Answer(Fate.impossible, options, "rounded weights with adapter=oft")
    if bits is not None:
        rounded = {4: "nf4", 8: "int8"}.get(whole(bits))
        if rounded is None or str(s.get("quantization_method") or "bnb") not in (
            "bnb",
            "bitsandbytes",
        ):
            return Answer(
                Fate.impossible,
                options,
                f"a base in {bits} bits by another library than bitsandbytes",
            )
        options["adapter.quantize"] = rounded
    return computed(options)


def _preference(s: Settings) -> Answer:
    """pref_loss with pref_ftx, the weight of the chosen answers' likelihood."""
    name = str(s.get("pref_loss"))
    if name not in _PREFERENCE:
        return impossible(f"of their losses {', '.join(_PREFERENCE)} are here")
    options = dict(_PREFERENCE[name][1])
    share = number(s.get("pref_ftx") or 0)
    if share and "stage.losses" in options:
        options["stage.losses"] = [*options["stage.losses"], "sft"]
        options["stage.weights"] = [1.0, float(share)]
    return computed(options)


def _template(s: Settings, value: Any) -> Answer:
    name = str(value)
    if name in _TEMPLATES:
        return computed({"data.chat_template": _TEMPLATES[name]})
    return computed({"data.chat_template": None}, OWN_TEMPLATE)


def _data(s: Settings) -> Answer:
    """dataset and dataset_dir are their registry, which we read."""
    names, folder = s.get("dataset"), str(s.get("dataset_dir") or "data")
    if names is None:
        return impossible("no dataset is named")
    options = {"data.dataset": ",".join(listing(names))}
    if folder.startswith("REMOTE:"):
        options["data.registry"] = Path(folder).name
        return computed(
            options, f"download the hub's data set {folder[7:]} to this directory first"
        )
    if folder.upper() == "ONLINE":
        return impossible("names of a hub's data sets: give them in data.path or data.sources")
    return computed({**options, "data.registry": folder})


def _length(s: Settings, value: Any) -> Answer:
    if s.online:
        return computed({"data.max_prompt_length": whole(value)})
    return Answer(Fate.taken, {"stage.max_length": whole(value)})


def _batch_ppo(s: Settings) -> Answer:
    prompts = shared.batch_size(s) * whole(s.get("ppo_buffer_size") or 1)
    return computed({"stage.prompts_per_step": prompts})


def _model(s: Settings) -> Answer:
    """The model; of an export its adapter, whose directory names the model."""
    base, adapter = s.get("model_name_or_path"), s.get("adapter_name_or_path")
    if s.stage != "export" or adapter is None:
        return Answer(Fate.taken, {"model.path": str(base)})
    if len(listing(adapter)) > 1:
        return impossible("one adapter is merged by an export")
    note = "the adapter's directory, which names the model that it is merged into"
    return computed({"model.path": str(adapter)}, note)


def _exported(s: Settings, value: Any) -> Answer:
    if s.stage != "export":
        return Answer(Fate.idle, note="an export's, not this stage's")
    return shared.run_directory(value)


def _continued(s: Settings, value: Any) -> Answer:
    if s.stage == "export":
        return _model(s)
    note = "merged into the model at the start; a new adapter is trained"
    return computed({"adapter.load": listing(value)}, note)


def _init(value: Any) -> str:
    return "pissa" if flag(value) else "default"


def _tokens(s: Settings) -> Answer:
    """Added tokens; beside LoRA embedding and head train whole there."""
    options: dict[str, Any] = {}
    for key, ours in zip(("add_tokens", "add_special_tokens"), shared.TOKENS, strict=True):
        if s.get(key) is not None:
            options[ours] = listing(s.get(key))
    if not options:
        return Answer(Fate.idle, note="no tokens are added")
    if s.schema == "export":
        return Answer(Fate.idle, note="the trained model has them")
    lora = str(s.get("finetuning_type")) == "lora"
    if lora and s.get("additional_target") is None:
        options["adapter.save_whole"] = ["embed_tokens", "lm_head"]
    return computed(options, "their rows start at the mean of the others")


def _modules(s: Settings, value: Any) -> Answer:
    if str(value) == "all":
        return Answer(Fate.idle, note="all of a layer, as here")
    return computed({"stage.train.modules": listing(value)})


def _optimizer(name: str) -> tuple[Key, ...]:
    return missing(shared.PROJECTED, f"use_{name}", f"{name}_*")


def _reward_model(s: Settings, value: Any) -> Answer:
    return Answer(
        Fate.taken,
        {"reward.path": str(value)},
        "a directory that stage=reward wrote; train it anew",
    )


OWN: tuple[Key, ...] = (
    *computes(("model_name_or_path",), ("model.path",), _model),
    Key("model_revision", ("model.revision",), shared.revision),
    to("trust_remote_code", "model.trust_remote_code", flag),
    alone("adapter_name_or_path", ("adapter.load", "model.path"), _continued),
    to("flash_attn", "model.attn_implementation", shared.attention),
    *computes(("pure_bf16",), ("model.dtype",), shared.dtype),
    to("disable_gradient_checkpointing", "engine.gradient_checkpointing", negated),
    *computes(("stage",), (), lambda s: computed({}, f"stage={s.stage}")),
    *computes(
        ("finetuning_type", "quantization_bit", "freeze_trainable_layers", "quantization_method"),
        _TUNING,
        _tuning,
    ),
    to("double_quantization", "adapter.double_quantize", flag),
    alone("freeze_trainable_modules", ("stage.train.modules",), _modules),
    to("media_dir", "data.image_dir"),
    to("lora_rank", "adapter.rank", whole),
    to("lora_alpha", "adapter.alpha", number),
    to("lora_dropout", "adapter.dropout", number),
    to("lora_target", "adapter.targets", shared.targets),
    to("additional_target", "adapter.save_whole", listing),
    *computes(
        ("add_tokens", "add_special_tokens", "resize_vocab"),
        (*shared.TOKENS, "adapter.save_whole"),
        _tokens,
    ),
    to("use_dora", "adapter.dora", flag),
    to("use_rslora", "adapter.rslora", flag),
    to("loraplus_lr_ratio", "adapter.rate_ratio", number),
    to("pissa_init", "adapter.init", _init),
    to("oft_block_size", "adapter.oft.block_size", whole),
    to("oft_target", "adapter.targets", shared.targets),
    *computes(("dataset", "dataset_dir"), _REGISTRY, _data),
    alone("template", ("data.chat_template",), _template),
    to("default_system", "data.system", str),
    alone("cutoff_len", ("stage.max_length", "data.max_prompt_length"), _length),
    to("max_samples", "data.max_rows", whole, "of all data sets together, theirs is of each"),
    alone("val_size", ("data.eval_fraction",), lambda s, value: shared.held_out(value)),
    to("train_on_prompt", "stage.completion_only", negated),
    alone("packing", ("stage.packing",), shared.packing),
    alone("neat_packing", ("stage.packing",), shared.packing),
    *computes(("pref_loss", "pref_ftx"), ("stage.losses", "stage.weights"), _preference),
    to("pref_beta", "stage.beta", number),
    to("simpo_gamma", "stage.gamma", number),
    to("kto_chosen_weight", "stage.desirable_weight", number),
    to("kto_rejected_weight", "stage.undesirable_weight", number),
    to("ld_alpha", "stage.ld_alpha", number),
    to("ppo_epochs", "stage.epochs", whole),
    to("ppo_score_norm", "stage.reward_normalise", flag),
    to("ppo_whiten_rewards", "stage.whiten_rewards", flag),
    to("ppo_target", "stage.kl_target", number, "with stage.kl_controller=adaptive"),
    *computes(("ppo_buffer_size",), ("stage.prompts_per_step",), _batch_ppo),
    alone("reward_model", ("reward.path",), _reward_model),
    to("max_new_tokens", "rollout.max_response_length", whole),
    to("temperature", "rollout.temperature", number),
    to("top_p", "rollout.top_p", number),
    to("top_k", "rollout.top_k", lambda value: max(0, whole(value))),
    to("early_stopping_steps", "stage.patience", whole),
    to("vllm_gpu_util", "rollout.gpu_memory_utilization", number),
    to("vllm_enforce_eager", "rollout.enforce_eager", flag),
    to("vllm_max_lora_rank", "rollout.max_lora_rank", whole),
    *computes(("ray_num_workers",), (), lambda s: computed({}, "ranks: launch.ranks_per_node")),
    alone("export_dir", shared.RUN, _exported),
    *_optimizer("galore"),
    *_optimizer("apollo"),
    *missing("stage.optimizer has no such one", "use_badam", "badam_*"),
    to("use_muon", "stage.optimizer", lambda value: "muon" if flag(value) else "adamw"),
    to("recompute_granularity", "engine.gradient_checkpointing", lambda value: value is not None),
)

TOOLKIT = Toolkit(
    "llama_factory",
    "LLaMA-Factory",
    (*OWN, *REST, *KEYS),
    stage_of,
    defaults,
    telltales=(
        "finetuning_type",
        "cutoff_len",
        "template",
        "export_dir",
        "model_class",
        "kernel_config",
        "peft_config",
    ),
)
