"""The proof that a choice of pairs saves labels: a reward model on real reviews' openings, a
simulated annotator, chosen pairs against random ones.

python -m benchmarks.proofs.labels --seeds 0 1 2        runs and checks; further arguments are
overrides of stage=sft and of the rounds python -m benchmarks.proofs.labels --check-only
checks the runs that are there

For each seed: stage=sft makes a policy, which answers prompts; then
benchmarks/proofs/label_rounds.py labels in rounds, once with pairs taken at random, once with pairs
that the choice finds. The figure is the number of labels from which on the choice's reward models
are as accurate as those of all random labels, between two rounds by a straight line. Writes
proof_labels.json and proof_labels.png beside the runs.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.proofs.common import Check, MissingRun, read_run, report
from benchmarks.shared import exit_code, module

EXPERIMENT, NAME = "active_labels", "proof-labels"
MAX_SHARE = 0.7  # of random's labels
# of random's accuracy from the first round to the last: without a rise there is no label to save
MIN_GAIN = 0.02


@dataclass(frozen=True, slots=True)
class Curves:
    """Held-out accuracy after each round, of both choices."""

    labels: tuple[float, ...]  # rising
    random: tuple[float, ...]
    active: tuple[float, ...]
    wall_s: float

    @property
    def share(self) -> float:
        """Labels that the choice needs for the accuracy of all random labels, as a share of
        those.
        """
        return labels_needed(self.labels, self.active, self.random[-1]) / self.labels[-1]


def labels_needed(labels: Sequence[float], accuracy: Sequence[float], target: float) -> float:
    """The number of labels from which on `accuracy` is at least `target`, interpolated between two
    measurements; infinite where it ends below.

    A later measurement below the target takes back an earlier one above it, so that a lucky round
    proves nothing. Raises ValueError for curves that don't match.
    """
    if len(labels) != len(accuracy) or not labels or list(labels) != sorted(set(labels)):
        raise ValueError(
            f"expected rising labels and an accuracy for each, found {list(labels)} and "
            f"{list(accuracy)}"
        )
    below = [i for i, value in enumerate(accuracy) if not value >= target]
    if not below:
        return labels[0]
    last = below[-1]
    if last == len(labels) - 1:
        return math.inf
    low, high = accuracy[last], accuracy[last + 1]
    return labels[last] + (labels[last + 1] - labels[last]) * (target - low) / (high - low)


def read_curves(folder: Path) -> Curves:
    """The rounds of one seed. Raises MissingRun."""
    run = read_run(folder / "label")
    labels, other = run.series("active/labels"), run.series("random/labels")
    if labels != other:
        raise MissingRun(
            f"{run.path / 'metrics.jsonl'}: the two choices have different numbers of labels, "
            f"{labels} and {other}"
        )
    return Curves(
        tuple(labels),
        tuple(run.series("random/accuracy")),
        tuple(run.series("active/accuracy")),
        float(run.summary["wall_s"]),
    )


def check_curves(curves: Curves) -> list[Check]:
    """The bounds of one seed."""
    return [
        Check("labels that the choice needs, as a share of random's", curves.share, high=MAX_SHARE),
        Check(
            "what random labels teach: accuracy at the end less after the first round",
            curves.random[-1] - curves.random[0],
            low=MIN_GAIN,
        ),
        Check(
            "accuracy at the end, the choice less random",
            curves.active[-1] - curves.random[-1],
            low=0.0,
        ),
    ]


def show(seed: int, curves: Curves, console: Console | None = None) -> None:
    """A row a round."""
    table = Table(
        title=f"{EXPERIMENT}, seed {seed}: held-out accuracy after so many labels",
        title_justify="left",
    )
    for column in ("labels", "random", "chosen", "difference"):
        table.add_column(column, justify="right")
    for labels, by_chance, chosen in zip(curves.labels, curves.random, curves.active, strict=True):
        table.add_row(
            f"{labels:.0f}", f"{by_chance:.3f}", f"{chosen:.3f}", f"{chosen - by_chance:+.3f}"
        )
    (console or Console(width=110)).print(table)


def plot(curves: dict[int, Curves], path: Path) -> None:
    """Both curves of every seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(curves), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (seed, curve) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True
    ):
        axes.plot(curve.labels, curve.random, marker="o", label="random")
        axes.plot(curve.labels, curve.active, marker="o", label="chosen")
        axes.axhline(curve.random[-1], color="grey", linewidth=1, linestyle="--")
        share = f"{100 * curve.share:.0f} %" if math.isfinite(curve.share) else "more than all"
        axes.set_title(f"seed {seed}: {share} of the labels")
        axes.set_xlabel("labels")
        axes.set_ylabel("held-out accuracy")
        axes.legend()
    figure.savefig(path, dpi=120)


def write_results(curves: dict[int, Curves], path: Path) -> None:
    """proof_labels.json: the curves and figures of every seed; a share without end is null."""
    rows = {
        str(seed): {
            "labels": curve.labels,
            "random": curve.random,
            "active": curve.active,
            "share": curve.share if math.isfinite(curve.share) else None,
            "wall_s": curve.wall_s,
        }
        for seed, curve in curves.items()
    }
    path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def commands(seed: int, runs: Path, overrides: Sequence[str]) -> list[list[str]]:
    """What runs for one seed."""
    shared = [
        f"experiment={EXPERIMENT}",
        f"run.name={NAME}-{seed}",
        f"run.dir={runs}",
        f"run.seed={seed}",
        "run.overwrite=true",
        *overrides,
    ]
    sft = [override for override in shared if not override.startswith("label.")]
    return [
        module("rlhf", "stage=sft", *sft),
        module("benchmarks.proofs.label_rounds", *shared),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every seed passed, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.proofs.labels",
        description=__doc__,
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
    curves: dict[int, Curves] = {}
    for seed in options.seeds:
        planned = [] if options.check_only else commands(seed, options.runs, overrides)
        code = next((code for code in map(exit_code, planned) if code != 0), 0)
        if code != 0:
            print(f"seed {seed}: ended with exit code {code}", file=sys.stderr)
            passed = False
            continue
        try:
            curves[seed] = read_curves(options.runs / f"{NAME}-{seed}")
        except MissingRun as error:
            print(f"seed {seed}: {error}", file=sys.stderr)
            passed = False
            continue
        show(seed, curves[seed])
        passed &= report(f"{EXPERIMENT}, seed {seed}", check_curves(curves[seed]))
    if curves:
        write_results(curves, options.runs / "proof_labels.json")
        plot(curves, options.runs / "proof_labels.png")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
