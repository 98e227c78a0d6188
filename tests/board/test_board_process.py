"""A real ``python -m rlhf stage=board``: what it takes, and that killing it loses nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from rlhf.board.jobs.store import Jobs
from tests.board.acting import acting, until
from tests.board.making import stage
from tests.offline import trl_tools

__all__ = ["acting"]


@dataclass
class Board:
    process: "subprocess.Popen[str]"
    browser: httpx.Client
    seconds: float  # from its start to its first page

    def post(self, path: str, **fields: str) -> httpx.Response:
        origin = str(self.browser.base_url).rstrip("/")
        return self.browser.post(path, headers={"origin": origin}, data=fields)


@contextmanager
def board(runs: Path, *options: str) -> Iterator[Board]:
    """A board of its own process, let in; killed at the end if it still runs."""
    command = [sys.executable, "-m", "rlhf", "stage=board", f"run.dir={runs}", "stage.port=0"]
    command += options
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=runs) as process:
        try:
            assert process.stdout is not None
            link = process.stdout.readline().removeprefix("board: ").strip()
            with httpx.Client(base_url=link.partition("/?")[0], timeout=60) as browser:
                assert browser.get(link, follow_redirects=True).status_code == 200
                yield Board(process, browser, time.monotonic() - start)
        finally:
            process.kill()


def test_it_starts_small_and_ends_on_a_signal(acting: Path) -> None:
    """The aim is 4 s; the bound is loose for machines under load."""
    with board(acting) as held:
        assert held.browser.get("/runs").status_code == 200
        memory = psutil.Process(held.process.pid).memory_info().rss / 2**20
        print(f"first page after {held.seconds:.2f} s, {memory:.0f} MiB")
        assert memory < 300 and held.seconds < 40
        held.process.send_signal(signal.SIGTERM)
        assert held.process.wait(30) == 0


def test_killing_the_board_loses_nothing(acting: Path) -> None:
    """A run that the page started goes on, is found by a new board, stopped there and resumed; the
    queue goes on while there is no board.
    """
    for run, part in (("long", "run"), ("short", "words")):
        folder = stage(acting, run, "sft")
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["starts"] = [{"argv": ["stage=sft", f"act={part}"], "step": 0}]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    jobs = Jobs(acting)
    with board(acting) as first:
        for run in ("long", "short"):
            assert first.post(f"/runs/{run}/sft/resume").status_code == 303
        first.process.kill()
        first.process.wait()
    running = jobs.of_run("long", "sft")
    assert running is not None and running.state == "running"
    until(lambda: b"child" in jobs.output(running.id, 0)[0])
    with board(acting) as second:
        live = second.browser.get("/runs/long/sft/live").json()
        assert live["state"] == "running" and "child" in live["log"]
        waiting = jobs.of_run("short", "sft")
        assert waiting is not None and waiting.state == "queued"
        assert second.post(f"/jobs/{running.id}/stop").status_code == 303
        second.process.kill()
        second.process.wait()
    until(lambda: jobs.job(running.id).state == "stopped")
    assert b"saved" in jobs.output(running.id, 0)[0]
    until(lambda: jobs.job(waiting.id).state == "ended")
    with board(acting) as third:
        assert third.post("/runs/long/sft/resume").status_code == 303
        again = jobs.of_run("long", "sft")
        assert again is not None and again.id != running.id
        until(lambda: jobs.job(again.id).state == "running")
        jobs.kill(again.id)
        until(lambda: not jobs.job(again.id).is_active)
    claimed = json.loads((again.folder / "supervisor.json").read_text())
    until(lambda: not psutil.pid_exists(claimed["pid"]) or _is_dead(claimed["pid"]))
    assert os.getpid() != claimed["pid"]


@pytest.mark.slow
def test_killing_the_board_loses_nothing_of_a_real_run(
    tmp_path: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun by the form of one board, which is killed in the middle; a second board shows it, stops
    it and resumes it, is killed too, and a third sees it come to its end.
    """
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    trl_tools.write_rows(tmp_path / "sft.jsonl", trl_tools.sft_rows(30))
    runs, steps = tmp_path / "runs", 400
    runs.mkdir()
    fields = {
        "run.name": "film",
        "model.path": str(tiny_model()),
        "data.path": str(tmp_path / "sft.jsonl"),
        "stage.steps": str(steps),
        "stage.batch_size": "8",
        "stage.max_length": "48",
        "stage.save_steps": "0",
        "model.dtype": "float32",
        "engine.threads": "1",
        "tracking": "none",
    }
    allowed = f"stage.folders=[{tmp_path},{Path(fields['model.path']).parent}]"
    jobs, page = Jobs(runs), "/runs/film/sft"

    def step(held: Board) -> int:
        return int(held.browser.get(f"{page}/live").json()["steps"] or 0)

    with board(runs, allowed) as first:
        checked = re.search(
            'name="checked" value="([^"]+)"', first.post("/new/sft/check", **fields).text
        )
        assert checked is not None
        assert first.post("/new/sft/start", checked=checked[1]).status_code == 303
        until(lambda: step(first) >= 3, 240)
        assert re.fullmatch(r"\d+:\d\d", first.browser.get(f"{page}/live").json()["left"])
        first.process.kill()
        first.process.wait()
    running = jobs.of_run("film", "sft")
    assert running is not None and running.state == "running"
    with board(runs, allowed) as second:
        seen = step(second)
        until(lambda: step(second) > seen, 60)
        assert second.post(f"/jobs/{running.id}/stop").status_code == 303
        until(lambda: not jobs.job(running.id).is_active, 120)
        assert jobs.job(running.id).state == "stopped"
        assert not (runs / "film" / "sft" / "summary.json").exists()
        assert second.post(f"{page}/resume").status_code == 303
        second.process.kill()
        second.process.wait()
    again = jobs.of_run("film", "sft")
    assert again is not None and again.id != running.id
    with board(runs, allowed) as third:
        until(lambda: not jobs.job(again.id).is_active, 400)
        assert jobs.job(again.id).state == "ended", jobs.output(again.id, -4000)[0].decode()
        assert step(third) == steps
    manifest = json.loads((runs / "film" / "sft" / "manifest.json").read_text())
    assert len(manifest["starts"]) == 2 and manifest["starts"][1]["step"] > seen
    lines = (runs / "film" / "sft" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines][-1] == steps


def _is_dead(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
