"""The groups ``run`` and ``tracking``: where a run lives, how it starts, what it is logged to."""

from dataclasses import dataclass

from conf.choices import TrackingKind, WandbMode
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
