"""What the harnesses share: starting programs of this checkout, and files of rows."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def environment(root: Path = ROOT, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a program that imports rlhf and benchmarks from `root`, whatever directory
    it starts in and whatever is installed. Nothing is fetched from a hub.
    """
    path = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {
        "PYTHONPATH": os.pathsep.join(path),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**os.environ, **ours, **(extra or {})}


def module(name: str, *arguments: str) -> list[str]:
    """The command `python -m name arguments`, with this interpreter."""
    return [sys.executable, "-m", name, *arguments]


def pinned(command: Sequence[str], cores: str | None) -> list[str]:
    """The command on the given cores, a list such as "0" or "0,1"; None: on whichever it likes."""
    return list(command) if cores is None else ["taskset", "-c", cores, *command]


def one_thread(cores: str | None) -> dict[str, str]:
    """The environment of a process that has one core: more threads than cores would wait for each
    other. Nothing is set for several cores.
    """
    alone = cores is not None and cores.isdigit()
    return {"OMP_NUM_THREADS": "1"} if alone else {}


def exit_code(command: Sequence[str]) -> int:
    """Run a command to its end; its output goes where this program's goes."""
    return subprocess.run(command, check=False, env=environment()).returncode


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A .jsonl file of the rows, in a directory that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def descendants(process: int) -> list[int]:
    """Ids of the processes that `process` started, and of those that these did."""
    found, waiting = [], [process]
    while waiting:
        for children in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # a process that has just ended
                started = [int(child) for child in children.read_text().split()]
                found += started
                waiting += started
    return found


def peak_mib(process: int) -> float:
    """The most that was resident of a living process; 0 where it has ended."""
    return _status_mib(process, "VmHWM")


def resident_mib(process: int) -> float:
    """What is resident of a living process; 0 where it has ended."""
    return _status_mib(process, "VmRSS")


def handles(process: int) -> int:
    """File descriptors of a living process that are open; 0 where it has ended."""
    with contextlib.suppress(OSError):
        return len(list(Path(f"/proc/{process}/fd").iterdir()))
    return 0


def _status_mib(process: int, name: str) -> float:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) / 1024
    return 0.0


# A small process between this one and the one that is measured: a process begins with the peak of
# the one that started it.
_WATCH = """
import os, sys
quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=quiet)
_, status, usage = os.wait4(child, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@dataclass(frozen=True, slots=True)
class StageRun:
    """One run of a stage in a process of its own."""

    seconds: float
    peak_gib: float  # of that process, its own processes not counted
    summary: dict[str, float]


def run_stage(command: Sequence[str], folder: Path) -> StageRun:
    """A command of stage=data. Raises RuntimeError where it fails."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-S", "-c", _WATCH, *command, f"run.dir={folder}", "run.name=bench"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=environment(),
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"stage=data ended with exit code {done.returncode}")
    written = (folder / "bench" / "data" / "summary.json").read_text(encoding="utf-8")
    return StageRun(seconds, int(done.stdout) / 2**20, json.loads(written)["metrics"])
