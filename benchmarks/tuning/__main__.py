"""Every way to fine-tune on one task: the pretrained 135M model says whether the critic liked the
film. Each is trained with three learning rates, then with the best of them from three seeds. Writes
the table and the picture of docs/tuning.md.

    python -m benchmarks.tuning [--only NAME ...] [--table]

Takes up to 20 minutes on two idle cores; times and memory mean little beside other work.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.shared import environment
from benchmarks.tuning import page, worker
from benchmarks.tuning.cases import CASES
from rlhf.data.recipes import smollm2
from rlhf.process.libraries import package_file

FOLDER = Path("build/tuning")
RESULTS = FOLDER / "results.json"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", choices=list(CASES), help="these ways")
    parser.add_argument("--table", action="store_true", help="write the page, train nothing")
    chosen = parser.parse_args()
    known: dict[str, Any] = {}
    if RESULTS.is_file():
        known = json.loads(RESULTS.read_text(encoding="utf-8"))
    if not chosen.table:
        known = _train(known, chosen.only or list(CASES))
    page.write(known)
    start = known["full"]["start"]
    worse = [name for name, result in known.items() if not page.beats_start(result, start)]
    for name in worse:
        print(f"{name} does not beat the untrained model", file=sys.stderr)
    return 1 if worse else 0


def _train(known: dict[str, Any], names: list[str]) -> dict[str, Any]:
    FOLDER.mkdir(parents=True, exist_ok=True)
    source = package_file(smollm2.DISTRIBUTION, smollm2.GGUF, smollm2.REQUIREMENT)
    smollm2.convert(source, FOLDER / "model")
    os.environ.update(environment())
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["benchmarks.tuning.worker"])
    # a process for each, forked from one that has loaded the libraries
    with ProcessPoolExecutor(1, processes, max_tasks_per_child=1) as pool:
        for name in names:
            began = time.perf_counter()
            known[name] = pool.submit(worker.measure, str(FOLDER / "model"), name).result()
            RESULTS.write_text(json.dumps(known, indent=1), encoding="utf-8")
            print(
                f"{page.row(name, known[name])} ({time.perf_counter() - began:.0f} s)", flush=True
            )
    return known


if __name__ == "__main__":
    sys.exit(main())
