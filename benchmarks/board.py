"""How long the board takes, and what it holds: from its start to the first page, each form, the
list of fifty runs of 10,000 lines. `python -m benchmarks.board`; nothing else should run beside it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from rlhf.board.forms.basic import stages

AIMS = {"start_s": 4.0, "memory_mib": 300.0, "form_s": 2.0, "list_s": 1.0}  # of issue 18
RUNS, LINES, METRICS = 50, 10_000, 20


@contextmanager
def board(runs: Path) -> Iterator[tuple[httpx.Client, psutil.Process, float]]:
    """A board of a process of its own, let in: a client, the process, seconds to its first page."""
    command = [sys.executable, "-m", "rlhf", "stage=board", f"run.dir={runs}", "stage.port=0"]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            link = process.stdout.readline().removeprefix("board: ").strip()
            with httpx.Client(base_url=link.partition("/?")[0], timeout=120) as client:
                client.get(link, follow_redirects=True).raise_for_status()
                yield client, psutil.Process(process.pid), time.perf_counter() - start
        finally:
            process.terminate()
            process.communicate()


def seconds(client: httpx.Client, path: str) -> float:
    """The time of one page."""
    start = time.perf_counter()
    client.get(path).raise_for_status()
    return time.perf_counter() - start


def furnish(runs: Path, count: int, lines: int) -> None:
    """Runs with metrics and nothing else."""
    figures = {f"metric/{number}": 0.125 for number in range(METRICS)}
    rows = [{"step": step, "time_s": step, "loss": 1.0, **figures} for step in range(1, lines + 1)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for number in range(count):
        folder = runs / f"run {number}" / "sft"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(text)


def measure(runs: Path, starts: int) -> dict[str, float]:
    """The figures of `AIMS`: the median of the starts, the slowest form, the first list."""
    took = []
    for _ in range(starts):
        with board(runs) as (client, process, start_s):
            took.append(start_s)
            list_s = seconds(client, "/runs")
            forms = {name: seconds(client, f"/new/{name}") for name in stages()}
            memory = process.memory_info().rss / 2**20
    slowest = max(forms, key=lambda name: forms[name])
    print(f"starts {[round(each, 2) for each in took]} s, slowest form {slowest}")
    return {
        "start_s": statistics.median(took),
        "memory_mib": memory,
        "form_s": forms[slowest],
        "list_s": list_s,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--lines", type=int, default=LINES, help="of each run's metrics.jsonl")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rlhf-bench-board-") as folder:
        runs = Path(folder) / "runs"
        furnish(runs, RUNS, given.lines)
        figures = measure(runs, given.starts)
    for name, aim in AIMS.items():
        met = "met" if figures[name] < aim else "NOT MET"
        print(f"{name:12} {figures[name]:8.2f}   aim below {aim:g}: {met}")
    return int(any(figures[name] >= aim for name, aim in AIMS.items()))


if __name__ == "__main__":
    sys.exit(main())
