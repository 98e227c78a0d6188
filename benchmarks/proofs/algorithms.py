"""The proof of the online algorithms: one policy and one reward model on the movie reviews, every
algorithm from there, outside judges up.

python -m benchmarks.proofs.algorithms                          grpo, rloo, dapo and online_dpo
python -m benchmarks.proofs.algorithms --algorithms grpo rloo   some of them, on the policy and
reward model that are there python -m benchmarks.proofs.algorithms --check-only             checks
the runs that are there

The runs lie in <runs>/proof-algorithms/<stage>, the evaluations, which all have the same stage, in
<runs>/proof-algorithms-<algorithm>/eval.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.proofs.common import Check, MissingRun, Run, read_run, report
from benchmarks.shared import exit_code, module

EXPERIMENT = "reviews"
NAME = "proof-algorithms"
BASE = ("sft", "reward")  # trained once, shared by all algorithms
ALGORITHMS = ("grpo", "rloo", "dapo", "online_dpo")
JUDGES = ("lexicon", "classifier")


@dataclass(frozen=True, slots=True)
class ProofRuns:
    """Where the proof runs, and what every command of it is given."""

    runs: Path
    seed: int
    overrides: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return self.runs / NAME

    def evaluation(self, algorithm: str) -> Path:
        return self.runs / f"{NAME}-{algorithm}" / "eval"

    def command(self, stage: str, name: str, *options: str) -> list[str]:
        shared = [
            f"experiment={EXPERIMENT}",
            f"run.seed={self.seed}",
            f"run.dir={self.runs}",
            f"run.name={name}",
            "run.overwrite=true",
        ]
        return module("rlhf", f"stage={stage}", *shared, *options, *self.overrides)

    def train(self, stage: str) -> list[str]:
        return self.command(stage, NAME)

    def evaluate(self, algorithm: str) -> list[str]:
        """An evaluation under a run name of its own, which therefore names every file that the
        experiment finds by run.name.
        """
        folder = self.folder
        return self.command(
            "eval",
            f"{NAME}-{algorithm}",
            f"model.path={folder}/sft/model",
            f"stage.before={folder}/sft/model",
            f"stage.after={folder}/{algorithm}/model",
            f"reward.path={folder}/reward/model",
            f"data.eval_path={folder}/recipe/prompts_eval.jsonl",
            f"stage.judge_path={folder}/recipe/judge.jsonl",
            "data.recipe=none",
        )


def run_all(plan: ProofRuns, algorithms: Sequence[str], *, base: bool) -> dict[str, int]:
    """Run what is asked for, one process after the other. Returns the exit code of each algorithm's
    first command that failed, or 0.

    Without a policy and a reward model no algorithm can start: their failure is every algorithm's.
    """
    for stage in BASE if base else ():
        code = exit_code(plan.train(stage))
        if code != 0:
            print(f"stage={stage} ended with exit code {code}", file=sys.stderr)
            return dict.fromkeys(algorithms, code)
    codes = {}
    for algorithm in algorithms:
        codes[algorithm] = 0
        for command in (plan.train(algorithm), plan.evaluate(algorithm)):
            codes[algorithm] = exit_code(command)
            if codes[algorithm] != 0:
                print(
                    f"{algorithm}: {command[3]} ended with exit code {codes[algorithm]}",
                    file=sys.stderr,
                )
                break
    return codes


def check_algorithm(evaluation: Run) -> list[Check]:
    """The bounds of one algorithm on its evaluation. Raises MissingRun for a figure that is not
    there.
    """
    return [
        Check(
            "held-out score up, in standard deviations of SFT's",
            evaluation.metric("eval/score_shift_sd"),
            low=1.0,
        ),
        *(
            Check(
                f"{judge} judge's difference, lower bound",
                evaluation.metric(f"eval/{judge}_low"),
                low=0.0,
                strict=True,
            )
            for judge in JUDGES
        ),
        Check("KL, nats per response token", evaluation.metric("eval/kl_per_token"), high=1.0),
    ]


def compare(plan: ProofRuns, algorithms: Sequence[str], console: Console | None = None) -> None:
    """Print a row per algorithm that has finished: what it gained, at what distance, and how long
    it took.
    """
    table = Table(
        title=f"{EXPERIMENT}, seed {plan.seed}: each against the same SFT policy, 95 % intervals",
        title_justify="left",
    )
    for column in (
        "algorithm",
        "score, SD",
        "lexicon",
        "classifier",
        "KL/token",
        "distinct-2",
        "steps",
        "s",
    ):
        table.add_column(column, justify="left" if column == "algorithm" else "right")
    for algorithm in algorithms:
        try:
            trained, evaluation = (
                read_run(plan.folder / algorithm),
                read_run(plan.evaluation(algorithm)),
            )
        except MissingRun:
            table.add_row(algorithm, *["-"] * 7)  # the check reports it
            continue
        judged = [
            f"{evaluation.metric(f'eval/{judge}_delta'):+.3f} "
            f"[{evaluation.metric(f'eval/{judge}_low'):+.3f}, "
            f"{evaluation.metric(f'eval/{judge}_high'):+.3f}]"
            for judge in JUDGES
        ]
        shares = [
            f"{evaluation.metric('eval/kl_per_token'):.3f}",
            f"{evaluation.metric('eval/distinct_2_ratio'):.2f}",
        ]
        effort = [str(trained.summary["steps"]), f"{float(trained.summary['wall_s']):.0f}"]
        table.add_row(
            algorithm, f"{evaluation.metric('eval/score_shift_sd'):+.2f}", *judged, *shares, *effort
        )
    (console or Console(width=130)).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.proofs.algorithms",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--algorithms",
        nargs="+",
        choices=ALGORITHMS,
        default=None,
        help="leaves policy and reward model as they are",
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="root of the run directories"
    )
    parser.add_argument(
        "--check-only", action="store_true", help="check existing runs, run nothing"
    )
    options, overrides = parser.parse_known_args(arguments)
    plan = ProofRuns(options.runs, options.seed, tuple(overrides))
    algorithms = options.algorithms or ALGORITHMS
    codes = (
        dict.fromkeys(algorithms, 0)
        if options.check_only
        else run_all(plan, algorithms, base=options.algorithms is None)
    )
    passed = True
    for algorithm in algorithms:
        if codes[algorithm] != 0:
            passed = False  # whatever an earlier run left behind proves nothing
            continue
        try:
            read_run(plan.folder / algorithm)
            passed &= report(
                f"{algorithm}, seed {plan.seed}",
                check_algorithm(read_run(plan.evaluation(algorithm))),
            )
        except MissingRun as error:
            print(f"{algorithm}: {error}", file=sys.stderr)
            passed = False
    compare(plan, [algorithm for algorithm in algorithms if codes[algorithm] == 0])
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
