"""The proof that stale responses cost nothing: GRPO on sums from one SFT policy with stage.ahead 0,
1 and 2, after as many steps, seed by seed.

python -m benchmarks.proofs.ahead --seeds 0 1 2      runs and checks
python -m benchmarks.proofs.ahead --check-only       checks the runs that are there
python -m benchmarks.proofs.ahead stage.steps=40     further arguments are options: those of the
                                                     stage of GRPO, others (rollout=hf) of all

The SFT policy lies in <runs>/proof-ahead-<seed>/sft, the others in
<runs>/proof-ahead-<seed>-<ahead>/grpo and eval.
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

EXPERIMENT = "arithmetic"
NAME = "proof-ahead"
AHEAD = (0, 1, 2)
# Shares of held-out sums. 256 of them have a standard error of 3 points at one half, and of 1 at
# 0.97.
MOST_LOST = 0.05  # in one seed
MOST_LOST_MEAN = 0.03  # over the seeds
SCORE = "objective/scores"


@dataclass(frozen=True, slots=True)
class Compared:
    """What one run of GRPO came to."""

    exact: float  # share of held-out sums whose most likely answer is right
    score: float  # mean over all steps: how fast it learned
    staleness: float  # versions, the largest of all steps
    ess: float  # the smallest of all steps; 1 without stale tokens
    step_s: float  # median


@dataclass(frozen=True, slots=True)
class ProofRuns:
    """Where the runs of one seed lie, and their commands."""

    runs: Path
    seed: int
    overrides: tuple[str, ...] = ()

    @property
    def base(self) -> str:
        return f"{NAME}-{self.seed}"

    def name(self, ahead: int) -> str:
        return f"{self.base}-{ahead}"

    def command(self, stage: str, name: str, *options: str) -> list[str]:
        shared = [f"experiment={EXPERIMENT}", f"run.seed={self.seed}", f"run.dir={self.runs}"]
        shared += [f"run.name={name}", "run.overwrite=true", "tracking=none"]
        given = [item for item in self.overrides if not item.startswith("stage.")]
        return module("rlhf", f"stage={stage}", *shared, *options, *given)

    def commands(self) -> Iterator[list[str]]:
        """SFT once, then GRPO and its evaluation for each `AHEAD`."""
        yield self.command("sft", self.base)
        folder = self.runs / self.base
        given = [f"model.path={folder}/sft/model", "data.recipe=none"]
        trained = [item for item in self.overrides if item.startswith("stage.")]
        for ahead in AHEAD:
            name = self.name(ahead)
            rows = f"data.path={folder}/recipe/prompts.jsonl"
            yield self.command("grpo", name, *given, rows, f"stage.ahead={ahead}", *trained)
            judged = [f"data.eval_path={folder}/recipe/prompts_eval.jsonl"]
            judged.append(f"stage.before={folder}/sft/model")
            judged.append(f"stage.after={self.runs / name}/grpo/model")
            yield self.command("eval", name, *given, *judged)

    def read(self, ahead: int) -> Compared:
        """Raises MissingRun."""
        folder = self.runs / self.name(ahead)
        grpo, evaluation = read_run(folder / "grpo"), read_run(folder / "eval")
        return Compared(
            exact=evaluation.metric("eval/function_after"),
            score=statistics.fmean(grpo.series(SCORE)),
            staleness=_extreme(grpo, "ahead/staleness_max", ahead, highest=True),
            ess=_extreme(grpo, "ahead/ess", ahead, highest=False),
            step_s=statistics.median(grpo.series("time/step_s")),
        )


def _extreme(run: Run, name: str, ahead: int, *, highest: bool) -> float:
    """The largest or smallest value of all steps; of ahead=0, which has none, that of no stale
    token.
    """
    if not ahead:
        return 0.0 if highest else 1.0
    values = run.series(name)
    return max(values) if highest else min(values)


def check_seed(found: dict[int, Compared]) -> list[Check]:
    """The bounds on one seed's runs, by `stage.ahead`."""
    turns = found[0]
    checks = []
    for ahead, one in found.items():
        if not ahead:
            continue
        checks += [
            Check(f"ahead={ahead}: exact match", one.exact, low=turns.exact - MOST_LOST),
            Check(f"ahead={ahead}: mean score", one.score, low=turns.score - MOST_LOST),
            Check(f"ahead={ahead}: largest staleness", one.staleness, low=1, high=ahead),
        ]
    return checks


def check_means(seeds: Sequence[dict[int, Compared]]) -> list[Check]:
    """The bounds on means over seeds."""
    means = {}
    for ahead in AHEAD:
        means[ahead] = statistics.fmean(found[ahead].exact for found in seeds)
    return [
        Check(f"ahead={ahead}: exact match, mean", means[ahead], low=means[0] - MOST_LOST_MEAN)
        for ahead in AHEAD[1:]
    ]


def show(seeds: dict[int, dict[int, Compared]]) -> None:
    table = Table(title="GRPO on sums", title_justify="left")
    for column in ("seed", "ahead", "exact match", "mean score", "staleness", "ess", "s a step"):
        table.add_column(column)
    for seed, found in seeds.items():
        for ahead, one in found.items():
            figures = (one.exact, one.score, one.staleness, one.ess, one.step_s)
            table.add_row(str(seed), str(ahead), *(f"{figure:.3f}" for figure in figures))
    Console(width=110).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.proofs.ahead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--check-only", action="store_true", help="run nothing")
    options, overrides = parser.parse_known_args(arguments)
    seeds: dict[int, dict[int, Compared]] = {}
    passed = True
    for seed in options.seeds:
        plan = ProofRuns(options.runs, seed, tuple(overrides))
        commands = [] if options.check_only else list(plan.commands())
        if any(exit_code(command) for command in commands):
            print(f"seed {seed}: a command failed", file=sys.stderr)
            return 1
        try:
            seeds[seed] = {ahead: plan.read(ahead) for ahead in AHEAD}
        except MissingRun as error:
            print(f"seed {seed}: {error}", file=sys.stderr)
            return 1
        passed &= report(f"ahead, seed {seed}", check_seed(seeds[seed]))
    show(seeds)
    return 0 if report("ahead, all seeds", check_means(list(seeds.values()))) and passed else 1


if __name__ == "__main__":
    sys.exit(main())
