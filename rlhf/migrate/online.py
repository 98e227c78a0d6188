"""The keys of TRL's GRPO and RLOO trainers, which ms-swift and axolotl pass on."""

from dataclasses import replace
from typing import Any

from rlhf.migrate import shared
from rlhf.migrate.shared import NEEDS_ROWS, computed, impossible
from rlhf.migrate.tables import (
    Answer,
    Compute,
    Fate,
    Key,
    Settings,
    computes,
    flag,
    idle,
    listing,
    missing,
    number,
    to,
    whole,
)

# Trainers whose batch counts prompts, with so many responses to each.
_OF_PROMPTS = {"ppo": 1, "online_dpo": 2}


def _samples(s: Settings) -> int:
    return whole(s.get("num_generations") or _OF_PROMPTS.get(s.stage, 8))


def _micro(s: Settings) -> int:
    return whole(s.get("per_device_train_batch_size", "micro_batch_size") or 8)


def _minibatches(s: Settings) -> int:
    """Optimizer steps in one pass over a step's responses."""
    if s.stage in _OF_PROMPTS:
        return whole(s.get("num_mini_batches") or 1)
    steps = s.get("steps_per_generation")
    whole_batch = s.get("generation_batch_size")
    if whole_batch is not None:
        steps = whole(whole_batch) // (_micro(s) * s.ranks)
    if steps is None:
        return 1
    return max(1, whole(steps) // shared.accumulation(s))


def _responses(s: Settings) -> int:
    of_update = _micro(s) * s.ranks * shared.accumulation(s)
    if s.stage in _OF_PROMPTS:
        return of_update * _samples(s)
    return of_update * _minibatches(s)


def batch(s: Settings) -> Answer:
    """Prompts, responses and optimizer steps of one step of the loop. TRL counts responses."""
    responses, samples = _responses(s), _samples(s)
    if responses % samples:
        return impossible(
            f"{responses} responses of a step are no multiple of {samples} for each prompt; "
            "say migrate.ranks"
        )
    options = {
        "stage.prompts_per_step": responses // samples,
        "stage.samples_per_prompt": samples,
        "stage.minibatches": _minibatches(s),
    }
    return computed(options, f"{responses} responses of a step, {samples} to each prompt")


def length(s: Settings) -> Answer:
    """Steps of the loop; TRL counts optimizer steps."""
    most = s.get("max_steps", "train_iters")
    if most is not None and number(most) > 0:
        updates = _minibatches(s) * whole(s.get("num_iterations") or 1)
        return computed({"stage.steps": max(1, whole(most) // updates)})
    if s.rows is None:
        return impossible(f"{shared.epochs_of(s):g} passes over the prompts: {NEEDS_ROWS}")
    prompts = max(1, _responses(s) // _samples(s))
    return computed({"stage.steps": max(1, round(s.rows * shared.epochs_of(s) / prompts))})


def either(offline: Compute, online: Compute) -> Compute:
    """One computation for the stages on rows, another one for the online loop."""

    def compute(s: Settings) -> Answer:
        return online(s) if s.online else offline(s)

    return compute


# ---- losses ----

LOSS = (
    "stage.policy_loss",
    "stage.aggregation",
    "stage.losses",
    "stage.weights",
    "stage.loss",
    "stage.importance_level",
)
_ONLINE_LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {"stage.policy_loss": "clip", "stage.aggregation": "sequence"},
    "bnpo": {"stage.policy_loss": "clip", "stage.aggregation": "token"},
    "dapo": {"stage.policy_loss": "clip", "stage.aggregation": "token"},
    "dr_grpo": {"stage.policy_loss": "clip", "stage.aggregation": "constant"},
    "cispo": {"stage.policy_loss": "cispo", "stage.aggregation": "token"},
}


def online_loss(s: Settings) -> Answer:
    """loss_type with importance_sampling_level."""
    name = str(s.get("loss_type") or "grpo").lower()
    if name not in _ONLINE_LOSSES:
        return impossible(f"of GRPO's losses {', '.join(_ONLINE_LOSSES)} are here")
    options = dict(_ONLINE_LOSSES[name])
    if str(s.get("importance_sampling_level") or "token") == "sequence":
        options["stage.policy_loss"] = "gspo"
    return computed(options)


IMPORTANCE = ("stage.importance_cap", "stage.importance_mode", "stage.importance_level")
_CORRECTION = (
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_cap",
    "vllm_importance_sampling_clip_max",
)


def importance(s: Settings) -> Answer:
    """The correction of what sampler and trainer differ by."""
    on = s.get("vllm_importance_sampling_correction")
    if on is not None and not flag(on):
        return computed({"stage.importance_cap": None})
    cap = s.get("vllm_importance_sampling_clip_max", "vllm_importance_sampling_cap")
    level, _, mode = str(s.get("vllm_importance_sampling_mode") or "sequence_mask").partition("_")
    options = {
        "stage.importance_cap": number(cap or 3.0),
        "stage.importance_mode": "mask" if mode == "mask" else "truncate",
        "stage.importance_level": level,
    }
    return computed(options)


# ---- rewards ----

REWARDS = ("reward.function", "reward.terms")
_OWN_FUNCTIONS = {
    "accuracy": {"kind": "math"},
    "accuracy_reward": {"kind": "math"},
    "format": {"kind": "format", "style": "think_answer"},
    "think_format_reward": {"kind": "format", "style": "think"},
    "external_r1v_acc": None,
}


def rewards(s: Settings) -> Answer:
    """reward_funcs with reward_weights: names that are known, pkg.module.function, or models."""
    names = listing(s.get("reward_funcs") or [])
    weights = s.get("reward_weights")
    weights = weights if isinstance(weights, list) else [weights or 1.0] * len(names)
    if len(weights) != len(names):
        return impossible(f"{len(weights)} weights for {len(names)} rewards")
    terms: dict[str, Any] = {}
    unread = []
    for name, weight in zip(names, weights, strict=True):
        term = _term(name)
        if term is None:
            unread.append(name)
        else:
            terms[_term_name(name)] = {**term, "weight": number(weight)}
    if unread:
        return Answer(
            Fate.impossible,
            {"reward.terms": terms} if terms else {},
            f"{', '.join(unread)}: give pkg.module:function of each in reward.terms",
        )
    return computed({"reward.terms": terms})


def _term(name: str) -> dict[str, Any] | None:
    if name in _OWN_FUNCTIONS:
        return _OWN_FUNCTIONS[name]
    module, _, function = name.rpartition(".")
    if "/" in name:
        return {"kind": "model", "paths": [name]}
    return {"kind": "function", "function": f"{module}:{function}"} if module else None


def _term_name(name: str) -> str:
    return name.replace("/", ".").rpartition(".")[2].replace("-", "_").lower()


def _scaled(value: Any) -> bool:
    return str(value).lower() not in ("none", "false", "no")


def _backend(s: Settings) -> Answer:
    if not flag(s.get("use_vllm") or False):
        return computed({"rollout": "hf"})
    server = str(s.get("vllm_mode") or "colocate") == "server"
    return computed({"rollout": "server" if server else "vllm"})


def _sleep(s: Settings) -> Answer:
    """Whether vLLM gives the device back: in the trainer's process alone."""
    if str(s.get("vllm_mode")) == "server" or not flag(s.get("use_vllm") or False):
        return Answer(Fate.idle, note="only vLLM in the trainer's process sleeps")
    asked = s.get("vllm_enable_sleep_mode", "sleep_level")
    return computed({"rollout.sleep": str(asked).lower() not in ("false", "0")})


def _servers(s: Settings) -> Answer:
    url = s.get("vllm_server_base_url")
    if url is None and s.get("vllm_server_host") is not None:
        url = f"http://{s.get('vllm_server_host')}:{s.get('vllm_server_port') or 8000}"
    if url is None:
        return impossible("a server's port without its host")
    note = "theirs can't be used: start one with stage=serve_rollout at this address"
    return computed({"rollout.servers": [str(url)]}, note)


def _context(s: Settings) -> Answer:
    """The longest sequence of vLLM, as the prompt's length and the response's."""
    longest = whole(s.get("vllm_max_model_len", "vllm_max_model_length", "vllm.max_model_len"))
    response = whole(s.get("max_completion_length") or 512)
    if longest <= response:
        return impossible(f"{longest} tokens hold no prompt before {response} of a response")
    return computed({"data.max_prompt_length": longest - response})


def _place(value: Any) -> str:
    return "reward" if flag(value) else "loss"


KEYS: tuple[Key, ...] = (
    *computes(
        ("num_generations", "steps_per_generation", "generation_batch_size", "num_mini_batches"),
        shared.BATCH_ONLINE,
        batch,
    ),
    to("num_iterations", "stage.epochs", whole),
    to("max_completion_length", "rollout.max_response_length", whole),
    to("temperature", "rollout.temperature", number),
    to("top_p", "rollout.top_p", number),
    to("top_k", "rollout.top_k", lambda value: max(0, whole(value))),
    to("epsilon", "stage.cliprange", number),
    to("epsilon_high", "stage.cliprange_high", number),
    to("delta", "stage.dual_clip", number),
    to("scale_rewards", "stage.advantage_std", _scaled),
    to("mask_truncated_completions", "stage.mask_truncated", flag),
    to("entropy_coef", "stage.entropy_coef", number),
    to("sync_ref_model", "stage.reference_every", lambda v: 512 if flag(v) else 0),
    to("ref_model_mixup_alpha", "stage.reference_mix", number),
    to("ref_model_sync_steps", "stage.reference_every", whole),
    *computes(("reward_funcs", "reward_weights"), REWARDS, rewards),
    *computes(("use_vllm", "vllm_mode"), ("rollout",), _backend),
    *computes(
        ("vllm_server_host", "vllm_server_port", "vllm_server_base_url"),
        ("rollout.servers",),
        _servers,
    ),
    *computes(
        ("vllm_max_model_len", "vllm_max_model_length"), ("data.max_prompt_length",), _context
    ),
    to(
        "vllm_gpu_memory_utilization",
        "rollout.gpu_memory_utilization",
        number,
    ),
    to("vllm_enforce_eager", "rollout.enforce_eager", flag),
    *computes(("vllm_enable_sleep_mode", "sleep_level"), ("rollout.sleep",), _sleep),
    to(
        "vllm_tensor_parallel_size",
        "rollout.server.tensor_parallel",
        whole,
        "with rollout=server",
    ),
    to("vllm_data_parallel_size", "rollout.server.data_parallel", whole),
    to("vllm_server_timeout", "rollout.server.start_limit_s", number),
    *computes(_CORRECTION, IMPORTANCE, importance),
    to("async_prefetch", "stage.ahead", lambda value: int(flag(value))),
    to("kl_in_reward", "stage.kl_place", _place),
    *idle(
        "samples.jsonl has responses and their scores",
        "log_completions",
        "num_completions_to_print",
        "log_unique_prompts",
        "log_multimodal",
        "log_completions_hub_repo",
        "log_entropy",
    ),
    *idle("done inside", "ds3_gather_for_generation", "vllm_group_port"),
    *missing(
        "no such choice in the online loop",
        "top_entropy_quantile",
        "use_bias_correction_kl",
        "vllm_importance_sampling_clip_min",
        "off_policy_mask_threshold",
        "off_policy_sequence_mask_delta",
        "multi_objective_aggregation",
        "generation_kwargs",
        "cast_lm_head_to_fp32",
        "min_p",
        "repetition_penalty",
        "use_liger_loss",
        "sapo_*",
        "vespo_*",
        "cache_implementation",
        "use_adaptive_entropy",
    ),
    *missing("a template's own arguments can't be given", "chat_template_kwargs"),
)


def keys(prefix: str = "") -> tuple[Key, ...]:
    """Entries for the keys of the online trainers, those behind `prefix` where there is one."""
    return tuple(_behind(prefix, key) for key in KEYS)


def _behind(prefix: str, key: Key) -> Key:
    """The key behind a prefix; its computation sees all keys without it."""

    def convert(s: Settings, value: Any) -> Answer:
        inner = {name.removeprefix(prefix): held for name, held in s.given.items()}
        return key.convert(replace(s, given=inner), value)

    return Key(prefix + key.name, key.options, convert)
