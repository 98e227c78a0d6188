"""A real ``python -m rlhf stage=board``: what it takes, and that killing it loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from rlhf.board.jobs.store import Jobs
from tests.board.acting import acting, until
from tests.board.making import stage

__all__ = ["acting"]


@dataclass
class Board:
    process: "subprocess.Popen[str]"
    browser: httpx.Client
    seconds: float  # from its start to its first page

    def post(self, path: str) -> httpx.Response:
        return self.browser.post(path, headers={"origin": str(self.browser.base_url).rstrip("/")})


@contextmanager
def board(runs: Path) -> Iterator[Board]:
    """A board of its own process, let in; killed at the end if it still runs."""
    command = [sys.executable, "-m", "rlhf", "stage=board", f"run.dir={runs}", "stage.port=0"]
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


def _is_dead(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
