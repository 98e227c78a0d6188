"""The options of every stage, a dataclass each; `STAGES` names them. The training stages' are in
conf/training.py and conf/online.py, but those of pairs without a reference; those that use a model
in conf/using.py and conf/board.py.
"""

import re
from dataclasses import dataclass

from conf.board import BoardStage
from conf.choices import CPOLoss
from conf.labelling import LabelStage
from conf.online import OnlineStage
from conf.options import check, check_options, option, same_option
from conf.reward import EvalStage, ServeRewardStage
from conf.run import WatchConfig
from conf.training import (
    LABEL_SMOOTHING,
    KTOStage,
    OfflineStage,
    PreferenceStage,
    RewardStage,
    SFTStage,
    TrainStage,
)
from conf.using import ChatStage, ExportStage, GGUFType, ServeRolloutStage, ServeStage

__all__ = [
    "FAMILIES",
    "GROUPS_OF",
    "STAGES",
    "BoardStage",
    "CPOStage",
    "ChainStage",
    "ChatStage",
    "DataStage",
    "DoctorStage",
    "EvalStage",
    "ExportStage",
    "GGUFType",
    "KTOStage",
    "LabelStage",
    "MigrateConfig",
    "MigrateStage",
    "ORPOStage",
    "OfflineStage",
    "OnlineStage",
    "PreferenceStage",
    "RewardStage",
    "SFTStage",
    "ServeRewardStage",
    "ServeRolloutStage",
    "ServeStage",
    "TrainStage",
    "WatchConfig",
]


_NAME = "Name of the preset; stage=NAME sets it."


@dataclass(slots=True, kw_only=True)
class CPOStage(OfflineStage):
    """Preference optimisation from pairs without a reference, on TRL's CPOTrainer: CPO and
    SimPO.
    """

    name: str = same_option(TrainStage, "name", "cpo")
    loss: CPOLoss = option(CPOLoss.sigmoid, "The loss.", section="the loss")
    beta: float = option(
        0.1,
        "Scale of the log-probabilities' difference; with ipo the paper's tau.",
        above=0,
    )
    nll_coef: float = option(
        1.0,
        "Weight of the chosen answers' negative log-likelihood per token.",
        at_least=0,
    )
    gamma: float = option(0.0, "simpo: the target margin between the scaled rewards.", at_least=0)
    label_smoothing: float = option(
        0.0, f"{LABEL_SMOOTHING} (sigmoid, simpo).", at_least=0, below=0.5
    )

    def check_relations(self) -> None:
        check(
            self.loss is CPOLoss.simpo or self.gamma == 0,
            "stage.gamma",
            self.gamma,
            f"0 with loss={self.loss.value}: only simpo has a target margin",
        )
        check(
            self.loss in (CPOLoss.sigmoid, CPOLoss.simpo) or self.label_smoothing == 0,
            "stage.label_smoothing",
            self.label_smoothing,
            f"0 with loss={self.loss.value}: only sigmoid and simpo read it",
        )


@dataclass(slots=True, kw_only=True)
class ORPOStage(OfflineStage):
    """Fine-tuning and preference in one loss, from pairs without a reference, on TRL's
    ORPOTrainer.
    """

    name: str = same_option(TrainStage, "name", "orpo")
    beta: float = option(
        0.1,
        "Weight of the odds-ratio term, the paper's lambda.",
        above=0,
        section="the loss",
    )


@dataclass(slots=True, kw_only=True)
class DataStage:
    """Reads rows of any format, runs the steps of data.pipeline over them, writes what the training
    stages read; its options are the data group's.
    """

    name: str = option("data", _NAME)


@dataclass(slots=True, kw_only=True)
class DoctorStage:
    """Versions, devices, memory, engines: usable, or why not."""

    name: str = option("doctor", _NAME)
    plan: str = option(
        "ppo", "Training stage whose memory is planned: ppo, grpo, sft, dpo, reward ..."
    )


@dataclass(slots=True, kw_only=True)
class MigrateConfig:
    """Which file of another toolkit ``stage=migrate`` reads, and what the file doesn't say."""

    path: str | None = option(
        None, "A YAML or JSON file, or a script with a command line.", filled=True
    )
    toolkit: str | None = option(
        None,
        "Whose file it is; null: by its keys or its command.",
        choices=("llama_factory", "swift", "axolotl", "trl", "openrlhf"),
    )
    number: int | None = option(
        None,
        "Which command of a script with several, counted from 1; null: the only one.",
        at_least=1,
    )
    stage: str | None = option(
        None, "The stage that it is for; null: as the file says.", filled=True
    )
    ranks: int | None = option(
        None,
        "Ranks that trained; null: as the launcher or the devices in the file say, else 1.",
        unit="ranks",
        at_least=1,
    )
    rows: int | None = option(
        None,
        "Rows of the training data, for what counts in epochs there and in steps here; null: such "
        "keys are not possible.",
        unit="rows",
        at_least=1,
    )
    name: str | None = option(None, "Name of the experiment; null: the file's.", filled=True)
    out: str | None = option(
        None,
        "Folder that gets experiment/NAME.yaml and NAME.md; null: migrated in run.dir.",
        filled=True,
    )

    def __post_init__(self) -> None:
        check_options(self, "migrate")
        named = self.name is None or re.fullmatch(r"[\w-]+", self.name) is not None
        check(named, "migrate.name", self.name, "letters, digits, _ and -")


@dataclass(slots=True, kw_only=True)
class MigrateStage:
    """Another toolkit's configuration as an experiment; its options are the migrate group's."""

    name: str = option("migrate", _NAME)


@dataclass(slots=True, kw_only=True)
class ChainStage:
    """Runs other stages one after the other, each in a process of its own, with the same
    overrides.
    """

    name: str = option("chain", _NAME)
    stages: list[str] = option(
        ["sft", "reward", "ppo", "eval"], "Stages in their order.", filled=True
    )

    def __post_init__(self) -> None:
        check_options(self, "stage")


# Name of the schema -> options. A preset in conf/stage/ builds on one of them: grpo on ppo's.
STAGES: dict[str, type] = {
    "sft": SFTStage,
    "reward": RewardStage,
    "dpo": PreferenceStage,
    "kto": KTOStage,
    "cpo": CPOStage,
    "orpo": ORPOStage,
    "ppo": OnlineStage,
    "eval": EvalStage,
    "export": ExportStage,
    "chat": ChatStage,
    "serve": ServeStage,
    "serve_reward": ServeRewardStage,
    "serve_rollout": ServeRolloutStage,
    "data": DataStage,
    "label": LabelStage,
    "migrate": MigrateStage,
    "board": BoardStage,
    "doctor": DoctorStage,
    "chain": ChainStage,
}

# What the stages are for, in the order in which a project needs them; each schema is in one family.
FAMILIES: dict[str, tuple[str, ...]] = {
    "prepare": ("migrate", "data", "label"),
    "train": ("sft", "reward", "dpo", "kto", "cpo", "orpo"),
    "online": ("ppo",),
    "judge": ("eval",),
    "use": ("export", "chat", "serve"),
    "serve": ("serve_reward", "serve_rollout"),
    "run and look": ("board", "chain", "doctor"),
}

_OFFLINE = ("run", "model", "adapter", "engine", "data", "tracking", "launch")

# The groups that matter to a stage: what its --help shows. chain and doctor may need any of them.
GROUPS_OF: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(FAMILIES["train"], _OFFLINE),
    "ppo": (
        "run",
        "model",
        "adapter",
        "engine",
        "rollout",
        "environment",
        "reward",
        "data",
        "tracking",
        "launch",
    ),
    "eval": ("run", "model", "engine", "rollout", "environment", "reward", "data", "tracking"),
    "export": ("run", "model", "data", "tracking"),
    "chat": ("run", "model", "rollout", "environment", "data"),
    "serve": ("run", "model", "rollout", "data"),
    "serve_reward": ("run", "model", "engine", "reward", "tracking"),
    "serve_rollout": ("run", "model", "adapter", "rollout", "environment", "data", "tracking"),
    "migrate": ("run", "migrate"),
    "board": ("run",),
    "data": ("run", "model", "reward", "data", "tracking"),
    "label": ("run", "model", "engine", "rollout", "reward", "data", "label", "tracking"),
}
