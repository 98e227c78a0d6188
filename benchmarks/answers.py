"""Answers through data=clean and through the report, for `make bench-data`."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.proofs.common import Check
from benchmarks.shared import StageRun, module, run_stage

ROWS = 40_000  # of the largest set
GROWTH_GIB = 0.3  # bound for what four times the rows add to the peak


def write(path: Path, rows: int, pool: Sequence[str], seed: int = 0) -> None:
    """A JSONL file of prompts with answers: a third of them lists, some with an e-mail address."""
    rng = random.Random(seed)

    def some(low: int, high: int) -> list[str]:
        return [pool[rng.randrange(len(pool))] for _ in range(rng.randint(low, high))]

    with path.open("w", encoding="utf-8") as out:
        for number in range(rows):
            answer = " ".join(some(2, 9))
            if rng.random() < 1 / 3:
                answer = "\n".join(f"{i}. {line}" for i, line in enumerate(some(4, 6), start=1))
            if rng.random() < 0.02:
                answer += f" Write to jane.doe{number}@example.com."
            row = {"prompt": " ".join(some(1, 2)), "completion": answer}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


# what is measured over answers, and the options of stage=data for it
MEASURED = {"data=clean": ("data=clean",), "report": ("data.report=true",)}


def measure(rows: int, pool: Sequence[str], folder: Path) -> dict[str, list[StageRun]]:
    """data=clean and the report by itself, over a quarter of the rows and over all."""
    out: dict[str, list[StageRun]] = {}
    for part, number in enumerate((rows // 4, rows)):
        path = folder / f"answers{number}.jsonl"
        write(path, number, pool, seed=part)
        for what, options in MEASURED.items():
            command = module("rlhf", "stage=data", f"data.path={path}", *options, "tracking=none")
            out.setdefault(what, []).append(
                run_stage(command, folder / f"{what.removeprefix('data=')}{number}")
            )
    return out


def lines(rows: int, results: Mapping[str, Sequence[StageRun]]) -> Iterator[str]:
    """Rows a second without the start of the program, and peaks."""
    for what, (quarter, whole) in results.items():
        rate = (rows - rows // 4) / max(1e-9, whole.seconds - quarter.seconds)
        yield (
            f"{what}: {rows} rows in {whole.seconds:.0f} s ({rate:.0f} rows/s after the start), "
            f"peak {quarter.peak_gib:.2f} GiB for a quarter, {whole.peak_gib:.2f} GiB for all"
        )


def checks(results: Mapping[str, Sequence[StageRun]]) -> list[Check]:
    return [
        Check(
            f"{what}: what four times the rows add to the peak, GiB",
            whole.peak_gib - quarter.peak_gib,
            high=GROWTH_GIB,
        )
        for what, (quarter, whole) in results.items()
    ]
