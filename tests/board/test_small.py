"""The board stays small: its process loads no torch, no transformers and no engine."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOADED = """
import sys
import rlhf.cli.command, rlhf.stages.board
from rlhf.board.app import create_app
from rlhf.board.pages import PAGES
heavy = {"torch", "transformers", "vllm", "deepspeed", "pandas", "pyarrow", "matplotlib"}
print(sorted(heavy & set(sys.modules)))
"""


def test_no_heavy_library_is_loaded() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert ended.stdout.strip() == "[]"
