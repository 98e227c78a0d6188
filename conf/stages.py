"""The options of every stage, a dataclass each. Those of training stages are in conf/training.py
and conf/online.py, and are found here, too.
"""

from dataclasses import dataclass, field

from conf.checks import check
from conf.choices import Judge
from conf.online import OnlineStage, WatchConfig
from conf.training import (
    CPOStage,
    KTOStage,
    OfflineStage,
    ORPOStage,
    PreferenceStage,
    RewardStage,
    SFTStage,
    TrainStage,
)

__all__ = [
    "STAGES",
    "CPOStage",
    "ChainStage",
    "DataStage",
    "DoctorStage",
    "EvalStage",
    "KTOStage",
    "LabelStage",
    "ORPOStage",
    "OfflineStage",
    "OnlineStage",
    "PreferenceStage",
    "RewardStage",
    "SFTStage",
    "ServeRewardStage",
    "TrainStage",
    "WatchConfig",
]


@dataclass(slots=True, kw_only=True)
class EvalStage:
    """Two policies on the same held-out prompts: reward model, outside judges, KL, length,
    diversity.
    """

    name: str = "eval"
    before: str | None = None  # model directory of the starting policy
    after: str | None = None  # model directory of the trained policy
    prompts: int = 256
    samples_per_prompt: int = 1
    # the most likely token each time instead of sampling; KL is then along these responses
    greedy: bool = False
    judges: list[Judge] = field(default_factory=list)
    judge_path: str | None = None  # labelled texts (text, label) that train the classifier judge
    judge_function: str | None = None  # pkg.module:function for the function judge
    bootstrap: int = 1000
    shown: int = 4  # samples side by side

    def __post_init__(self) -> None:
        check(self.prompts >= 2, "stage.prompts", self.prompts, "at least 2")
        check(
            self.samples_per_prompt >= 1,
            "stage.samples_per_prompt",
            self.samples_per_prompt,
            "at least 1",
        )
        check(
            not self.greedy or self.samples_per_prompt == 1,
            "stage.samples_per_prompt",
            self.samples_per_prompt,
            "1 with greedy=true, whose responses are all the same",
        )
        check(self.bootstrap >= 1, "stage.bootstrap", self.bootstrap, "at least 1")
        check(self.shown >= 0, "stage.shown", self.shown, "at least 0")


@dataclass(slots=True, kw_only=True)
class ServeRewardStage:
    """Serves the reward model of reward.path over HTTP, for reward terms of kind remote."""

    name: str = "serve_reward"
    host: str = "127.0.0.1"  # address to bind to; any other than this machine's own needs token_env
    port: int = 8100  # 0: any free one
    # environment variable that holds the bearer token; None: one is made and printed at the start
    token_env: str | None = None
    # items in one request, and items of several requests that the model scores together
    max_batch: int = 256
    max_body_mib: float = 16.0  # MiB of one request
    # requests that wait for the model; more are sent away with 503 and Retry-After
    max_waiting: int = 64
    grace_s: int = 30  # seconds that open requests get after SIGTERM or Ctrl-C
    log_every_s: float = 10.0  # seconds between lines of metrics.jsonl

    def __post_init__(self) -> None:
        own = self.host in ("127.0.0.1", "localhost", "::1")
        check(bool(self.host), "stage.host", self.host, "an address, such as 127.0.0.1")
        check(
            own or self.token_env is not None,
            "stage.token_env",
            self.token_env,
            f"the name of an environment variable with stage.host={self.host}",
        )
        check(0 <= self.port <= 65535, "stage.port", self.port, "in [0, 65535]")
        check(self.max_batch >= 1, "stage.max_batch", self.max_batch, "at least 1 item")
        check(self.max_body_mib > 0, "stage.max_body_mib", self.max_body_mib, "above 0 MiB")
        check(self.max_waiting >= 1, "stage.max_waiting", self.max_waiting, "at least 1 request")
        check(self.grace_s >= 1, "stage.grace_s", self.grace_s, "at least 1 second")
        check(self.log_every_s > 0, "stage.log_every_s", self.log_every_s, "above 0 seconds")


@dataclass(slots=True, kw_only=True)
class DataStage:
    """Reads rows of any format, runs the steps of data.pipeline over them, writes what the training
    stages read; its options are the data group's.
    """

    name: str = "data"


@dataclass(slots=True, kw_only=True)
class LabelStage:
    """Pairs and rankings for people to judge (label.mode=export), and their labels back as
    preference data (label.mode=import).
    """

    name: str = "label"


@dataclass(slots=True, kw_only=True)
class DoctorStage:
    """Versions, devices, memory, engines: usable, or why not."""

    name: str = "doctor"
    plan: str = "ppo"  # the training stage whose memory is planned: ppo, grpo, sft, dpo, reward ...


@dataclass(slots=True, kw_only=True)
class ChainStage:
    """Runs other stages one after the other, each in a process of its own, with the same
    overrides.
    """

    name: str = "chain"
    stages: list[str] = field(default_factory=lambda: ["sft", "reward", "ppo", "eval"])

    def __post_init__(self) -> None:
        check(len(self.stages) > 0, "stage.stages", self.stages, "at least one stage")


STAGES: dict[str, type] = {
    "sft": SFTStage,
    "reward": RewardStage,
    "dpo": PreferenceStage,
    "kto": KTOStage,
    "cpo": CPOStage,
    "orpo": ORPOStage,
    "ppo": OnlineStage,
    "eval": EvalStage,
    "serve_reward": ServeRewardStage,
    "data": DataStage,
    "label": LabelStage,
    "doctor": DoctorStage,
    "chain": ChainStage,
}
