"""The runs that benchmarks.chaos breaks, and what a fault is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from rlhf.process import checkpoints
from rlhf.run.directory import CHECKPOINTS

STEPS, EVERY = 6, 2  # steps of a run, and between its checkpoints
KILLED = -9
_MODEL = (
    "model=tiny",
    "model.tiny.vocab_size=300",
    "model.tiny.hidden_size=32",
    "model.tiny.intermediate_size=48",
    "model.tiny.layers=2",
    "model.tiny.heads=1",
    "model.tiny.max_positions=64",
    "model.dtype=float32",
    "engine.threads=1",
    f"stage.steps={STEPS}",
)
_PPO = (
    "stage=ppo",
    *_MODEL,
    "data.max_prompt_length=32",
    "rollout.max_response_length=4",
    "reward.function=benchmarks.chaos.child:even_tokens",
    "stage.critic_init=policy",
    "stage.prompts_per_step=8",
    "stage.reward_normalise=true",
    "stage.kl_controller=adaptive",
    f"stage.save_steps={EVERY}",
)


# a request, or an update, that is not answered so long is taken for hung
_SERVER = (
    "rollout=server",
    "rollout.kv_cache_gib=0.05",
    "rollout.server.threads=1",
    "rollout.server.request_limit_s=20",
    "rollout.sync_limit_s=30",
)
# of a server by itself
SERVED = (
    "model.dtype=float32",
    "data.max_prompt_length=32",
    "rollout.max_response_length=4",
    *_SERVER,
)


class Kind(Enum):
    """What is run: the options of a straight run, its data file, its ranks, and the cores that it
    needs where these are not as many.
    """

    ppo = ((*_PPO, "rollout=hf"), "prompts.jsonl", 1)
    ranks = ((*_PPO, "rollout=hf", "engine=zero1"), "prompts.jsonl", 2)
    vllm = ((*_PPO, "rollout=vllm", "rollout.kv_cache_gib=0.05"), "prompts.jsonl", 1)
    server = ((*_PPO, *_SERVER), "prompts.jsonl", 1, 2)
    ahead = ((*_PPO, *_SERVER, "stage.ahead=1"), "prompts.jsonl", 1, 2)
    sft = (
        (
            "stage=sft",
            *_MODEL,
            "stage.batch_size=8",
            "stage.max_length=48",
            f"stage.eval_steps={EVERY}",
        ),
        "texts.jsonl",
        1,
    )

    def __init__(self, options: tuple[str, ...], data: str, count: int, cores: int = 0) -> None:
        self.options, self.data, self.count = options, data, count
        self.cores = cores or count

    @property
    def stage(self) -> str:
        return self.options[0].removeprefix("stage=")


class Disk(Enum):
    """The tmpfs that a run directory lies on."""

    small = "too small for the second checkpoint"
    roomy = "with room for everything"
    sealed = "read-only from the start"
    full = "full once the configuration is written"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong, and how the process then has to end."""

    name: str
    code: int  # of the process that is started: with several ranks torchrun's
    point: str = ""
    times: int = 0
    action: str = ""
    rank: int = 0
    kind: Kind = Kind.ppo
    options: tuple[str, ...] = ("tracking=none",)
    environment: dict[str, str] = field(default_factory=dict)
    disk: Disk | None = None
    after: Callable[[Path], None] | None = None  # done to the run directory before the resume
    says: str = ""  # what has to be read in the process's output (a regular expression, as `cause`)
    cause: str = ""  # what has to be read in torchrun's last lines, after "Root Cause"
    same: int = STEPS  # up to which step the figures are those of the straight run
    lost: int = EVERY  # steps taken again, at most
    dumped: bool = False  # the batch that was refused has to lie in the run directory
    link: bool = False  # the server is on another host, which can be cut off


def tear_newest(run: Path) -> None:
    """The newest checkpoint loses half of its largest file."""
    _, newest = checkpoints.numbered(run / CHECKPOINTS)[0]
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
