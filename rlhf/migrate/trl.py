"""TRL's options: its command line, its scripts and its YAML files (looked up in 1.16, and at
f2cd57710 of 2026-07-24).
"""

from typing import Any

from rlhf.migrate import engines, online, shared, sources
from rlhf.migrate.online import either
from rlhf.migrate.shared import computed, impossible
from rlhf.migrate.tables import (
    Answer,
    Fate,
    Key,
    NotPossible,
    Settings,
    Toolkit,
    computes,
    flag,
    idle,
    listing,
    missing,
    number,
    stops,
    to,
    whole,
)
from rlhf.migrate.trainer import HUB, INSIDE, KEYS, LAUNCH, WORKERS, alone

_STAGES = {
    "sft": "sft",
    "sft_gemma3": "sft",
    "sft_gpt_oss": "sft",
    "sft_nemotron_3": "sft",
    "dpo": "dpo",
    "cpo": "cpo",
    "orpo": "orpo",
    "kto": "kto",
    "reward": "reward",
    "reward_modeling": "reward",
    "grpo": "grpo",
    "gspo": "gspo",
    "rloo": "rloo",
    "online_dpo": "online_dpo",
    "ppo": "ppo",
    "ppo_tldr": "ppo",
}
_RATES = {"sft": 2e-5, "reward": 1e-4, "cpo": 1e-6, "orpo": 1e-6}
_ONLINE = ("grpo", "gspo", "rloo", "online_dpo", "ppo", "ppo_tldr")
_OFFLINE_LOSSES = ("stage.losses", "stage.weights", "stage.loss")


def stage_of(s: Settings) -> str:
    """Our stage. Raises NotPossible."""
    if not s.command:
        raise NotPossible(
            "a YAML file that names no trainer (trl TRAINER --config FILE): set migrate.stage"
        )
    if s.command not in _STAGES:
        raise NotPossible(f"trl {s.command}")
    if s.command == "cpo" and s.get("loss_type") == "simpo":
        return "simpo"
    if s.command == "grpo" and s.get("importance_sampling_level") == "sequence":
        return "gspo"
    return _STAGES[s.command]


def defaults(s: Settings) -> dict[str, Any]:
    """What TRL takes where an option is left out."""
    known: dict[str, Any] = {
        "learning_rate": _RATES.get(_STAGES.get(s.command, ""), 1e-6),
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.0,
        "seed": 42,
        "logging_steps": 10,
        "save_steps": 500,
        "gradient_checkpointing": True,
        "bf16": True,
        "eval_strategy": "no",  # its scripts hold rows out only where they are to be evaluated
    }
    if s.given.get("use_peft"):
        known |= {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
    if s.command in ("grpo", "gspo", "rloo"):
        group = 2 if s.command == "rloo" else 8
        known |= {"num_generations": group, "max_completion_length": 512}
        known |= {"beta": 0.05 if s.command == "rloo" else 0.0}
        known |= {"use_vllm": False, "temperature": 1.0, "epsilon": 0.2}
        if s.command != "rloo":
            known["loss_type"] = "dapo"
    elif s.command not in _ONLINE:
        known["max_length"] = 1024
    if s.command in ("dpo", "kto", "cpo", "orpo"):
        known["beta"] = 0.1
    return known


def _tuning(s: Settings) -> Answer:
    """use_peft with load_in_4bit and load_in_8bit."""
    if not flag(s.get("use_peft") or False):
        if s.get("load_in_4bit") or s.get("load_in_8bit"):
            return impossible("a rounded model can't train without an adapter (use_peft)")
        return computed({"adapter": "none"})
    options: dict[str, Any] = {"adapter": "lora"}
    if flag(s.get("load_in_4bit") or False):
        options["adapter.quantize"] = "nf4"
    elif flag(s.get("load_in_8bit") or False):
        options["adapter.quantize"] = "int8"
    return computed(options)


def _data(s: Settings) -> Answer:
    """dataset_name with dataset_config and dataset_train_split, or dataset_mixture."""
    mixture = s.get("dataset_mixture", "datasets")
    if isinstance(mixture, list):
        return sources.from_sources([_source(item) for item in mixture])
    if isinstance(mixture, dict):
        read = [{"path": name, "weight": share} for name, share in mixture.items()]
        return sources.from_sources(read)
    name = s.get("dataset_name")
    if name is None:
        return impossible("no dataset is named")
    source = {
        "path": str(name),
        "subset": s.get("dataset_config"),
        "split": s.get("dataset_train_split"),
    }
    return sources.from_sources([source])


def _source(item: dict[str, Any]) -> dict[str, Any]:
    return {
        "path": str(item.get("path") or item.get("id")),
        "subset": item.get("name") or item.get("config"),
        "split": item.get("split"),
    }


def _beta(s: Settings, value: Any) -> Answer:
    if s.stage == "online_dpo":
        return Answer(Fate.taken, {"stage.dpo_beta": number(value)})
    option = "stage.kl_coef" if s.online else "stage.beta"
    return Answer(Fate.taken, {option: number(value)})


def _loss(s: Settings) -> Answer:
    """loss_type with loss_weights."""
    names, weights = listing(s.get("loss_type") or []), s.get("loss_weights")
    if s.schema == "sft":
        return impossible("SFT has one loss here, the negative log-likelihood")
    if s.schema != "dpo":
        return computed({"stage.loss": names[0]} if names else {})
    options: dict[str, Any] = {"stage.losses": names}
    if isinstance(weights, list):
        options["stage.weights"] = [number(weight) for weight in weights]
    return computed(options)


def _length(s: Settings, value: Any) -> Answer:
    if s.online:
        return impossible("prompt and response have a limit each")
    return Answer(Fate.taken, {"stage.max_length": whole(value)})


def _modules(value: Any) -> list[str]:
    """Modules of an adapter; examples write them with commas, too."""
    names = value if isinstance(value, list) else [value]
    return [part for name in names for part in listing(name)]


def _episodes(s: Settings) -> Answer:
    """Episodes are responses; our steps are of prompts_per_step of them."""
    episodes = whole(s.get("total_episodes"))
    return computed({"stage.steps": max(1, episodes // shared.batch_size(s))})


OWN: tuple[Key, ...] = (
    to("model_name_or_path", "model.path", str),
    to("sft_model_path", "model.path", str),
    Key("model_revision", ("model.revision",), shared.revision),
    to("trust_remote_code", "model.trust_remote_code", flag),
    to("attn_implementation", "model.attn_implementation", shared.attention),
    *computes(("dtype", "torch_dtype"), ("model.dtype",), shared.dtype),
    *computes(
        ("use_peft", "load_in_4bit", "load_in_8bit"), ("adapter", "adapter.quantize"), _tuning
    ),
    to("use_bnb_nested_quant", "adapter.double_quantize", flag),
    *idle("nf4 with the weights' own format to compute in", "bnb_4bit_*"),
    to("lora_r", "adapter.rank", whole),
    to("lora_alpha", "adapter.alpha", number),
    to("lora_dropout", "adapter.dropout", number),
    to("lora_target_modules", "adapter.targets", _modules),
    to("lora_modules_to_save", "adapter.save_whole", listing),
    to("use_rslora", "adapter.rslora", flag),
    to("use_dora", "adapter.dora", flag),
    *idle("the stage says it", "lora_task_type"),
    *computes(
        (
            "dataset_name",
            "dataset_config",
            "dataset_train_split",
            "dataset_mixture",
            "datasets",
            "dataset_mixer",
        ),
        sources.DATA,
        _data,
    ),
    *idle("an item of the mixture", "datasets[].*", "dataset_mixture[].*", "dataset_mixture.*"),
    *missing(
        "held-out rows are those of data.eval_path, or a share of the others", "dataset_test_split"
    ),
    to("dataset_text_field", "data.columns", lambda value: {"text": str(value)}),
    to("chat_template_path", "data.chat_template", str),
    to("chat_template", "data.chat_template", str),
    alone("max_length", ("stage.max_length",), _length),
    alone("max_seq_length", ("stage.max_length",), _length),
    to("max_prompt_length", "data.max_prompt_length", whole),
    alone("packing", ("stage.packing",), shared.packing),
    alone("padding_free", ("stage.packing",), shared.packing),
    *idle("rows are packed in one way", "packing_strategy", "eval_packing"),
    to("completion_only_loss", "stage.completion_only", flag),
    to("assistant_only_loss", "stage.completion_only", flag),
    *computes(
        ("loss_type", "loss_weights", "importance_sampling_level"),
        (*online.LOSS, *_OFFLINE_LOSSES),
        either(_loss, online.online_loss),
    ),
    alone("beta", ("stage.beta", "stage.kl_coef", "stage.dpo_beta"), _beta),
    to("label_smoothing", "stage.label_smoothing", number),
    to("ld_alpha", "stage.ld_alpha", number),
    to("discopop_tau", "stage.discopop_tau", number),
    to("f_divergence_type", "stage.f_divergence", str),
    to("f_alpha_divergence_coef", "stage.f_alpha", number),
    to("cpo_alpha", "stage.nll_coef", number),
    to("simpo_gamma", "stage.gamma", number),
    to("desirable_weight", "stage.desirable_weight", number),
    to("undesirable_weight", "stage.undesirable_weight", number),
    to("center_rewards_coefficient", "stage.centering_coef", number),
    to(
        "reward_model_path",
        "reward.path",
        str,
        "a directory that stage=reward wrote; train it anew",
    ),
    to(
        "reward_model_name_or_path",
        "reward.path",
        str,
        "a directory that stage=reward wrote; train it anew",
    ),
    to("max_new_tokens", "rollout.max_response_length", whole),
    to("response_length", "rollout.max_response_length", whole),
    to("missing_eos_penalty", "stage.truncation_penalty", number),
    to("num_ppo_epochs", "stage.epochs", whole),
    to("kl_coef", "stage.kl_coef", number),
    to("vf_coef", "stage.vf_coef", number),
    to("cliprange", "stage.cliprange", number),
    to("cliprange_value", "stage.cliprange_value", number),
    to("gamma", "stage.gamma", number),
    to("lam", "stage.gae_lambda", number),
    to("whiten_rewards", "stage.whiten_rewards", flag),
    to("normalize_advantages", "stage.whiten_advantages", flag),
    to("reward_clip_range", "stage.reward_clip", lambda value: number(value[1])),
    *computes(("total_episodes",), ("stage.steps",), _episodes),
    *idle("engine.micro_tokens bounds it", "local_rollout_forward_batch_size"),
    alone("accelerate_config", engines.ENGINE, engines.accelerate),
    *idle(
        WORKERS,
        """
        dataset_num_proc dataset_streaming dataset_kwargs shuffle_dataset pad_to_multiple_of
        precompute_ref_* train_sampling_strategy dataset_batch_size
        """,
    ),
    *idle(HUB, "config", "token"),
    *idle(
        LAUNCH,
        """
        env use_hf node_rank nproc_per_node
        """,
    ),
    *idle(
        INSIDE,
        """
        disable_dropout model_init_kwargs eval_num_prompts use_weighting
        """,
    ),
    *missing("logits or activations that are kept elsewhere", "activation_offloading"),
    *missing("special tokens are the model's", "eos_token", "pad_token", "stop_token"),
    *missing("experts' own loss", "router_aux_loss_coef"),
    *missing("another adapter method", "lora_target_parameters"),
    *missing("rows are left out, or prompts cut (data.truncate_prompts)", "truncation_mode"),
    *missing(
        "environments are set with environment=...",
        """
        env_* max_turns wordle_url max_tool_calling_iterations
        """,
    ),
    *missing("a server of their own", "vllm_url", "vllm_server_url"),
    *stops("distillation from a teacher", "teacher_*", "lmbda", "distillation_*"),
    *stops("their own example's options", "tpo_*"),
)


TOOLKIT = Toolkit(
    "trl",
    "TRL",
    (*OWN, *online.keys(), *KEYS),
    stage_of,
    defaults,
    telltales=(
        "dataset_name",
        "dataset_mixture",
        "dataset_mixer",
        "use_peft",
        "lora_r",
        "dataset_train_split",
        "dataset_splits",
    ),
)
