"""The options of every stage, a dataclass each; `STAGES` names them. The training stages' are in
conf/training.py and conf/online.py, but those of pairs without a reference; those of stages that
use a finished model in conf/serving.py.
"""

from dataclasses import dataclass
from enum import Enum

from conf.choices import CPOLoss, Dtype
from conf.data import MigrateStage
from conf.judging import EvalRewardStage
from conf.labelling import LabelStage
from conf.methods import SearchStage
from conf.online import OnlineStage
from conf.options import check, check_options, option, same_option
from conf.reward import EvalStage, ServeRewardStage
from conf.run import WatchConfig
from conf.serving import (
    ChatStage,
    GatewayStage,
    RegistryStage,
    ServeRolloutStage,
    ServeStage,
)
from conf.training import (
    LABEL_SMOOTHING,
    KTOStage,
    OfflineStage,
    PreferenceStage,
    RewardStage,
    SFTStage,
    TrainStage,
)

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
    "EvalRewardStage",
    "EvalStage",
    "ExportStage",
    "GGUFType",
    "GatewayStage",
    "KTOStage",
    "LabelStage",
    "MigrateStage",
    "ORPOStage",
    "OfflineStage",
    "OnlineStage",
    "PreferenceStage",
    "RegistryStage",
    "RewardStage",
    "SFTStage",
    "SearchStage",
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


class GGUFType(Enum):
    """Number formats of a GGUF file's matrices; vectors are float32 in all of them."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"  # 8 bits, a float16 scale for every 32 numbers


@dataclass(slots=True, kw_only=True)
class ExportStage:
    """Writes a model for other programs: adapters merged in, safetensors, GGUF, an Ollama
    Modelfile, a model card. Each file is loaded again and answers 20 questions.
    """

    name: str = option("export", _NAME)
    safetensors: bool = option(True, "Write safetensors, which most programs load.")
    dtype: Dtype = option(
        Dtype.auto, "Number format of the safetensors; auto: that of the model's own files."
    )
    gguf: list[GGUFType] = option([], "GGUF files to write, for llama.cpp and Ollama.")
    modelfile: bool = option(
        False,
        "Write a Modelfile for Ollama beside each GGUF file; refused where no template of Ollama "
        "gives what the model's chat template gives.",
    )
    title: str | None = option(
        None, "Name in the card and of the GGUF files; null: run.name.", filled=True
    )
    license: str | None = option(
        None, "Licence of the exported model; null: what its base's files say.", filled=True
    )
    answer_tokens: int = option(
        32, "Longest answer to a question of the check.", unit="tokens", at_least=1
    )
    least_agreement: float = option(
        0.9,
        "Share of answers below which an export in bf16 or q8_0 is warned of.",
        at_least=0,
        at_most=1,
    )

    def __post_init__(self) -> None:
        check_options(self, "stage")
        check(
            self.safetensors or bool(self.gguf),
            "stage.gguf",
            [],
            "at least one type with stage.safetensors=false, or nothing is written",
        )
        check(
            not self.modelfile or bool(self.gguf),
            "stage.modelfile",
            self.modelfile,
            "false without stage.gguf: Ollama reads GGUF files",
        )
        plain = self.title is None or not set(self.title) & set('/\\\n"')
        check(plain, "stage.title", self.title, "a file's name, without slashes and quotes")


@dataclass(slots=True, kw_only=True)
class BoardStage:
    """A web page for all stages: start runs, follow them, look at data, label, chat, export. Runs
    that it starts go on when it ends.
    """

    name: str = option("board", _NAME)
    host: str = option(
        "127.0.0.1",
        "Address to listen on; any other than this machine's own needs token_env.",
        filled=True,
    )
    port: int = option(7860, "Port; 0: any free one.", at_least=0, at_most=65535)
    token_env: str | None = option(
        None,
        "Environment variable with the word that opens the page, as often as one likes; null: a "
        "link is printed that opens it once.",
    )
    hosts: list[str] = option(
        [], "Further names by which browsers reach the page, such as that of a proxy."
    )
    uploads: str | None = option(
        None, "Folder of uploaded files; null: .board/uploads in run.dir.", filled=True
    )
    upload_mib: int = option(
        256,
        "Largest uploaded file; all of them together may have 16 times that.",
        unit="MiB",
        at_least=1,
    )
    folders: list[str] = option(
        [], "Further folders whose files and models the page may name, beside run.dir and uploads."
    )
    at_once: int = option(
        1, "Runs at once where there is no GPU; each GPU has one at a time.", at_least=1
    )
    trust_remote_code: bool = option(
        False, "Let the page set model.trust_remote_code, which runs code out of a model's files."
    )

    def __post_init__(self) -> None:
        check_options(self, "stage")


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
    findings: str | None = option(
        None, "File for the findings as JSON, beside the table; null: none.", filled=True
    )


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
    "eval_reward": EvalRewardStage,
    "export": ExportStage,
    "chat": ChatStage,
    "serve": ServeStage,
    "serve_reward": ServeRewardStage,
    "serve_rollout": ServeRolloutStage,
    "registry": RegistryStage,
    "gateway": GatewayStage,
    "data": DataStage,
    "label": LabelStage,
    "migrate": MigrateStage,
    "board": BoardStage,
    "doctor": DoctorStage,
    "chain": ChainStage,
    "search": SearchStage,
}

# What the stages are for, in the order in which a project needs them; each schema is in one family.
FAMILIES: dict[str, tuple[str, ...]] = {
    "prepare": ("migrate", "data", "label"),
    "train": ("sft", "reward", "dpo", "kto", "cpo", "orpo"),
    "online": ("ppo",),
    "judge": ("eval", "eval_reward"),
    "use": ("export", "chat", "serve"),
    "keep and ask": ("registry", "gateway"),
    "serve": ("serve_reward", "serve_rollout"),
    "run and look": ("board", "chain", "search", "doctor"),
}

_OFFLINE = ("run", "model", "adapter", "engine", "data", "tracking", "launch")
_SCORED = ("run", "model", "engine", "rollout", "reward", "data", "tracking")

# The groups that matter to a stage: what its --help shows. chain, search and doctor may need any of
# them.
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
    "eval": (*_SCORED, "environment", "tasks"),
    "eval_reward": ("run", "reward", "tracking"),
    "export": ("run", "model", "data", "tracking"),
    "chat": ("run", "model", "rollout", "environment", "data"),
    "serve": ("run", "model", "rollout", "data"),
    "serve_reward": ("run", "model", "engine", "reward", "tracking"),
    "serve_rollout": ("run", "model", "adapter", "rollout", "environment", "data", "tracking"),
    "registry": ("run", "model", "tracking"),
    "gateway": ("run",),
    "migrate": ("run", "migrate"),
    "board": ("run",),
    "data": ("run", "model", "reward", "data", "tracking"),
    "label": (*_SCORED, "label"),
}
