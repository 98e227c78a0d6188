"""The groups ``run``, ``tracking`` and ``launch``: where a run lives, how it starts, what it is
logged to, what starts its processes; and the watch, which looks at the reward from outside while a
run trains.
"""

from dataclasses import dataclass
from enum import Enum

from conf.choices import Action, TrackingKind, WandbMode
from conf.options import check, check_options, nested, option


@dataclass(slots=True, kw_only=True)
class RunConfig:
    """Where a run lives and how it starts."""

    name: str = option("default", "Directory inside run.dir that the stages of one project share.")
    dir: str = option("runs", "Root directory of all runs.")
    seed: int = option(0, "Seed of Python, NumPy, torch and every sampler.", at_least=0)
    resume: bool = option(False, "Continue an existing run directory from its last checkpoint.")
    overwrite: bool = option(
        False, "Delete an existing run directory of this stage and start anew."
    )
    dry_run: bool = option(
        False, "Compose, check and print launch, batches, rows and memory; load no weights."
    )
    keep_checkpoints: int = option(
        2, "Newest checkpoints that are kept beside the best one; 0 keeps all.", at_least=0
    )
    phase_timeout_s: float | None = option(
        3600.0,
        "Longest time that a phase of training (rollout, update, save ...) may take before the run "
        "ends as hung; null: no limit.",
        unit="s",
        above=0,
    )

    def __post_init__(self) -> None:
        check_options(self, "run")
        inside = (
            bool(self.name.strip("/."))
            and ".." not in self.name
            and not self.name.startswith(("/", "~"))
            and "\x00" not in self.name
        )
        check(
            inside, "run.name", self.name, "a directory name inside run.dir: relative, without '..'"
        )
        check(
            not (self.resume and self.overwrite),
            "run.overwrite",
            self.overwrite,
            "false when run.resume=true",
        )


@dataclass(slots=True, kw_only=True)
class TrackingConfig:
    """A tracker beside metrics.jsonl, which is always written."""

    kind: TrackingKind = option(TrackingKind.wandb, "The tracker.")
    project: str = option("rlhf", "W&B project.")
    entity: str | None = option(None, "W&B team or user; null: the login's own.")
    group: str | None = option(
        None, "W&B group; null: run.name, or the sweep where there are several jobs."
    )
    tags: list[str] = option([], "W&B tags.")
    mode: WandbMode = option(
        WandbMode.auto, "How W&B logs; auto: online where a login exists, else offline."
    )
    log_model: bool = option(True, "Upload the final model as an artifact.")
    samples_every: int = option(
        10, "Steps between tables of samples; 0: no tables.", unit="steps", at_least=0
    )

    def __post_init__(self) -> None:
        check_options(self, "tracking")


@dataclass(slots=True, kw_only=True)
class WatchConfig:
    """Looks at the reward from outside while it trains; a rule that holds warns or stops the run
    (Gao et al. 2022, arXiv:2210.10760).
    """

    judge_path: str | None = option(
        None,
        "Directory of a second reward model that judges, trained with another seed or on other "
        "pairs; null: no such judge.",
    )
    judge_function: str | None = option(
        None, "pkg.module:function that judges, with the signature of reward.function."
    )
    judge_every: int = option(
        10,
        "Steps between judgements of held-out responses; the start is judged, too.",
        unit="steps",
        at_least=1,
    )
    judge_prompts: int = option(
        64,
        "Held-out prompts of a judgement, the same each time.",
        unit="prompts",
        at_least=2,
    )
    window: int = option(
        10,
        "Steps that a rule looks at: the last ones for length, the first ones for entropy to "
        "compare with.",
        unit="steps",
        at_least=1,
    )
    divergence: Action = option(
        Action.warn, "The score rises and the judge falls; without a judge the rule does nothing."
    )
    divergence_judgements: int = option(
        3,
        "Last judgements over which both trends are measured.",
        unit="judgements",
        at_least=2,
    )
    divergence_sd: float = option(
        2.0,
        "Standard errors over the held-out prompts by which each trend has to differ from 0.",
        unit="standard errors",
        at_least=0,
    )
    kl: Action = option(Action.off, "The KL divergence from the reference exceeds kl_max.")
    kl_max: float = option(50.0, "Limit of the rule kl.", unit="nats per response", above=0)
    length: Action = option(
        Action.warn, "Too many responses are cut off at rollout.max_response_length."
    )
    length_share: float = option(
        0.9, "Share of responses cut off in the window, for the rule length.", above=0, at_most=1
    )
    entropy: Action = option(Action.warn, "The entropy of the policy has collapsed.")
    entropy_share: float = option(
        0.05, "Share of the first steps' entropy, for the rule entropy.", above=0, below=1
    )

    @property
    def has_judge(self) -> bool:
        """Whether held-out prompts are judged."""
        return self.judge_path is not None or self.judge_function is not None

    def __post_init__(self) -> None:
        check_options(self, "stage.watch")
        check(
            self.judge_path is None or self.judge_function is None,
            "stage.watch.judge_function",
            self.judge_function,
            "null beside judge_path",
        )


class LaunchKind(Enum):
    """What starts the ranks and the rollout servers of a run."""

    none = "none"  # nothing: this process is the run, or a rank that somebody else started
    local = "local"  # child processes on this machine
    torchrun = "torchrun"  # torchrun, in place of this process
    slurm = "slurm"  # a job script for sbatch
    ray = "ray"  # tasks and actors of a Ray cluster


class RayStrategy(Enum):
    """How Ray lays the bundles of a placement group over nodes."""

    PACK = "PACK"
    SPREAD = "SPREAD"
    STRICT_PACK = "STRICT_PACK"
    STRICT_SPREAD = "STRICT_SPREAD"


@dataclass(slots=True, kw_only=True)
class SlurmConfig:
    """The job script of launch=slurm."""

    partition: str | None = option(None, "Partition; null: the cluster's default.", filled=True)
    account: str | None = option(None, "Account; null: the user's default.", filled=True)
    qos: str | None = option(None, "Quality of service; null: the account's default.", filled=True)
    time: str | None = option(
        None, "Time limit, such as 12:00:00 or 2-00:00:00; null: the partition's.", filled=True
    )
    gpus: bool = option(
        True, "Ask for a device for each rank, and for those of each server; false: for none."
    )
    cpus_per_rank: int = option(8, "Cores asked for each rank.", unit="cores", at_least=1)
    cpus_per_server: int = option(
        8, "Cores asked for each rollout server.", unit="cores", at_least=1
    )
    signal_s: int = option(
        300,
        "Time before the limit at which the ranks are asked to save and end.",
        unit="s",
        at_least=1,
        at_most=65535,
    )
    extra: list[str] = option(
        [], "Further #SBATCH options, such as --constraint=a100; they go to every component."
    )
    setup: list[str] = option(
        [], "Lines of shell before anything starts, such as module load cuda."
    )
    srun: list[str] = option([], "Further options of every srun, such as --cpu-bind=cores.")
    script: str | None = option(
        None, "Path of the script; null: launch/<stage>.sh in the run's directory.", filled=True
    )
    wait: bool = option(
        False, "Wait until the job has ended, and end with its exit code (sbatch --wait)."
    )

    def __post_init__(self) -> None:
        check_options(self, "launch.slurm")
        for line in self.extra:
            check(
                line.startswith("-") and "\n" not in line,
                "launch.slurm.extra",
                line,
                "an option of sbatch that begins with '-'",
            )


@dataclass(slots=True, kw_only=True)
class RayConfig:
    """The cluster of launch=ray."""

    address: str | None = option(
        None,
        "Address of the cluster, such as auto or ray://head:10001; null: RAY_ADDRESS, else a "
        "cluster that runs on this machine, else a new one here that ends with the run.",
        filled=True,
    )
    strategy: RayStrategy = option(
        RayStrategy.PACK, "How the nodes' bundles are laid over the cluster."
    )
    cpus_per_rank: float = option(1.0, "Cores reserved for each rank.", unit="cores", at_least=0)
    cpus_per_server: float = option(
        1.0, "Cores reserved for each rollout server.", unit="cores", at_least=0
    )
    gpus: bool | None = option(
        None,
        "Reserve a device for each rank, and those of each server; null: where the cluster has "
        "any.",
    )
    wait_s: float = option(
        600.0, "Longest wait until the cluster has room for all processes.", unit="s", above=0
    )
    restarts: int = option(
        0,
        "Times that the run goes on elsewhere, with run.resume=true, after a node was lost.",
        unit="restarts",
        at_least=0,
    )

    def __post_init__(self) -> None:
        check_options(self, "launch.ray")


@dataclass(slots=True, kw_only=True)
class LaunchConfig:
    """What starts the ranks of a training stage and its rollout servers, and where they run. Each
    of them is a process ``python -m rlhf ... launch=none``.
    """

    kind: LaunchKind = option(LaunchKind.none, "What starts the processes.")
    nodes: int = option(1, "Nodes with trainer ranks.", unit="nodes", at_least=1)
    ranks_per_node: int | None = option(
        None,
        "Trainer ranks on each node; null: engine.gpus / nodes, or else one for each device of "
        "this machine that no server takes, or 1 without devices.",
        unit="ranks",
        at_least=1,
    )
    server_nodes: int = option(
        0,
        "Nodes for rollout servers alone, with slurm and ray; 0: servers share the first node of "
        "the ranks.",
        unit="nodes",
        at_least=0,
    )
    host: str | None = option(
        None,
        "launch=torchrun with several nodes: name or address of the first one; null: this "
        "machine's.",
        filled=True,
    )
    port: int = option(
        0,
        "Port at which the ranks meet, on the first one's node; 0: a free one, with slurm one that "
        "follows from the job's number.",
        at_least=0,
        at_most=65535,
    )
    server_port: int = option(
        0,
        "Port of the first rollout server of a node, the next ones count up; 0: as with port.",
        at_least=0,
        at_most=65535,
    )
    cores: list[str] | None = option(
        None,
        "launch=local: cores of each rank, such as ['0-3', '4-7']; null: any.",
        filled=True,
    )
    devices: str | None = option(
        None,
        "launch=local: CUDA devices of the ranks, such as '0,1', one each; null: those that no "
        "server takes.",
        filled=True,
    )
    python: str | None = option(
        None, "Interpreter of the ranks; null: the one of this command.", filled=True
    )
    env: dict[str, str] = option(
        {}, "Environment variables of every process; secrets are refused, export them instead."
    )
    start: bool = option(
        True,
        "Start what is planned; false: only print torchrun's command, or write slurm's script.",
    )
    grace_s: float = option(
        60.0,
        "Time that processes get to save and end, after a signal or another's failure, before "
        "they are killed.",
        unit="s",
        above=0,
    )
    slurm: SlurmConfig = nested(SlurmConfig, section="launch=slurm")
    ray: RayConfig = nested(RayConfig, section="launch=ray")

    def __post_init__(self) -> None:
        check_options(self, "launch")
        if self.kind is LaunchKind.local:
            self._check_one_machine()
        on_nodes = self.kind in (LaunchKind.slurm, LaunchKind.ray)
        check(
            self.server_nodes == 0 or on_nodes,
            "launch.server_nodes",
            self.server_nodes,
            f"0 with launch={self.kind.value}",
        )
        for name, value in (("cores", self.cores), ("devices", self.devices)):
            check(
                value is None or self.kind is LaunchKind.local,
                f"launch.{name}",
                value,
                f"null with launch={self.kind.value}",
            )

    def _check_one_machine(self) -> None:
        check(self.nodes == 1, "launch.nodes", self.nodes, "1 with launch=local")
        known = self.cores is None or self.ranks_per_node in (None, len(self.cores))
        check(
            known,
            "launch.cores",
            self.cores,
            f"an entry for each of launch.ranks_per_node={self.ranks_per_node} ranks",
        )
