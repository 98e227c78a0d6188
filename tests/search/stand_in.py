"""A trial that is quick: a run directory with a curve, without training.

    python stand_in.py DIRECTORY X STEPS PAUSE_S [run.resume=true]

Its value at a step is (x - 0.3)^2 + 1/step. SIGTERM ends it after a step, which it keeps as its
checkpoint. Two at once in one directory are noticed.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def value_at(x: float, step: int) -> float:
    return (x - 0.3) ** 2 + 1 / step


def main(folder: Path, x: float, steps: int, pause_s: float, resumes: bool) -> int:
    if folder.is_dir() and any(folder.iterdir()) and not resumes:
        print("the directory exists", file=sys.stderr)
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    alive = folder / "alive"
    if alive.exists():  # another lives, or was killed: only the former is wrong
        pid = int(alive.read_text() or 0)
        if pid and Path(f"/proc/{pid}").exists():
            (folder / "doubled").touch()
    alive.write_text(str(os.getpid()))
    with (folder / "starts").open("a") as file:
        file.write(f"{os.getpid()}\n")
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    checkpoint = folder / "checkpoint"
    done = int(checkpoint.read_text()) if checkpoint.is_file() else 0
    metrics = folder / "metrics.jsonl"
    kept = metrics.read_text().splitlines()[:done] if metrics.is_file() else []
    metrics.write_text("".join(f"{line}\n" for line in kept))
    for step in range(done + 1, steps + 1):
        time.sleep(pause_s)
        with metrics.open("a") as file:
            file.write(json.dumps({"step": step, "value": value_at(x, step)}) + "\n")
        checkpoint.write_text(str(step))
        if told and step < steps:
            alive.unlink()
            return 143
    summary = {"stage": "stand_in", "steps": steps, "metrics": {"value": value_at(x, steps)}}
    beside = folder / "summary.tmp"
    beside.write_text(json.dumps(summary))
    beside.replace(folder / "summary.json")
    alive.unlink()
    return 0


if __name__ == "__main__":
    resumes = "run.resume=true" in sys.argv
    sys.exit(
        main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), resumes)
    )
