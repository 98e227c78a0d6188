"""OpenRLHF's options (its command lines, looked up at 3c3be623 of 2026-08-13)."""

from typing import Any

from rlhf.migrate import engines, shared, sources
from rlhf.migrate import openrlhf_values as values
from rlhf.migrate.openrlhf_rest import REST
from rlhf.migrate.shared import NEEDS_ROWS, computed, impossible
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
from rlhf.migrate.trainer import alone

_ESTIMATORS = {
    "gae": "ppo",
    "reinforce": "reinforce_pp",
    "reinforce_baseline": "reinforce_pp",
    "rloo": "rloo",
    "group_norm": "grpo",
    "dr_grpo": "dr_grpo",
}
_STAGES = {"train_sft": "sft", "train_dpo": "dpo", "train_rm": "reward"}


_NO_ROWS = "none"  # where eval.dataset is left out


def stage_of(s: Settings) -> str:
    """Our stage. Raises NotPossible."""
    if s.command in ("train_ppo_ray", "train_ppo"):
        name = str(s.get("algo.advantage.estimator") or "gae")
        if name not in _ESTIMATORS:
            raise NotPossible(f"algo.advantage.estimator {name}")
        return _ESTIMATORS[name]
    if s.command == "train_dpo" and s.get("model.ipo_enable"):
        return "ipo"
    if s.command not in _STAGES:
        raise NotPossible(f"openrlhf.cli.{s.command}")
    return _STAGES[s.command]


def defaults(s: Settings) -> dict[str, Any]:
    """What OpenRLHF takes where an option is left out."""
    known: dict[str, Any] = {
        "train.batch_size": 128,
        "ds.zero_stage": 2,
        "ds.param_dtype": "bf16",
        "ds.attn_implementation": "flash_attention_2",
        "lr_scheduler": "cosine_with_min_lr",
        "lr_warmup_ratio": 0.03,
        "min_lr_ratio": 0.1,
        "train.seed": 42,
        "train.max_epochs": 2 if s.command == "train_sft" else 1,
        "ckpt.save_steps": -1,
        "eval.dataset": _NO_ROWS,
        "eval.steps": -1,
        "ckpt.max_num": 3,
    }
    if whole(s.given.get("ds.lora.rank", 0)):
        known |= {"ds.lora.alpha": 16, "ds.lora.target_modules": "all-linear"}
    rates = {"train_sft": 5e-6, "train_dpo": 1e-5, "train_rm": 9e-6}
    if s.command in rates:
        known |= {"adam.lr": rates[s.command], "train.micro_batch_size": 8}
        if s.command == "train_rm":
            known["train.micro_batch_size"] = 1
        known["data.max_len"] = 2048 if s.command == "train_sft" else 512
    else:
        known |= {"rollout.batch_size": 1024, "rollout.n_samples_per_prompt": 1}
        known |= {"algo.kl.init_coef": 0.01, "actor.adam.lr": 1e-6, "critic.value_clip": 0.5}
    if s.command == "train_dpo":
        known["model.beta"] = 0.1
    return known


def _ranks(s: Settings) -> int:
    nodes, each = s.get("actor.num_nodes"), s.get("actor.num_gpus_per_node")
    return s.ranks if each is None else whole(nodes or 1) * whole(each)


def _batch(s: Settings) -> Answer:
    """Rows of a step; online, prompts, responses and optimizer steps."""
    update = whole(s.get("train.batch_size"))
    if not s.online:
        micro = whole(s.get("train.micro_batch_size") or 1)
        options = {"stage.batch_size": update, "engine.micro_batch_size": micro}
        return computed(options)
    prompts, samples = (
        whole(s.get("rollout.batch_size")),
        whole(s.get("rollout.n_samples_per_prompt")),
    )
    responses = prompts * samples
    if responses % update:
        return impossible(f"{responses} responses are no multiple of train.batch_size {update}")
    options = {
        "stage.prompts_per_step": prompts,
        "stage.samples_per_prompt": samples,
        "stage.minibatches": responses // update,
    }
    return computed(options, f"{responses} responses in {responses // update} optimizer steps")


def _epochs(s: Settings, value: Any) -> Answer:
    return Answer(Fate.taken, {"stage.epochs": whole(value) if s.online else number(value)})


def _episodes(s: Settings, value: Any) -> Answer:
    if s.rows is None:
        return impossible(f"{value} passes over the prompts: {NEEDS_ROWS}")
    steps = s.rows * number(value) / whole(s.get("rollout.batch_size"))
    return computed({"stage.steps": max(1, round(steps))})


def _length(s: Settings) -> Answer:
    longest, response = s.get("data.max_len"), s.get("rollout.max_new_tokens")
    if not s.online:
        return computed({"stage.max_length": whole(longest)})
    if response is None:
        return impossible(
            "a limit of prompt and response together: set data.max_prompt_length and "
            "rollout.max_response_length"
        )
    options = {"rollout.max_response_length": whole(response)}
    if longest is not None:
        options["data.max_prompt_length"] = whole(longest) - whole(response)
    return computed(options)


def _engine(s: Settings) -> Answer:
    options: dict[str, Any] = {"engine": f"zero{whole(s.get('ds.zero_stage'))}"}
    if flag(s.get("ds.adam_offload") or False):
        options["engine.offload"] = "cpu"
    ranks = _ranks(s)
    if ranks > 1:
        options["engine.gpus"] = ranks
    return computed(options)


def _clip(s: Settings, value: Any) -> Answer:
    low, high = value
    return computed({"stage.cliprange": number(low), "stage.cliprange_high": number(high)})


def _adapter(s: Settings, value: Any) -> Answer:
    rank = whole(value)
    if rank == 0:
        return Answer(Fate.idle, note="all weights train")
    return computed({"adapter": "lora", "adapter.rank": rank})


def _estimator(s: Settings, value: Any) -> Answer:
    options = {"stage.group_baseline": True} if value == "reinforce_baseline" else {}
    return computed(options, f"stage={s.stage}")


def _held_out(s: Settings, value: Any) -> Answer:
    if value == _NO_ROWS:
        return shared.held_out(0)
    return Answer(Fate.taken, {"data.eval_path": str(value)})


def _steps(option: str) -> Any:
    def convert(s: Settings, value: Any) -> Answer:
        if s.online and option == "stage.eval_steps":
            return Answer(Fate.idle, note="held-out prompts are looked at by stage.watch")
        if number(value) > 0:
            return Answer(Fate.taken, {option: whole(value)})
        if option == "stage.save_steps":
            return computed({option: 0}, "none but those at evaluations")
        return computed({}, "at the end of the run, and as stage.eval_steps says")

    return convert


OWN: tuple[Key, ...] = (
    to("model.model_name_or_path", "model.path", str),
    to("actor.model_name_or_path", "model.path", str),
    to(
        "reward.model_name_or_path",
        "reward.path",
        str,
        "a directory that stage=reward wrote; train it anew",
    ),
    *computes(
        (
            "train.batch_size",
            "train.micro_batch_size",
            "rollout.batch_size",
            "rollout.n_samples_per_prompt",
        ),
        (*shared.BATCH, *shared.BATCH_ONLINE),
        _batch,
    ),
    to(
        "rollout.micro_batch_size",
        "engine.micro_tokens",
        lambda value: 4096,
        "rows of a forward pass: engine.micro_tokens counts tokens",
    ),
    to("train.max_tokens_per_gpu", "engine.micro_tokens", whole),
    alone("train.max_epochs", ("stage.epochs",), _epochs),
    alone("train.num_episodes", ("stage.steps",), _episodes),
    *computes(
        ("data.max_len", "rollout.max_new_tokens"),
        ("stage.max_length", "data.max_prompt_length", "rollout.max_response_length"),
        _length,
    ),
    *computes(("ds.zero_stage", "ds.adam_offload"), (*engines.ENGINE, "engine.gpus"), _engine),
    *computes(
        ("actor.num_nodes", "actor.num_gpus_per_node"), (*engines.ENGINE, "engine.gpus"), _engine
    ),
    to(
        "ds.param_dtype", "model.dtype", lambda v: {"bf16": "bfloat16", "fp16": "float16"}.get(v, v)
    ),
    to("ds.attn_implementation", "model.attn_implementation", shared.attention),
    alone("ds.lora.rank", ("adapter", "adapter.rank"), _adapter),
    to("ds.lora.alpha", "adapter.alpha", number),
    to("ds.lora.dropout", "adapter.dropout", number),
    to("ds.lora.target_modules", "adapter.targets", listing),
    to("ds.load_in_4bit", "adapter.quantize", lambda v: "nf4" if flag(v) else "none"),
    alone("ds.packing_samples", ("stage.packing",), shared.packing),
    to("model.gradient_checkpointing_enable", "engine.gradient_checkpointing", flag),
    to("actor.gradient_checkpointing_enable", "engine.gradient_checkpointing", flag),
    to("adam.lr", "stage.learning_rate", number),
    to("actor.adam.lr", "stage.learning_rate", number),
    to("critic.adam.lr", "stage.critic_learning_rate", number),
    to("adam.eps", "stage.adam_eps", number),
    to("adam.weight_decay", "stage.weight_decay", number),
    alone(
        "adam.betas",
        ("stage.adam_beta1", "stage.adam_beta2"),
        lambda s, value: computed(
            {"stage.adam_beta1": number(value[0]), "stage.adam_beta2": number(value[1])}
        ),
    ),
    *computes(("lr_scheduler", "min_lr_ratio"), shared.SCHEDULE, values.schedule),
    to("lr_warmup_ratio", "stage.warmup_ratio", number),
    Key("ds.ring_attn_size", ("engine.sequence_parallel",), engines.shared_rows),
    to("max_norm", "stage.max_grad_norm", number),
    to("train.seed", "run.seed", whole),
    alone("data.dataset", sources.DATA, sources.openrlhf_data),
    alone("data.prompt_dataset", sources.DATA, sources.openrlhf_data),
    to("data.dataset_split", "data.split", str),
    to("data.prompt_split", "data.split", str),
    alone("eval.dataset", ("data.eval_path", "data.eval_fraction"), _held_out),
    to("data.max_samples", "data.max_rows", whole),
    *computes(
        (
            "data.input_key",
            "data.prompt_key",
            "data.output_key",
            "data.chosen_key",
            "data.rejected_key",
            "data.label_key",
        ),
        ("data.columns",),
        sources.openrlhf_columns,
    ),
    to("data.tokenizer_chat_template", "data.chat_template", str),
    to("model.beta", "stage.beta", number),
    to("model.label_smoothing", "stage.label_smoothing", number),
    *computes(("model.ipo_enable",), (), lambda s: computed({}, f"stage={s.stage}")),
    alone(
        "model.nll_loss_coef",
        ("stage.losses", "stage.weights"),
        lambda s, value: computed(
            {"stage.losses": ["sigmoid", "sft"], "stage.weights": [1.0, float(number(value))]}
            if number(value)
            else {}
        ),
    ),
    to("model.margin_loss_enable", "stage.margin", flag),
    to("algo.kl.init_coef", "stage.kl_coef", number),
    to("algo.kl.use_loss", "stage.kl_place", lambda v: "loss" if flag(v) else "reward"),
    to("algo.kl.estimator", "stage.kl_estimator", str),
    to("algo.kl.target", "stage.kl_target", number, "with stage.kl_controller=adaptive"),
    to("algo.kl.horizon", "stage.kl_horizon", whole),
    alone("algo.advantage.estimator", ("stage.group_baseline",), _estimator),
    to("algo.advantage.gamma", "stage.gamma", number),
    to("algo.advantage.lambd", "stage.gae_lambda", number),
    to("algo.advantage.no_std_norm", "stage.advantage_std", lambda value: not flag(value)),
    *computes(
        (
            "algo.advantage.is_correction_enable",
            "algo.advantage.is_correction_type",
            "algo.advantage.is_correction_threshold",
        ),
        (
            "stage.importance_cap",
            "stage.importance_mode",
            "stage.importance_floor",
            "stage.importance_level",
        ),
        values.correction,
    ),
    to(
        "algo.dynamic_filtering_enable",
        "stage.selection",
        lambda value: "unequal" if flag(value) else "all",
    ),
    to("actor.eps_clip", "stage.cliprange", number),
    alone("actor.eps_clip_low_high", ("stage.cliprange", "stage.cliprange_high"), _clip),
    to("actor.dual_clip", "stage.dual_clip", number),
    to("actor.entropy_coef", "stage.entropy_coef", number),
    to(
        "actor.policy_loss_type",
        "stage.policy_loss",
        lambda value: {"ppo": "clip"}.get(str(value), str(value)),
    ),
    to("critic.value_clip", "stage.cliprange_value", number),
    to(
        "critic.freezing_steps",
        "stage.critic_warmup",
        lambda value: max(0, whole(value)),
        "there the policy waits so many steps, here too",
    ),
    to("reward.normalize_enable", "stage.reward_normalise", flag),
    alone(
        "reward.clip_range",
        ("stage.reward_clip",),
        lambda s, value: computed({"stage.reward_clip": number(value[1])}),
    ),
    to("reward.overlong_buffer_len", "stage.overlong_buffer", whole),
    to("reward.overlong_penalty_factor", "stage.overlong_penalty", number),
    alone("reward.remote_url", ("reward.terms",), values.reward),
    to("rollout.temperature", "rollout.temperature", number),
    to("rollout.top_p", "rollout.top_p", number),
    alone("vllm.num_engines", ("rollout", "rollout.server.count"), values.backend),
    to("vllm.tensor_parallel_size", "rollout.server.tensor_parallel", whole, "with rollout=server"),
    to("vllm.gpu_memory_utilization", "rollout.gpu_memory_utilization", number),
    to("vllm.enforce_eager", "rollout.enforce_eager", flag),
    to("vllm.enable_sleep", "rollout.sleep", flag),
    to("train.async_enable", "stage.ahead", lambda value: int(flag(value))),
    to("train.async_queue_size", "stage.ahead", whole),
    *computes(("train.partial_rollout_enable",), ("rollout.in_flight",), values.in_flight),
    alone("ckpt.output_dir", shared.RUN, lambda s, value: shared.run_directory(value)),
    alone("ckpt.save_steps", ("stage.save_steps",), _steps("stage.save_steps")),
    to("ckpt.max_num", "run.keep_checkpoints", whole),
    to("ckpt.load_enable", "run.resume", flag, "of a run of ours"),
    alone("eval.steps", ("stage.eval_steps",), _steps("stage.eval_steps")),
    alone("logger.logging_steps", ("stage.log_steps",), shared.logging),
    alone(
        "logger.wandb.key",
        ("tracking",),
        lambda s, value: computed(
            {"tracking": "wandb"}, "the key is W&B's own: wandb login or WANDB_API_KEY"
        ),
    ),
    to("logger.wandb.project", "tracking.project", str),
    to("logger.wandb.org", "tracking.entity", str),
    to("logger.wandb.group", "tracking.group", str),
    to("logger.wandb.run_name", "run.name", lambda value: str(value).replace("/", "-")),
    alone(
        "logger.tensorboard_dir",
        ("tracking",),
        lambda s, value: computed({"tracking": "tensorboard"}),
    ),
    alone("optim", shared.OPTIMIZER, lambda s, value: shared.optimizer(value)),
)

TOOLKIT = Toolkit("openrlhf", "OpenRLHF", (*OWN, *REST), stage_of, defaults)
