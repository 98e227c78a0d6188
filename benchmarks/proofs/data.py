"""The proof of the data report and of the steps that repair: real pairs with planted defects,
recall and precision of every detector.

python -m benchmarks.proofs.data                 runs stage=data twice on 5,000 pairs of movie
reviews (minutes), prints the tables, fails below a bound python -m benchmarks.proofs.data
--check-only    checks the runs that are there

First without a step, so that the report sees every defect: each row that it names is held against
the rows that have the defect (benchmarks/proofs/defects.py). Then with the steps that the report
itself names, so that their rejected rows are held against the same truth, and a second report is to
find nothing of it any more. A defect that is defined exactly must be found with recall and
precision of at least 0.95. Label noise is not: which sides were exchanged no text says for certain,
so its figures are printed beside what naming rows at random would give.
"""

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.proofs import defects
from benchmarks.proofs.common import Check, report
from benchmarks.proofs.defects import HELD, TRAIN, Place, Sizes
from benchmarks.shared import exit_code, module, write_rows
from rlhf.data.formats import Use
from rlhf.data.prepare.items import Item
from rlhf.data.recipes.reviews import DISTRIBUTION, REQUIREMENT, TABLE, Review, read_reviews
from rlhf.data.report.making import make
from rlhf.process.libraries import package_file

LEAST = 0.95
EXACT = (
    "exact_duplicates",
    "near_duplicates",
    "contradictions",
    "equal_sides",
    "html",
    "encoding",
    "garbled",
    "truncated",
    "row_leakage_exact",
    "row_leakage_near",
)
HEURISTIC = ("suspect_labels",)
MENDED = (
    "exact_duplicates",
    "near_duplicates",
    "html",
    "encoding",
    "truncated",
    "row_leakage_exact",
    "row_leakage_near",
)
STEPS = (
    f"[{{step: repair, html: true}},{{step: length, unit: words, part: answer, high: "
    f"{defects.LIMIT}}},exact_duplicates,near_duplicates]"
)
# shares of good answers
BALANCED, UNBALANCED = (0.5, 0.45, 0.55, 0.4, 0.6), (0.2, 0.8, 0.1, 0.9, 0.15)
JUDGED_ROWS = 400
RAW, REPAIRED = "proof-data-found", "proof-data-mended"
_ALL = 10_000_000  # rows that a finding may name


@dataclass(frozen=True, slots=True)
class Measured:
    """One detector against the truth."""

    name: str
    planted: int
    named: int
    right: int

    @property
    def recall(self) -> float:
        return self.right / self.planted if self.planted else 0.0

    @property
    def precision(self) -> float:
        """Of the rows that it names; 0 when it names none."""
        return self.right / self.named if self.named else 0.0

    def checks(self) -> list[Check]:
        return [
            Check(f"{self.name}: recall", self.recall, low=LEAST),
            Check(f"{self.name}: precision", self.precision, low=LEAST),
        ]


def measure(name: str, planted: set[Place], named: set[Place]) -> Measured:
    return Measured(name, len(planted), len(named), len(planted & named))


def named_rows(report_content: Mapping[str, Any], check: str) -> set[Place]:
    """The rows that report.json names for a check. Raises ValueError when it holds fewer than it
    counts.
    """
    out: set[Place] = set()
    for finding in report_content["findings"]:
        if finding["check"] == check:
            if len(finding["rows"]) != finding["total"]:
                raise ValueError(
                    f"{check}: {len(finding['rows'])} of {finding['total']} rows are named; "
                    "raise data.report_rows"
                )
            out |= {(Path(row["file"]).name, row["row"]) for row in finding["rows"]}
    return out


def rejected_rows(path: Path, step: str) -> set[Place]:
    """The rows that a step left out, from rejected.jsonl."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return {(Path(line["file"]).name, line["row"]) for line in lines if line["step"] == step}


def detectors(report_content: Mapping[str, Any], truth: Mapping[str, set[Place]]) -> list[Measured]:
    """The report's detectors."""
    return [
        measure(f"report: {check}", truth[check], named_rows(report_content, check))
        for check in (*EXACT, *HEURISTIC)
    ]


def steps(rejected: Path, truth: Mapping[str, set[Place]]) -> list[Measured]:
    """The steps that leave rows out. Of a training row and its copy that is held out
    near_duplicates keeps the held-out one.
    """
    copies = truth["exact_duplicates"] | truth["row_leakage_exact"]
    return [
        measure("step: length", truth["truncated"], rejected_rows(rejected, "length")),
        measure("step: exact_duplicates", copies, rejected_rows(rejected, "exact_duplicates")),
        measure(
            "step: near_duplicates",
            truth["near_duplicates"] | truth["leaked_near_originals"],
            rejected_rows(rejected, "near_duplicates"),
        ),
    ]


def left(report_content: Mapping[str, Any]) -> list[Check]:
    """What a report on repaired rows still finds of what the steps repair."""
    counts = {f["check"]: f["total"] for f in report_content["findings"]}
    return [Check(f"rows left with {check}", counts.get(check, 0), high=0) for check in MENDED]


def imbalance(reviews: Sequence[Review], seed: int) -> Measured:
    """Data sets whose labels are balanced, or not (at least 3 to 1): which of them the report calls
    unbalanced.
    """
    good, bad = defects.sentences(reviews, random.Random(seed))
    named: set[Place] = set()
    planted: set[Place] = set()
    for number, share in enumerate((*BALANCED, *UNBALANCED)):
        rows = defects.judged(good, bad, seed + number, JUDGED_ROWS, share)
        items = [Item(dict(row), f"judged-{number}", i) for i, row in enumerate(rows, start=1)]
        if share in UNBALANCED:
            planted.add((f"judged-{number}", 0))
        if any(
            f.check == "imbalance"
            for f in make(items, [], Use.unpaired, None, seed=seed).findings()
        ):
            named.add((f"judged-{number}", 0))
    return measure("report: imbalance (data sets)", planted, named)


def prepare(runs: Path, name: str, rows: Path, seed: int, pipeline: str) -> int:
    """``python -m rlhf stage=data`` in a process of its own; returns its exit code."""
    command = module(
        "rlhf",
        "stage=data",
        f"run.name={name}",
        f"run.dir={runs}",
        f"run.seed={seed}",
        "run.overwrite=true",
        "tracking=none",
    )
    files = [
        f"data.path={rows / TRAIN}",
        f"data.eval_path={rows / HELD}",
        f"data.pipeline={pipeline}",
    ]
    options = [
        "data.report=true",
        f"data.report_limit={defects.LIMIT}",
        f"data.report_rows={_ALL}",
        "data.task=simple",
    ]
    return exit_code([*command, *files, *options])


def read_report(runs: Path, name: str) -> dict[str, Any]:
    """Raises FileNotFoundError where stage=data has not finished."""
    loaded: dict[str, Any] = json.loads(
        (runs / name / "data" / "report.json").read_text(encoding="utf-8")
    )
    return loaded


def show(title: str, measured: Sequence[Measured], console: Console) -> None:
    """Counts, recall and precision."""
    table = Table(title=title, title_justify="left")
    for column in ("detector", "planted", "named", "right", "recall", "precision"):
        table.add_column(column, justify="left" if column == "detector" else "right")
    for m in measured:
        table.add_row(
            m.name,
            str(m.planted),
            str(m.named),
            str(m.right),
            f"{m.recall:.3f}",
            f"{m.precision:.3f}",
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None, sizes: Sizes | None = None) -> int:
    """Returns 0 when every bound holds, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.proofs.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="root of the run directories"
    )
    parser.add_argument(
        "--check-only", action="store_true", help="check existing runs, run nothing"
    )
    options = parser.parse_args(arguments)
    console = Console(width=110)
    reviews = read_reviews(package_file(DISTRIBUTION, TABLE, REQUIREMENT))
    planted = defects.plant(reviews, options.seed, sizes or Sizes())
    rows = options.runs / "proof-data"
    if not options.check_only:
        rows.mkdir(parents=True, exist_ok=True)
        write_rows(rows / TRAIN, planted.train)
        write_rows(rows / HELD, planted.held)
        for name, pipeline in ((RAW, "[]"), (REPAIRED, STEPS)):
            code = prepare(options.runs, name, rows, options.seed, pipeline)
            if code != 0:
                print(f"stage=data ({name}) ended with exit code {code}", file=sys.stderr)
                return 1
    console.print(
        f"{len(planted.train)} training rows, {len(planted.held)} held out; "
        + "; ".join(f"{n} {what}" for what, n in planted.natural.items())
    )
    raw, repaired = read_report(options.runs, RAW), read_report(options.runs, REPAIRED)
    measured = [
        *detectors(raw, planted.truth),
        imbalance(reviews, options.seed),
        *steps(options.runs / REPAIRED / "data" / "rejected.jsonl", planted.truth),
    ]
    show(f"Recall and precision, seed {options.seed}", measured, console)
    noise = len(planted.truth["suspect_labels"]) / len(planted.train)
    console.print(
        f"suspect_labels is no exact detector: rows named at random would be right {noise:.3f} "
        "of the time"
    )
    bound = [
        check
        for m in measured
        if m.name.removeprefix("report: ") not in HEURISTIC
        for check in m.checks()
    ]
    return 0 if report(f"Bounds, seed {options.seed}", [*bound, *left(repaired)], console) else 1


if __name__ == "__main__":
    sys.exit(main())
