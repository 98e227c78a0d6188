"""Jobs that play a part in place of ``python -m rlhf ...``: a second to start would be too long.

The processes that a job starts read a sitecustomize.py of the test, which plays the part that an
argument ``act=...`` names, before anything of ours is imported. The supervisor is the real one.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

_PARTS = """
import os, signal, subprocess, sys, time

def act(part):
    if part == "words":
        print("first", flush=True)
        print(os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
    elif part == "much":
        for _ in range(30):
            os.write(2, b"x" * 65536)
    elif part == "fail":
        print("error: data.path=none: no such file.", file=sys.stderr)
        os._exit(1)
    elif part in ("run", "stubborn"):
        def save(*_):
            print("asked", flush=True)
            if part == "run":
                print("saved", flush=True)
                os._exit(143)
        signal.signal(signal.SIGTERM, save)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"],
                                 start_new_session=part == "stubborn")
        print("child", child.pid, flush=True)
        until = time.time() + 120
        while time.time() < until:
            time.sleep(0.05)
    os._exit(0)

parts = [word[4:] for word in sys.orig_argv if word.startswith("act=")]
if parts and sys.orig_argv[1:3] == ["-m", "rlhf"]:
    act(parts[0])
"""


@pytest.fixture
def acting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes ``act=...`` work in processes started from here; an empty run.dir."""
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "sitecustomize.py").write_text(_PARTS)
    root = Path(__file__).resolve().parents[2]
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{parts}:{root}:{before}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    runs = tmp_path / "runs"
    runs.mkdir()
    return runs


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until `condition` holds; a machine under load is given a minute."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s in vain"
        time.sleep(0.02)
