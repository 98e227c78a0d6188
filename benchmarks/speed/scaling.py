"""How steps scale over ranks and servers: whole runs of the online stage on case a, each process on
one thread.

Two ranks share the work of one; two servers share the prompts. With one rank half of the machine
is idle, and so it is with one server: what is shown is what the second process adds.
"""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.shared import environment, module, pinned
from benchmarks.speed.cases import Case
from benchmarks.speed.ours import overrides
from benchmarks.speed.protocol import Figures
from benchmarks.speed.results import Result, spread, table
from benchmarks.speed.turns import cores_here
from rlhf.run.tracking.files import METRICS_FILE, read_jsonl
from rlhf.types import UserError

WARM_UP = 2  # steps that are not counted
PARTS = ("ranks", "servers")
_FIGURES = {
    "step_s": "time/step_s",
    "rollout_s": "time/rollout_s",
    "prepare_s": "time/prepare_s",
    "train_s": "time/update_s",
    "sync_s": "time/sync_s",
    "response_tokens": "rollout/response_tokens",
}


def run_command(
    part: str, count: int, case: Case, steps: int, folder: Path
) -> tuple[list[str], Path]:
    """The command of a run, and its run directory."""
    cores = cores_here(2)
    place = folder / f"scaling-{part}-{count}"
    place.mkdir(parents=True, exist_ok=True)
    if part == "servers":
        given = replace(case, way="server", server_cores=tuple(cores[:count]))
        launcher = module("rlhf")
        engine = ["engine=torch"]
    else:
        given = case
        nodes = ["--standalone", f"--nproc_per_node={count}", "-m", "rlhf"]
        launcher = module("torch.distributed.run", *nodes)
        engine = ["engine=zero0"]
    options = [*overrides(given, place), *engine, "engine.threads=1", f"stage.steps={steps}"]
    command = [*launcher, *options, "run.overwrite=true", "run.name=scaling"]
    return pinned(command, ",".join(cores)), place / "scaling" / "grpo"


def run_once(part: str, count: int, case: Case, steps: int, folder: Path) -> list[Figures]:
    """Figures of the steps of one run but the first. Raises UserError where it fails."""
    command, place = run_command(part, count, case, steps, folder)
    extra = {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment(extra=extra)
    )
    if done.returncode != 0:
        raise UserError(f"the run with {count} {part} failed:\n{done.stderr[-2000:]}")
    rows = [row for row in read_jsonl(place / METRICS_FILE) if "time/step_s" in row][WARM_UP:]
    return [figures_of(row) for row in rows]


def figures_of(row: Mapping[str, float]) -> Figures:
    """A step's line of metrics in the names of the bench."""
    out = {name: row[source] for name, source in _FIGURES.items()}
    out["update_s"] = out.pop("prepare_s") + out.pop("train_s")
    return out


def measure(
    part: str, case: Case, rounds: int, steps: int, folder: Path
) -> dict[str, list[Figures]]:
    """Runs with one and with two, in turn."""
    out: dict[str, list[Figures]] = {"1": [], "2": []}
    for _ in range(rounds):
        for count in (1, 2):
            out[str(count)] += run_once(part, count, case, steps, folder)
    return out


def scaling_table(results: Mapping[str, Result]) -> list[str]:
    """Markdown of the parts that were measured."""
    head = ("", "step, s", "generation, tokens/s", "update, tokens/s", "sync, s", "against one")
    rows: list[Sequence[str]] = []
    for part in PARTS:
        if part not in results:
            continue
        turns = results[part].turns
        one = spread(turns["1"], "step_s").median
        for count, steps in turns.items():
            step = spread(steps, "step_s")
            rows.append(
                (
                    f"{count} {part if count != '1' else part.removesuffix('s')}",
                    str(step),
                    str(spread(steps, "response_tokens", "rollout_s")),
                    str(spread(steps, "response_tokens", "update_s")),
                    str(spread(steps, "sync_s")),
                    f"{one / step.median:.2f}",
                )
            )
    return table(head, rows) if rows else []
