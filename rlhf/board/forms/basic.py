"""What a form shows first, and in which order; everything else stands folded below.

A key is a dotted option, or a group whose preset is chosen (``adapter``).
"""

from rlhf.cli.presets import choices, stage_schema

_WHERE = ("run.name", "model.path")
_ROWS = ("data.path", "data.eval_path")
_OFFLINE = (
    *_WHERE,
    *_ROWS,
    "adapter",
    "adapter.rank",
    "stage.epochs",
    "stage.batch_size",
    "stage.learning_rate",
    "stage.max_length",
    "tracking",
)

# By the name of a stage's schema.
BASIC: dict[str, tuple[str, ...]] = {
    "sft": _OFFLINE,
    "reward": _OFFLINE,
    "dpo": (*_OFFLINE, "stage.beta"),
    "kto": (*_OFFLINE, "stage.beta"),
    "cpo": (*_OFFLINE, "stage.beta"),
    "orpo": (*_OFFLINE, "stage.beta"),
    "ppo": (
        *_WHERE,
        "data.path",
        "reward",
        "reward.path",
        "adapter",
        "stage.steps",
        "stage.prompts_per_step",
        "stage.samples_per_prompt",
        "rollout.max_response_length",
        "stage.kl_coef",
        "stage.learning_rate",
        "tracking",
    ),
    "eval": (
        "run.name",
        "stage.before",
        "stage.after",
        "data.path",
        "reward.path",
        "stage.judges",
        "stage.prompts",
        "stage.samples_per_prompt",
        "rollout.max_response_length",
        "tracking",
    ),
    "eval_reward": (
        "run.name",
        "reward.path",
        "stage.models",
        "stage.pairs",
        "stage.samples",
        "stage.judge",
        "tracking",
    ),
    "data": (
        "run.name",
        "data.path",
        "data.format",
        "data.columns",
        "data.kind",
        "data.pipeline",
        "data.to",
        "data.report",
    ),
    "label": (
        "run.name",
        "label.mode",
        "data.path",
        "label.policies",
        "model.path",
        "label.kind",
        "label.responses",
        "label.budget",
        "label.targets",
        "label.title",
        "label.files",
    ),
    "serve": (
        *_WHERE,
        "stage.model_name",
        "stage.adapters",
        "stage.port",
        "data.max_prompt_length",
        "rollout.max_response_length",
    ),
    "export": (
        *_WHERE,
        "stage.safetensors",
        "stage.dtype",
        "stage.gguf",
        "stage.modelfile",
        "stage.title",
        "stage.license",
    ),
}

# What choosing means to somebody who knows none of the words: key -> terms of the glossary.
TERMS: dict[str, tuple[str, ...]] = {
    "model.path": ("model",),
    "data.path": ("row",),
    "data.eval_path": ("held_out",),
    "adapter": ("lora",),
    "adapter.rank": ("rank",),
    "stage.epochs": ("epoch",),
    "stage.steps": ("step",),
    "stage.batch_size": ("batch",),
    "stage.learning_rate": ("learning_rate",),
    "stage.max_length": ("token",),
    "stage.beta": ("reference",),
    "stage.kl_coef": ("kl",),
    "stage.prompts_per_step": ("prompt", "rollout"),
    "stage.samples_per_prompt": ("sample",),
    "rollout.max_response_length": ("token",),
    "reward": ("reward",),
    "reward.path": ("reward_model",),
    "reward.terms": ("reward",),
    "tracking": ("tracking",),
    "stage.judges": ("judge",),
    "stage.models": ("reward_model",),
    "stage.judge": ("judge",),
    "label.policies": ("policy",),
    "label.targets": ("annotator",),
    "stage.adapters": ("lora",),
    "stage.gguf": ("gguf",),
    "stage.dtype": ("dtype",),
    "data.pipeline": ("pipeline",),
    "stage.gamma": ("discount",),
    "engine": ("zero",),
}


def stages() -> list[str]:
    """The stages that have forms, presets of algorithms included."""
    return [name for name in choices("stage") if stage_schema(name) in BASIC]
