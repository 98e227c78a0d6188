"""What the proofs share: run the chain as a user would, read its run directories, hold figures
against bounds.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.shared import exit_code, module


@dataclass(frozen=True, slots=True)
class Check:
    """One figure against its bounds; a figure that is not a number passes nothing."""

    name: str
    value: float
    low: float = -math.inf  # inclusive unless strict
    high: float = math.inf
    strict: bool = False  # the bounds themselves don't pass

    @property
    def passed(self) -> bool:
        return (
            self.low < self.value < self.high
            if self.strict
            else self.low <= self.value <= self.high
        )

    @property
    def expected(self) -> str:
        equal = "" if self.strict else "="
        parts = [
            f">{equal} {self.low:g}" if self.low > -math.inf else "",
            f"<{equal} {self.high:g}" if self.high < math.inf else "",
        ]
        return " and ".join(part for part in parts if part)


class MissingRun(Exception):
    """A run directory lacks what the proof reads; the message names the file or the figure."""


@dataclass(frozen=True, slots=True)
class Run:
    """The figures of a finished stage."""

    path: Path
    summary: dict[str, Any]
    steps: list[dict[str, float]]  # metrics.jsonl

    def metric(self, name: str) -> float:
        """A figure of summary.json. Raises MissingRun."""
        value = self.summary["metrics"].get(name)
        if value is None:
            raise MissingRun(f"{self.path / 'summary.json'}: has no figure {name}")
        return float(value)

    def series(self, name: str) -> list[float]:
        """A metric at every step. Raises MissingRun for a step without it."""
        lacking = [step.get("step") for step in self.steps if step.get(name) is None]
        if lacking or not self.steps:
            raise MissingRun(
                f"{self.path / 'metrics.jsonl'}: has no {name} at step "
                f"{lacking[0] if lacking else 1}"
            )
        return [float(step[name]) for step in self.steps]


def read_run(path: Path) -> Run:
    """A stage's run directory. Raises MissingRun when it is not finished."""
    for name in ("summary.json", "metrics.jsonl"):
        if not (path / name).is_file():
            raise MissingRun(f"{path / name}: no such file, so this stage has not finished")
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Run(
        path,
        json.loads((path / "summary.json").read_text(encoding="utf-8")),
        [json.loads(line) for line in lines if line],
    )


def run_chain(
    experiment: str, name: str, seed: int, runs: Path, overrides: Sequence[str] = ()
) -> int:
    """``python -m rlhf stage=chain`` in a process of its own; returns its exit code."""
    options = [f"experiment={experiment}", f"run.seed={seed}", f"run.name={name}"]
    options += [f"run.dir={runs}", "run.overwrite=true", *overrides]
    return exit_code(module("rlhf", "stage=chain", *options))


def step_time_share(ppo: Run) -> float:
    """The smallest share of a step's wall time that its phases' time/*_s add up to, over
    all steps.
    """
    wall = ppo.series("time/step_s")
    phases = [
        sum(
            v
            for k, v in step.items()
            if k.startswith("time/") and k.endswith("_s") and k != "time/step_s"
        )
        for step in ppo.steps
    ]
    return min(phase / seconds for phase, seconds in zip(phases, wall, strict=True))


def report(title: str, checks: Iterable[Check], console: Console | None = None) -> bool:
    """Print the checks as a table; returns whether all passed (none at all is a failure)."""
    table = Table(title=title, title_justify="left")
    for column in ("", "figure", "found", "expected"):
        table.add_column(column)
    listed = list(checks)
    for check in listed:
        colour = "green" if check.passed else "red"
        table.add_row(
            f"[{colour}]{'pass' if check.passed else 'FAIL'}[/]",
            check.name,
            f"{check.value:.4g}",
            check.expected,
        )
    (console or Console(width=110)).print(table)
    return bool(listed) and all(check.passed for check in listed)


def prove_seeds(
    experiment: str,
    check_run: Callable[[Path], list[Check]],
    arguments: Sequence[str] | None = None,
    *,
    description: str | None = None,
) -> int:
    """The command line of a proof of several seeds: run the chain and check it, seed by seed.
    Returns 0 when every seed passed, else 1.

    `check_run` takes ``<runs>/proof-<experiment>-<seed>``; further arguments are overrides of the
    chain.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.proofs.{experiment}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="root of the run directories"
    )
    parser.add_argument(
        "--check-only", action="store_true", help="check existing runs, run nothing"
    )
    options, overrides = parser.parse_known_args(arguments)
    passed = True
    for seed in options.seeds:
        name = f"proof-{experiment}-{seed}"
        if not options.check_only:
            code = run_chain(experiment, name, seed, options.runs, overrides)
            if code != 0:
                print(f"seed {seed}: the chain ended with exit code {code}", file=sys.stderr)
                passed = False
                continue
        try:
            passed &= report(f"{experiment}, seed {seed}", check_run(options.runs / name))
        except MissingRun as error:
            print(f"seed {seed}: {error}", file=sys.stderr)
            passed = False
    return 0 if passed else 1
