"""Whether a run's memory and open files grow: 200 steps of a tiny model, resident memory and
handles after the warm-up against those at the end; of its vLLM server as well, where it has one.

python -m benchmarks.soak                      runs and checks every case (minutes)
python -m benchmarks.soak --cases ppo sft      those of these names
python -m benchmarks.soak --check-only         checks the runs that are there
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.shared import (
    descendants,
    environment,
    handles,
    module,
    resident_mib,
    write_rows,
)
from rlhf.run import console
from rlhf.run.tracking.files import METRICS_FILE, read_jsonl
from rlhf.types import UserError

# steps: in all, left out at the start, and those whose median is one end of the comparison
STEPS, WARM_UP, WINDOW = 200, 40, 20
LIMIT = 0.02  # of growth
MORE_FILES = 5  # open files at the end: one a checkpoint would be more
WATCHED_FILE = "watched.json"  # what was seen from outside after each step (`Watched`)
_LOOK_S = 0.05  # between two looks at the metrics
COMMON = (
    "model=tiny",
    "model.tiny.vocab_size=300",
    "model.tiny.hidden_size=64",
    "model.tiny.intermediate_size=96",
    "model.tiny.layers=2",
    "model.tiny.heads=2",
    "model.tiny.max_positions=64",
    "tracking=none",
    f"stage.steps={STEPS}",
    "stage.save_steps=20",
)
_ONLINE = (
    "data.max_prompt_length=32",
    "rollout.max_response_length=16",
    "rollout.kv_cache_gib=0.05",
    "reward.function=benchmarks.soak:even_tokens",
    "stage.prompts_per_step=8",
)
_PPO = (
    "stage=ppo",
    *_ONLINE,
    "stage.critic_init=policy",
    "stage.reward_normalise=true",
    "stage.kl_controller=adaptive",
)
CASES: dict[str, tuple[str, ...]] = {
    "ppo": (*_PPO, "rollout=hf"),
    "ppo-zero2": (*_PPO, "rollout=hf", "engine=zero2"),
    "ppo-vllm": (*_PPO, "rollout=vllm"),
    "grpo-vllm-lora": (
        "stage=grpo",
        *_ONLINE,
        "stage.samples_per_prompt=2",
        "rollout=vllm",
        "adapter=lora",
        "adapter.rank=8",
    ),
    "grpo-server": (
        "stage=grpo",
        *_ONLINE,
        "stage.samples_per_prompt=2",
        "rollout=server",
        "rollout.server.threads=1",
        "stage.ahead=1",
    ),
    "sft": (
        "stage=sft",
        "stage.batch_size=8",
        "stage.max_length=32",
        "stage.eval_steps=20",
        "stage.log_steps=1",
    ),
}


def even_tokens(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """A reward that costs nothing: the share of even token ids."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def growth(resident: Sequence[float], warm_up: int = WARM_UP, window: int = WINDOW) -> float:
    """Median of the last `window` steps over that of the first `window` after the warm-up, less 1.
    Raises ValueError for fewer steps than that.
    """
    if len(resident) < warm_up + 2 * window:
        raise ValueError(
            f"{len(resident)} steps are too few: expected at least {warm_up + 2 * window}"
        )
    return (
        statistics.median(resident[-window:])
        / statistics.median(resident[warm_up : warm_up + window])
        - 1.0
    )


def stage_of(case: str) -> str:
    """The stage that a case runs, which names its run directory."""
    return CASES[case][0].removeprefix("stage=")


def rows_of(stage: str) -> list[dict[str, str]]:
    """Rows for the stage: prompts, or texts."""
    key = "text" if stage == "sft" else "prompt"
    words = ("alpha", "beta", "gamma", "delta")
    return [{key: f"{word} {number}"} for number in range(16) for word in words]


def has_server(case: str) -> bool:
    """Whether a case's run starts a vLLM server."""
    return "rollout=server" in CASES[case]


def run(directory: Path, case: str) -> None:
    """The run, in a process of its own. Raises CalledProcessError."""
    rows = write_rows(directory / f"soak_{stage_of(case)}.jsonl", rows_of(stage_of(case)))
    command = module("rlhf", *CASES[case], *COMMON)
    command += [
        f"run.dir={directory}",
        f"run.name=soak-{case}",
        f"data.path={rows}",
        "run.overwrite=true",
        "tracking.samples_every=0",
    ]
    place = directory / f"soak-{case}" / stage_of(case)
    with subprocess.Popen(command, env=environment()) as process:
        watched = watch(process, place / METRICS_FILE)
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)
    text = json.dumps(dataclasses.asdict(watched))
    (place / WATCHED_FILE).write_text(text, encoding="utf-8")


@dataclass(slots=True)
class Watched:
    """After each step, from outside the run."""

    servers_mib: list[float] = field(default_factory=list)  # resident memory of what it started
    handles: list[int] = field(default_factory=list)  # open files of the trainer
    servers_handles: list[int] = field(default_factory=list)


def watch(process: subprocess.Popen[bytes], metrics: Path) -> Watched:
    """Look at `process` and at all that it started after each line of `metrics`, until it ends."""
    seen = Watched()
    before = count_lines(metrics)  # of a run that this one replaces
    while process.poll() is None:
        time.sleep(_LOOK_S)
        lines = count_lines(metrics)
        if lines < before:
            before = 0
        new = lines - before - len(seen.handles)
        if new > 0:
            started = descendants(process.pid)
            seen.servers_mib += [sum(map(resident_mib, started))] * new
            seen.servers_handles += [sum(map(handles, started))] * new
            seen.handles += [handles(process.pid)] * new
    return seen


def count_lines(path: Path) -> int:
    """0 where there is no such file."""
    if not path.is_file():
        return 0
    return path.read_bytes().count(b"\n")


def resident_of(directory: Path, case: str) -> list[float]:
    """Resident memory after each step that was logged, MiB. Raises UserError for a run that is not
    there.
    """
    path = directory / f"soak-{case}" / stage_of(case) / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such run. Leave --check-only out to run it.")
    return [row["memory/rss_mb"] for row in read_jsonl(path) if "memory/rss_mb" in row]


def watched_of(directory: Path, case: str) -> Watched:
    """What was seen of a run from outside; nothing of one that was not watched."""
    path = directory / f"soak-{case}" / stage_of(case) / WATCHED_FILE
    if not path.is_file():
        return Watched()
    return Watched(**json.loads(path.read_text(encoding="utf-8")))


def more_files(handles: Sequence[int], warm_up: int = WARM_UP, window: int = WINDOW) -> int:
    """The most of the last `window` steps less that of the first `window` after the warm-up: idle
    connections to servers are closed after some seconds, so that most steps have fewer.
    """
    return max(handles[-window:]) - max(handles[warm_up : warm_up + window])


def memory_row(name: str, resident: Sequence[float]) -> tuple[bool, dict[str, str]]:
    """Whether the growth is within the limit, and a row of the table."""
    grown = growth(resident)
    return _row(name, [f"{value:.1f}" for value in resident], f"{grown:+.2%}", grown <= LIMIT)


def files_row(name: str, handles: Sequence[int]) -> tuple[bool, dict[str, str]]:
    """The same of open files."""
    more = more_files(handles)
    return _row(name, [str(value) for value in handles], f"{more:+d}", more <= MORE_FILES)


def _row(name: str, values: Sequence[str], grown: str, passes: bool) -> tuple[bool, dict[str, str]]:
    steps = (WARM_UP, 80, 120, 160, STEPS)
    at = {f"step {step}": values[min(step, len(values)) - 1] for step in steps}
    return passes, {"case": name, **at, "growth": grown, "passes": "yes" if passes else "no"}


def judge(directory: Path, case: str) -> list[tuple[bool, dict[str, str]]]:
    """Rows of a case, and whether each passes. Raises UserError for a run that is not there."""
    out = [memory_row(case, resident_of(directory, case))]
    watched = watched_of(directory, case)
    if has_server(case):
        out.append(memory_row(f"{case}: server", watched.servers_mib))
    if watched.handles:
        out.append(files_row(f"{case}: files", watched.handles))
    if watched.handles and has_server(case):
        out.append(files_row(f"{case}: server's files", watched.servers_handles))
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 where no case's memory grows beyond the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", default="runs", type=Path, help="root of the runs' directories")
    parser.add_argument(
        "--cases", nargs="+", choices=sorted(CASES), default=list(CASES), help="cases to run"
    )
    parser.add_argument("--check-only", action="store_true", help="check the runs that are there")
    given = parser.parse_args(arguments)
    found = []
    for case in given.cases:
        if not given.check_only:
            run(given.dir, case)
        found += judge(given.dir, case)
    title = f"resident memory, MiB, and open files, of runs of {STEPS} steps"
    console.table([row for _, row in found], title=title)
    print(
        f"growth is from steps {WARM_UP + 1}-{WARM_UP + WINDOW} to {STEPS - WINDOW + 1}-{STEPS}, "
        f"medians; at most {LIMIT:.0%} passes, and {MORE_FILES} open files more, maxima"
    )
    return 0 if all(passes for passes, _ in found) else 1


if __name__ == "__main__":
    sys.exit(main())
