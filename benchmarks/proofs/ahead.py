"""The proof that stale responses cost nothing: GRPO from one start with stage.ahead 0, 1 and 2,
after as many steps, seed by seed; on sums with a verifier, and on movie reviews with a reward
model.

python -m benchmarks.proofs.ahead --seeds 0 1 2      runs and checks
python -m benchmarks.proofs.ahead --tasks reviews    one of the two
python -m benchmarks.proofs.ahead --check-only       checks the runs that are there
python -m benchmarks.proofs.ahead stage.steps=40     further arguments are options: those of the
                                                     stage of GRPO, others (rollout=hf) of all

The learning rate is a third of that of the two experiments: at 3e-4 a step moves some tokens by
several nats, and what is two steps old teaches nothing (docs/project/proofs.md).

What all start from lies in <runs>/proof-ahead-<task>-<seed>, the others in
<runs>/proof-ahead-<task>-<seed>-<ahead>/grpo and eval.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.proofs.common import Check, MissingRun, Run, read_run, report
from benchmarks.shared import exit_code, module

NAME = "proof-ahead"
AHEAD = (0, 1, 2)
STEPS, LEARNING_RATE = 120, 1e-4
SCORE = "objective/scores"


@dataclass(frozen=True, slots=True)
class Task:
    """What is learned, and how much of it staleness may cost."""

    experiment: str
    base: tuple[str, ...]  # stages that all start from
    figure: str  # of the evaluation
    most_lost: float  # of it, in one seed
    most_lost_mean: float  # over the seeds
    most_lost_score: float | None  # of the mean score of all steps; None: it has no scale
    judges: tuple[str, ...] = ()  # whose intervals have to be above 0


TASKS = {
    # Shares of held-out sums. 256 of them have a standard error of 3 points at one half, and of 1
    # at 0.97.
    "arithmetic": Task("arithmetic", ("sft",), "eval/function_after", 0.05, 0.03, 0.05),
    # Standard deviations of the SFT policy's scores; 256 prompts have a standard error of 0.06.
    "reviews": Task(
        "reviews",
        ("sft", "reward"),
        "eval/score_shift_sd",
        0.25,
        0.12,
        None,
        ("lexicon", "classifier"),
    ),
}


@dataclass(frozen=True, slots=True)
class Compared:
    """What one run of GRPO came to."""

    figure: float  # the task's
    score: float  # mean over all steps: how fast it learned
    staleness: float  # versions, the largest of all steps
    ess: float  # the smallest of all steps; 1 without stale tokens
    step_s: float  # median
    judged: dict[str, float]  # lower bounds of the judges' differences


@dataclass(frozen=True, slots=True)
class ProofRuns:
    """Where the runs of one task and seed lie, and their commands."""

    runs: Path
    task: Task
    seed: int
    overrides: tuple[str, ...] = ()

    @property
    def base(self) -> str:
        return f"{NAME}-{self.task.experiment}-{self.seed}"

    def name(self, ahead: int) -> str:
        return f"{self.base}-{ahead}"

    def command(self, stage: str, name: str, *options: str) -> list[str]:
        shared = [f"experiment={self.task.experiment}", f"run.seed={self.seed}"]
        shared += [f"run.dir={self.runs}", f"run.name={name}", "run.overwrite=true"]
        given = [item for item in self.overrides if not item.startswith("stage.")]
        return module("rlhf", f"stage={stage}", *shared, "tracking=none", *options, *given)

    def commands(self) -> Iterator[list[str]]:
        """What all start from once, then GRPO and its evaluation for each `AHEAD`."""
        for stage in self.task.base:
            yield self.command(stage, self.base)
        folder = self.runs / self.base
        given = [f"model.path={folder}/sft/model", "data.recipe=none"]
        if "reward" in self.task.base:
            given.append(f"reward.path={folder}/reward/model")
        trained = [f"stage.steps={STEPS}", f"stage.learning_rate={LEARNING_RATE}"]
        trained += [item for item in self.overrides if item.startswith("stage.")]
        for ahead in AHEAD:
            name = self.name(ahead)
            rows = f"data.path={folder}/recipe/prompts.jsonl"
            yield self.command("grpo", name, *given, rows, f"stage.ahead={ahead}", *trained)
            judged = [f"data.eval_path={folder}/recipe/prompts_eval.jsonl"]
            judged.append(f"stage.before={folder}/sft/model")
            judged.append(f"stage.after={self.runs / name}/grpo/model")
            if self.task.judges:
                judged.append(f"stage.judge_path={folder}/recipe/judge.jsonl")
            yield self.command("eval", name, *given, *judged)

    def read(self, ahead: int) -> Compared:
        """Raises MissingRun."""
        folder = self.runs / self.name(ahead)
        grpo, evaluation = read_run(folder / "grpo"), read_run(folder / "eval")
        lows = {judge: evaluation.metric(f"eval/{judge}_low") for judge in self.task.judges}
        return Compared(
            figure=evaluation.metric(self.task.figure),
            score=statistics.fmean(grpo.series(SCORE)),
            staleness=_extreme(grpo, "ahead/staleness_max", ahead, highest=True),
            ess=_extreme(grpo, "ahead/ess", ahead, highest=False),
            step_s=statistics.median(grpo.series("time/step_s")),
            judged=lows,
        )


def _extreme(run: Run, name: str, ahead: int, *, highest: bool) -> float:
    """The largest or smallest value of all steps; of ahead=0, which has none, that of no stale
    token.
    """
    if not ahead:
        return 0.0 if highest else 1.0
    values = run.series(name)
    return max(values) if highest else min(values)


def check_seed(task: Task, found: dict[int, Compared]) -> list[Check]:
    """The bounds on one seed's runs, by `stage.ahead`."""
    turns = found[0]
    checks = []
    for ahead, one in found.items():
        label = f"ahead={ahead}:"
        checks += [
            Check(f"{label} {judge}, lower bound", low, low=0.0, strict=True)
            for judge, low in one.judged.items()
        ]
        if not ahead:
            continue
        least = turns.figure - task.most_lost
        checks.append(Check(f"{label} {task.figure}", one.figure, low=least))
        if task.most_lost_score is not None:
            least = turns.score - task.most_lost_score
            checks.append(Check(f"{label} mean score", one.score, low=least))
        checks.append(Check(f"{label} largest staleness", one.staleness, low=1, high=ahead))
    return checks


def check_means(task: Task, seeds: Sequence[dict[int, Compared]]) -> list[Check]:
    """The bounds on means over seeds."""
    means = {}
    for ahead in AHEAD:
        means[ahead] = statistics.fmean(found[ahead].figure for found in seeds)
    least = means[0] - task.most_lost_mean
    return [
        Check(f"ahead={ahead}: {task.figure}, mean", means[ahead], low=least) for ahead in AHEAD[1:]
    ]


def show(task: Task, seeds: dict[int, dict[int, Compared]]) -> None:
    table = Table(title=f"GRPO on {task.experiment}", title_justify="left")
    columns = ("seed", "ahead", task.figure, "mean score", "staleness", "ess", "s a step")
    for column in (*columns, *task.judges):
        table.add_column(column)
    for seed, found in seeds.items():
        for ahead, one in found.items():
            figures = (one.figure, one.score, one.staleness, one.ess, one.step_s)
            shown = [f"{figure:.3f}" for figure in (*figures, *one.judged.values())]
            table.add_row(str(seed), str(ahead), *shown)
    Console(width=110).print(table)


def prove(task: Task, options: argparse.Namespace, overrides: Sequence[str]) -> bool:
    """All seeds of one task. Whether every bound holds."""
    seeds: dict[int, dict[int, Compared]] = {}
    passed = True
    for seed in options.seeds:
        plan = ProofRuns(options.runs, task, seed, tuple(overrides))
        commands = [] if options.check_only else list(plan.commands())
        if any(exit_code(command) for command in commands):
            print(f"{plan.base}: a command failed", file=sys.stderr)
            return False
        try:
            seeds[seed] = {ahead: plan.read(ahead) for ahead in AHEAD}
        except MissingRun as error:
            print(f"{plan.base}: {error}", file=sys.stderr)
            return False
        passed &= report(plan.base, check_seed(task, seeds[seed]))
    show(task, seeds)
    means = check_means(task, list(seeds.values()))
    return report(f"{NAME}-{task.experiment}, all seeds", means) and passed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.proofs.ahead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--check-only", action="store_true", help="run nothing")
    options, overrides = parser.parse_known_args(arguments)
    passed = [prove(TASKS[name], options, overrides) for name in options.tasks]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
