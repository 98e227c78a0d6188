"""The whole configuration, and the rules over several groups that more than one package follows.
Each group's options are in a module:

    run, tracking, launch             conf/run.py
    model, engine, rollout            conf/model.py
    adapter                           conf/adapters.py, conf/methods.py
    reward, environment               conf/reward.py
    data, migrate                     conf/data.py, conf/preparation/
    label, tasks                      conf/labelling.py
    stage                             conf/stages.py, conf/training.py, conf/online.py,
                                      conf/schedule.py, conf/methods.py (search)

Conventions of all of them: every field is an ``option(...)`` (conf/options.py); ``slots`` and
``kw_only``, so that OmegaConf refuses unknown keys (also those added with ``+``); enumerations
instead of ``Literal``, which OmegaConf refuses; relations between options in ``__post_init__``, so
that a bad value is reported before anything loads. ``None`` always means "not set". Standard
library only.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any, TypeVar

from conf import published
from conf.adapters import AdapterConfig, facts_of
from conf.choices import AdapterKind, Advantage, Carrier, LoraSync, RolloutBackend
from conf.data import DataConfig, GymConfig, MigrateConfig, SourceConfig
from conf.labelling import LabelConfig, TaskConfig
from conf.model import EngineConfig, ModelConfig, RolloutConfig, TinyConfig
from conf.online import OnlineStage
from conf.options import MISSING, check, nested, option
from conf.reward import EnvironmentConfig, RewardConfig, RewardTerm
from conf.run import LaunchConfig, RunConfig, TrackingConfig
from conf.training import TrainStage

__all__ = [
    "GROUPS",
    "ITEM_GROUPS",
    "MISSING",
    "AdapterConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "EnvironmentConfig",
    "GymConfig",
    "LabelConfig",
    "LaunchConfig",
    "MigrateConfig",
    "ModelConfig",
    "RewardConfig",
    "RewardTerm",
    "RolloutConfig",
    "RunConfig",
    "SourceConfig",
    "TaskConfig",
    "TinyConfig",
    "TrackingConfig",
    "asked_tokens",
    "facts_of",
]

_Stage = TypeVar("_Stage")
_OTHER_STAGES = ("chain", "search", "doctor")  # options of the stages that they start or plan


@dataclass(slots=True, kw_only=True)
class Config:
    """The whole configuration; ``stage`` holds one of the stage dataclasses."""

    # Any, since OmegaConf takes neither a union of dataclasses nor a type variable; functions that
    # need a certain stage call `stage_as`.
    stage: Any = option(MISSING, "The stage and its options (conf/stages.py).")
    run: RunConfig = nested(RunConfig)
    model: ModelConfig = nested(ModelConfig)
    adapter: AdapterConfig = nested(AdapterConfig)
    engine: EngineConfig = nested(EngineConfig)
    rollout: RolloutConfig = nested(RolloutConfig)
    environment: EnvironmentConfig = nested(EnvironmentConfig)
    reward: RewardConfig = nested(RewardConfig)
    data: DataConfig = nested(DataConfig)
    label: LabelConfig = nested(LabelConfig)
    tasks: dict[str, TaskConfig] = option(
        {}, "What stage=eval measures policies on, by name; task=[NAME,NAME] takes presets."
    )
    migrate: MigrateConfig = nested(MigrateConfig)
    tracking: TrackingConfig = nested(TrackingConfig)
    launch: LaunchConfig = nested(LaunchConfig)

    def __post_init__(self) -> None:
        """Learning rates that are left out become the published ones for stage and adapter."""
        for name, task in self.tasks.items():
            task.check(f"tasks.{name}")
        self._check_tokens()
        published.fill(self.stage, self.adapter.kind)

    def _check_tokens(self) -> None:
        added = asked_tokens(self.model)
        once = all(added) and len(set(added)) == len(added)
        check(once, "model.add_tokens", added, "texts that are not empty, each of them once")
        stage = getattr(self.stage, "name", None)
        taken = isinstance(self.stage, TrainStage) or stage in (None, *_OTHER_STAGES)
        check(
            taken or not added,
            "model.add_tokens",
            added,
            f"none with stage={stage}: a stage that trains adds them, and its model has them",
        )

    def stage_as(self, kind: type[_Stage]) -> _Stage:
        """The stage's options, typed. Raises TypeError for a stage of another kind."""
        if not isinstance(self.stage, kind):
            raise TypeError(f"expected a {kind.__name__}, not a {type(self.stage).__name__}")
        return self.stage


# The groups with presets in conf/<group>/, beside `stage` and `experiment`.
GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "adapter": AdapterConfig,
    "engine": EngineConfig,
    "rollout": RolloutConfig,
    "environment": EnvironmentConfig,
    "reward": RewardConfig,
    "data": DataConfig,
    "tracking": TrackingConfig,
    "launch": LaunchConfig,
}

# Groups whose presets fill items of a dictionary of `Config`; several are chosen as a list.
ITEM_GROUPS: dict[str, type] = {"task": TaskConfig}


def asked_tokens(model: ModelConfig) -> list[str]:
    """The tokens that the tokenizer gets."""
    return [*model.add_tokens, *model.add_special_tokens]


def generator_of(backend: RolloutBackend) -> RolloutBackend:
    """What writes the responses: `auto` is vLLM where it is installed, else Hugging Face generate.

    Raises ValueError, whose message names the option, when vLLM is asked for and missing.
    """
    if backend in (RolloutBackend.hf, RolloutBackend.server):
        return backend
    if importlib.util.find_spec("vllm") is not None:
        return RolloutBackend.vllm
    if backend is RolloutBackend.auto:
        return RolloutBackend.hf
    raise ValueError(
        "rollout=vllm, but vLLM is not installed: `pip install 'rlhf-toolkit[cpu]'` on a machine "
        "without a GPU, `pip install 'rlhf-toolkit[cuda]'` with one. Set rollout=hf for Hugging "
        "Face generate, or rollout=auto to take what is there."
    )


# vllm.config.lora.MaxLoRARanks of vLLM 0.32, which takes 20 s to import
VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def carrier_of(rollout: RolloutConfig, adapter: AdapterConfig) -> Carrier:
    """How the policy's weights go to the generator. ``rollout.lora_sync=merged`` has low-rank
    updates merged into whole weights before; ``auto`` leaves it to the method.
    """
    carrier = facts_of(adapter).carrier
    if carrier is Carrier.lora and rollout.lora_sync is LoraSync.merged:
        return Carrier.merged
    return carrier


def critic_adapter(stage: OnlineStage, adapter: AdapterConfig) -> AdapterConfig:
    """What trains of a critic: all weights, or with stage.critic_adapter a LoRA adapter in the
    policy's shape, whatever the policy's own method is.
    """
    if not stage.critic_adapter:
        return AdapterConfig()
    return AdapterConfig(
        kind=AdapterKind.lora,
        rank=adapter.rank,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        targets=adapter.targets,
        rslora=adapter.rslora,
        dora=adapter.dora,
        quantize=adapter.quantize,
        double_quantize=adapter.double_quantize,
    )


def vllm_lora_rank(rank: int, wished: int | None, given: str | None = None) -> int:
    """vLLM's max_lora_rank for an adapter of `rank`: `wished` (rollout.max_lora_rank), or the
    smallest that vLLM takes and that holds it. given: the option that gives that rank, for
    messages, where it is not adapter.rank.

    Raises ValueError, whose message names the option, where vLLM takes no such rank.
    """
    given = given or f"adapter.rank={rank}"
    holding = [taken for taken in VLLM_LORA_RANKS if taken >= rank]
    if not holding:
        ranks = ", ".join(map(str, VLLM_LORA_RANKS))
        raise ValueError(
            f"{given} is above every LoRA rank that vLLM takes ({ranks}). "
            "Lower it, or set rollout.lora_sync=merged."
        )
    if wished is None:
        return holding[0]
    if wished not in holding:
        raise ValueError(
            f"rollout.max_lora_rank={wished}: with {given} vLLM takes one of "
            f"{', '.join(map(str, holding))}. Set rollout.max_lora_rank={holding[0]}, or null."
        )
    return wished


def wants_shared_prompts(engine: EngineConfig, stage: OnlineStage) -> bool:
    """Whether the responses to a prompt are packed behind one copy of it, if the model can.

    A critic values each token by itself, a single response shares its prompt with none, and ranks
    that share rows attend without masks.
    """
    if engine.share_prompts is False or stage.advantage is Advantage.gae:
        return False
    if engine.sequence_parallel > 1:
        return False
    return stage.samples_per_prompt > 1
