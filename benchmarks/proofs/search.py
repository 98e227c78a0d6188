"""The proof that stage=search finds settings: a tiny SFT on sums, searched at random, by TPE, and
at random with pruning.

    python -m benchmarks.proofs.search                 runs and checks, 5 seeds
    python -m benchmarks.proofs.search --workers 1     on one core

For each seed three searches with as many trials: random, tpe, and random with halving. The
second against the first says whether TPE finds better settings with the same budget; the third has
the settings of the first, so that what it saves and whether it loses the best is exact. A search of
each kind is begun again with its seed, and must give the same trials.

The space is wide on purpose: five options, four of them over two to ten decades. A setting is good
where all of them are, so chance alone rarely hits one. The runs are so short that the loss still
falls: later it would stand still where the answers' form is learned, whatever the setting.

The trials are real runs of stage=sft, as forks of a process that has the libraries imported
(benchmarks/proofs/forks.py); the loop, the study and the commands are the stage's own. Writes
proof_search.json and proof_search.png beside the runs.
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.proofs import forks
from benchmarks.proofs.common import Check, report
from benchmarks.shared import environment, module
from conf.choices import Recipe
from conf.schema import DataConfig, RunConfig
from eval.statistics import Interval, bootstrap_mean
from rlhf.cli import config
from rlhf.data.recipes import build
from rlhf.process import distributed
from rlhf.search.commands import Commands, StageRun
from rlhf.search.loop import Search
from rlhf.search.plots import best_so_far
from rlhf.search.space import parameters
from rlhf.search.study import JOURNAL, Study
from rlhf.search.trials import State, Trial
from rlhf.stages.search import plan_of, rules_of

NAME, OBJECTIVE = "proof-search", "eval_loss"
MIN_SAVED = 0.30  # of the steps, by pruning
STEPS, EVALUATIONS = 16, 8
BATCH = 64
REPEATED = 6  # trials of a search that is begun again
TRIALS = [
    "experiment=arithmetic",
    "model.tiny.hidden_size=64",
    "model.tiny.heads=2",
    "model.tiny.intermediate_size=128",
    "tracking=none",
    "engine.threads=1",
    "run.keep_checkpoints=1",
    "data.cache=false",
    f"data.max_rows={STEPS * BATCH}",  # each row once
]
SEARCH = [
    "stage=search",
    "stage.of=sft",
    f"stage.options.steps={STEPS}",
    f"stage.options.eval_steps={STEPS // EVALUATIONS}",
    f"stage.options.batch_size={BATCH}",
    f"stage.options.log_steps={STEPS}",
    "stage.space.learning_rate={low:1e-5,high:0.1,log:true}",
    "stage.space.adam_eps={low:1e-10,high:1.0,log:true}",
    "stage.space.weight_decay={low:0.01,high:1e3,log:true}",
    "stage.space.depth_decay={low:0.01,high:1.0,log:true}",
    "stage.space.adam_beta1={low:0.0,high:0.98}",
    f"stage.objectives.{OBJECTIVE}.direction=min",
    "stage.startup=5",
]
ARMS: dict[str, list[str]] = {
    "random": ["stage.sampler=random"],
    "tpe": ["stage.sampler=tpe"],
    "pruned": [
        "stage.sampler=random",
        "stage.prune.kind=halving",
        f"stage.prune.least={STEPS // EVALUATIONS}",
        "stage.prune.factor=3",
    ],
}


class Forked:
    """The commands of a search's trials, run by the server at `address`."""

    def __init__(self, commands: Commands, address: str) -> None:
        self.commands, self.address = commands, address

    def stages(self, number: int, setting: Mapping[str, Any]) -> list[StageRun]:
        client = [sys.executable, "-S", "-E", forks.__file__, self.address]
        out = []
        for stage in self.commands.stages(number, setting):
            command = (*client, *stage.command[3:])  # without python -m rlhf
            out.append(dataclasses.replace(stage, command=command))
        return out


@dataclass(frozen=True, slots=True)
class Bench:
    """Where the searches of the proof run."""

    runs: Path
    address: str
    trials: int
    workers: int

    def search(self, arm: str, seed: int, name: str, trials: int) -> list[Trial]:
        """A search from its beginning. Returns its trials."""
        run = [f"run.dir={self.runs}", f"run.name={NAME}", f"run.seed={seed}"]
        argv = [*SEARCH, *TRIALS, *ARMS[arm], *run]
        cfg = config.compose([*argv, f"stage.trials={trials}", f"stage.workers={self.workers}"])
        folder = self.runs / NAME / f"{name}-{arm}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        commands = Commands(cfg.stage, cfg.run, folder, argv, NAME)
        space = parameters(cfg.stage.space, cfg.stage.of)
        study = Study(folder / JOURNAL, plan_of(cfg.stage, seed, space, commands.own()))
        search = Search(study, Forked(commands, self.address), rules_of(cfg.stage, study), _nothing)
        if search.run() is not None:
            raise SystemExit("stopped")
        return study.trials()


def _nothing() -> None:
    """After a trial there is nothing to do."""


# ---- figures ----


@dataclass(frozen=True, slots=True)
class Seed:
    """The three searches of a seed."""

    random: list[Trial]
    tpe: list[Trial]
    pruned: list[Trial]

    @property
    def gain(self) -> float:
        """What TPE's best held-out loss is below the best at random, in nats."""
        return best(self.random).values[0] - best(self.tpe).values[0]

    @property
    def saved(self) -> float:
        """The share of the steps that pruning saves."""
        return 1.0 - steps(self.pruned) / steps(self.random)

    @property
    def keeps_best(self) -> bool:
        """Whether the pruned search ends with the same setting and the same value."""
        kept, whole = best(self.pruned), best(self.random)
        return kept.setting == whole.setting and kept.values == whole.values


def best(trials: Sequence[Trial]) -> Trial:
    """The complete trial with the smallest loss."""
    complete = [trial for trial in trials if trial.state is State.complete]
    return min(complete, key=lambda trial: trial.values[0])


def steps(trials: Sequence[Trial]) -> int:
    """Steps that were trained."""
    return sum(trial.steps or 0 for trial in trials)


def same(left: Sequence[Trial], right: Sequence[Trial]) -> bool:
    """Whether two searches have the same trials: number, state, setting, values."""
    first = [(each.number, each.state, each.setting, each.values) for each in left]
    return first == [(each.number, each.state, each.setting, each.values) for each in right]


def interval_of(seeds: Mapping[int, Seed]) -> Interval:
    """TPE's gain over the seeds, with a bootstrap interval."""
    gains = np.array([seed.gain for seed in seeds.values()])
    return bootstrap_mean(gains, resamples=10000, seed=0)


def checks(seeds: Mapping[int, Seed], repeated: Mapping[str, bool]) -> list[Check]:
    """The bounds of the proof."""
    gain = interval_of(seeds)
    saved = 1.0 - sum(steps(seed.pruned) for seed in seeds.values()) / sum(
        steps(seed.random) for seed in seeds.values()
    )
    kept = [seed.keeps_best for seed in seeds.values()]
    return [
        Check(
            "searches that gave the same trials again", sum(repeated.values()), low=len(repeated)
        ),
        Check(
            "tpe's best loss below random's, mean over the seeds",
            gain.estimate,
            low=0.0,
            strict=True,
        ),
        Check("   lower end of its 95 % interval", gain.low, low=0.0, strict=True),
        Check("steps that pruning saves, as a share", saved, low=MIN_SAVED),
        Check("seeds in which pruning keeps the same best", sum(kept), low=len(kept)),
    ]


def show(seeds: Mapping[int, Seed]) -> None:
    """A row a seed."""
    table = Table(title="best held-out loss, nats per token", title_justify="left")
    for column in ("seed", "random", "tpe", "gain", "with pruning", "steps saved", "stopped"):
        table.add_column(column, justify="right")
    for number, seed in seeds.items():
        stopped = sum(trial.state is State.pruned for trial in seed.pruned)
        table.add_row(
            str(number),
            f"{best(seed.random).values[0]:.4f}",
            f"{best(seed.tpe).values[0]:.4f}",
            f"{seed.gain:+.4f}",
            f"{best(seed.pruned).values[0]:.4f}",
            f"{100 * seed.saved:.0f} %",
            f"{stopped} of {len(seed.pruned)}",
        )
    gain = interval_of(seeds)
    Console(width=110).print(table)
    print(f"tpe below random: {gain.estimate:.4f} [{gain.low:.4f}, {gain.high:.4f}] nats per token")


def plot(seeds: Mapping[int, Seed], path: Path) -> None:
    """The best so far over the trials: each seed thin, the mean thick."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from conf.methods import Direction

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, colour in (("random", "#3366aa"), ("tpe", "#cc5533")):
        curves = []
        for seed in seeds.values():
            trials: list[Trial] = getattr(seed, name)
            values = [trial.values[0] if trial.values else np.inf for trial in trials]
            curves.append(best_so_far(values, Direction.min))
            axes.plot(curves[-1], color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(np.mean(curves, axis=0), color=colour, linewidth=2, label=name)
    axes.set_xlabel("trial")
    axes.set_ylabel("best held-out loss so far, nats per token")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def write(seeds: Mapping[int, Seed], passed: bool, path: Path) -> None:
    """proof_search.json: every trial of every search."""
    out: dict[str, Any] = {"passed": passed, "gain": dataclasses.asdict(interval_of(seeds))}
    for number, seed in seeds.items():
        out[str(number)] = {
            arm: [
                [each.state.value, dict(each.setting), list(each.values), each.last, each.steps]
                for each in getattr(seed, arm)
            ]
            for arm in ARMS
        }
    path.write_text(json.dumps(out, indent=1), encoding="utf-8")


# ---- the proof ----


def run(bench: Bench, numbers: Sequence[int]) -> tuple[dict[int, Seed], dict[str, bool]]:
    """All searches, and whether each kind gives the same trials again."""
    data, where = DataConfig(recipe=Recipe.arithmetic), RunConfig(dir=str(bench.runs), name=NAME)
    build.ensure(data, where)
    seeds, repeated = {}, {}
    for number in numbers:
        found = {}
        for arm in ARMS:
            began = time.monotonic()
            found[arm] = bench.search(arm, number, "whole", bench.trials)
            took = time.monotonic() - began
            print(f"seed {number}, {arm}: {took:.0f} s, {steps(found[arm])} steps", flush=True)
        seeds[number] = Seed(**found)
    for arm in ARMS:
        # several workers: tpe draws from what has ended by then
        one = dataclasses.replace(bench, workers=1)
        first = getattr(seeds[numbers[0]], arm)[:REPEATED]
        if bench.workers > 1:
            first = one.search(arm, numbers[0], "one", REPEATED)
        repeated[arm] = same(first, one.search(arm, numbers[0], "again", REPEATED))
    return seeds, repeated


def main() -> int:
    """Returns 0 where all bounds hold."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proofs.search")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--trials", type=int, default=14, help="of each search")
    parser.add_argument("--workers", type=int, default=distributed.cores())
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    options = parser.parse_args()
    folder = options.runs / NAME
    folder.mkdir(parents=True, exist_ok=True)
    address = str((folder / "forks.sock").resolve())
    Path(address).unlink(missing_ok=True)
    server = subprocess.Popen(module("benchmarks.proofs.forks", address), env=environment())
    began = time.monotonic()
    try:
        forks.wait_for(address)
        bench = Bench(options.runs, address, options.trials, options.workers)
        seeds, repeated = run(bench, options.seeds)
    finally:
        server.terminate()
        server.wait()
    show(seeds)
    passed = report("stage=search", checks(seeds, repeated))
    plot(seeds, options.runs / "proof_search.png")
    write(seeds, passed, options.runs / "proof_search.json")
    print(f"{time.monotonic() - began:.0f} s with {options.workers} workers")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
