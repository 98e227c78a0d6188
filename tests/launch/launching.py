"""Command lines that launch stand-ins, and what those left."""

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from rlhf.run.tracking.files import read_jsonl

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = Path(__file__).with_name("stand_in.py")
# of stages that never run: the stand-ins load nothing
SFT = ["stage=sft", "model.path=m", "data.path=d", "tracking=none"]
PPO = [*SFT[1:], "stage=ppo", "reward.path=r", "engine=zero2"]
TOKEN = "RLHF_ROLLOUT_TOKEN"


def interpreter(folder: Path) -> Path:
    """An executable for launch.python: the stand-in for ``-m rlhf``, Python for all else."""
    path = folder / "python"
    text = f"""#!/bin/sh
if [ "$1 $2" = "-m rlhf" ]; then exec {sys.executable} {STAND_IN} "$@"; fi
exec {sys.executable} "$@"
"""
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def start(
    folder: Path, arguments: list[str], environment: Mapping[str, str] | None = None
) -> "subprocess.Popen[str]":
    """``python -m rlhf`` with stand-ins in place of its processes; runs in `folder`."""
    python = interpreter(folder)
    command = [sys.executable, "-m", "rlhf", *arguments]
    command += [f"launch.python={python}", f"run.dir={folder}/runs"]
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", TOKEN)}
    variables = {"PYTHONPATH": str(ROOT), "STAND_IN_OUT": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command,
        env=kept | variables | dict(environment or {}),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(
    folder: Path,
    arguments: list[str],
    environment: Mapping[str, str] | None = None,
    limit_s: float = 60.0,
) -> tuple[int, str, str]:
    """Exit code, output and errors of such a command."""
    with start(folder, arguments, environment) as process:
        out, errors = process.communicate(timeout=limit_s)
    return process.returncode, out, errors


# what differs from run to run: prefixes and the suffix of speeds
_TIMES = ("time", "memory/", "sync/")
_SPEED = "_per_s"


def start_whole(
    folder: Path, words: list[str], environment: Mapping[str, str] | None = None
) -> "subprocess.Popen[str]":
    """Python with `words`, such as ``-m rlhf ...``, for real runs on this machine's cores."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", TOKEN)}
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *words],
        env=kept | variables | {"PYTHONHASHSEED": "17"} | dict(environment or {}),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]", limit_s: float = 500.0) -> tuple[int, str]:
    """Exit code and errors of a real run."""
    with process:
        out, errors = process.communicate(timeout=limit_s)
    print(out[-2000:], errors[-4000:])
    return process.returncode, errors


def figures(run: Path) -> list[dict[str, object]]:
    """The metrics of each step that are the same in each run."""
    rows = read_jsonl(run / "metrics.jsonl")
    return [{key: row[key] for key in row if _is_same(key)} for row in rows]


def _is_same(key: str) -> bool:
    return not key.startswith(_TIMES) and not key.endswith(_SPEED)


def record(folder: Path, name: str) -> dict[str, Any]:
    """How a stand-in was started."""
    loaded: dict[str, Any] = json.loads((folder / f"started-{name}.json").read_text())
    return loaded


def until(condition: Callable[[], Any], limit_s: float = 20.0) -> Any:
    """What `condition` returns once it is true."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError("the condition did not become true")


def is_gone(pid: int) -> bool:
    """Whether a process has ended and was waited for."""
    return not psutil.pid_exists(pid)
