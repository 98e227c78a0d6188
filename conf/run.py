"""The groups ``run`` and ``tracking``: where a run lives, how it starts, what it is logged to; and
the watch, which looks at the reward from outside while a run trains.
"""

from dataclasses import dataclass

from conf.choices import Action, TrackingKind, WandbMode
from conf.options import check, check_options, option


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
