"""What the harnesses share: starting programs of this checkout, and files of rows."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
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


def exit_code(command: Sequence[str]) -> int:
    """Run a command to its end; its output goes where this program's goes."""
    return subprocess.run(command, check=False, env=environment()).returncode


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A .jsonl file of the rows, in a directory that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path
