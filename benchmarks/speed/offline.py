"""SFT, the reward model and DPO beside bare TRL on the same rows: what our layer costs.

Both sides train the same model on the same rows in the same order, with the same arguments and one
thread on the same core, a few steps in turn; the losses have to be equal. A turn is all that a
step takes: reading rows, the passes, the optimizer, logging (every step, as the product does).
Evaluations and checkpoints are left out. CPU seconds stand beside the clock's, since other programs
on a shared host move the clock.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.speed.models import SMALL, recipe_of, train_small
from benchmarks.speed.protocol import Figures
from benchmarks.speed.results import Result, Spread, number, ratios, spread, table

WORKER = "benchmarks.speed.offline_worker"
STAGES = ("sft", "reward", "dpo")
SIDES = ("ours", "trl")
TARGET = 1.05  # our time / TRL's
SAME = 1e-5  # largest difference of the losses, as a share of them


@dataclass(frozen=True, slots=True)
class OfflineCase:
    """One side of one comparison."""

    stage: str
    side: str
    model: str
    train: str  # rows
    held_out: str
    folder: str  # for the run directory
    turn_steps: int = 8  # optimizer steps of a turn
    batch: int = 16  # rows of a step, in one micro-batch
    max_length: int = 256  # tokens
    learning_rate: float = 1e-5
    steps: int = 100_000  # more than are ever asked for

    def dump(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> "OfflineCase":
        return OfflineCase(**json.loads(Path(path).read_text(encoding="utf-8")))


def cases_of(stage: str, folder: Path, shape: Sequence[str] = SMALL) -> dict[str, OfflineCase]:
    """Both sides of a stage, with a hardly trained model of `shape`."""
    name = "offline-5m" if shape is SMALL else "offline-tiny"
    model = train_small(folder, name, shape, steps=1)
    rows = "sft" if stage == "sft" else "pairs"
    recipe = recipe_of(folder, name)
    held_out = folder / name / f"{rows}_few.jsonl"
    lines = (recipe / f"{rows}_eval.jsonl").read_text(encoding="utf-8").split("\n")[:16]
    held_out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        side: OfflineCase(
            stage=stage,
            side=side,
            model=model,
            train=str(recipe / f"{rows}.jsonl"),
            held_out=str(held_out),
            folder=str(folder / f"offline-{stage}-{side}"),
        )
        for side in SIDES
    }


def check_same(stage: str, ours: Sequence[Figures], trl: Sequence[Figures]) -> float:
    """The largest difference of the losses of neighbouring turns, as a share of them. Raises
    RuntimeError where both sides did not do the same work.
    """
    pairs = [(one["loss"], other["loss"]) for one, other in zip(ours, trl, strict=True)]
    apart = max(abs(one - other) / max(abs(other), 1e-9) for one, other in pairs)
    if not apart <= SAME or not all(math.isfinite(loss) for pair in pairs for loss in pair):
        raise RuntimeError(f"{stage}: the losses of ours and TRL's differ: {pairs}")
    return apart


def cost(result: Result, figure: str) -> Spread:
    """Our time / TRL's of neighbouring turns; figure: step_s or cpu_s."""
    ours, trl = result.turns["ours"], result.turns["trl"]
    return ratios(ours, trl, lambda row: row[figure])


def offline_table(results: dict[str, Result]) -> list[str]:
    """A row a stage that was measured."""
    head = (
        "stage",
        "ours, s a step",
        "TRL, s a step",
        "ours / TRL",
        "ours / TRL, CPU s",
        "peak MiB (ours, TRL)",
        "loss apart",
    )
    rows = []
    for stage in STAGES:
        if stage not in results:
            continue
        result = results[stage]
        ours, trl = result.turns["ours"], result.turns["trl"]
        peaks = [spread(side, "peak_rss_mb").most for side in (ours, trl)]
        rows.append(
            (
                stage,
                str(spread(ours, "step_s")),
                str(spread(trl, "step_s")),
                str(cost(result, "step_s")),
                str(cost(result, "cpu_s")),
                f"{number(peaks[0])}, {number(peaks[1])}",
                f"{check_same(stage, ours, trl):.0e}",
            )
        )
    return table(head, rows) if rows else []
