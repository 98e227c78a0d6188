"""The list of runs: what each state follows from, what is shown, how long it takes."""

import subprocess
import sys
import time
from pathlib import Path

from rlhf.board.app import Place
from rlhf.board.runs.listing import Runs, search
from rlhf.board.runs.metrics import Newest
from tests.board.acting import acting, until
from tests.board.making import metric_line, stage

__all__ = ["acting"]


def place_of(runs: Path) -> Place:
    return Place(runs, runs / ".board" / "uploads", 1 << 20, False)


def state_of(place: Place, run: str, name: str) -> str:
    held = {(found.run, found.stage): found.state for found in Runs(place).stages()}
    return held[run, name]


def test_runs_are_found_with_their_figures(tmp_path: Path) -> None:
    stage(tmp_path, "film <b> 电影", "sft", ended=True)
    stage(tmp_path, "other", "ppo")
    (tmp_path / "other" / "servers").mkdir()
    (tmp_path / ".encoded" / "x").mkdir(parents=True)
    (tmp_path / ".encoded" / "x" / "config.yaml").touch()
    (tmp_path / "file").touch()
    held = {found.id: found for found in Runs(place_of(tmp_path)).stages()}
    assert set(held) == {"film <b> 电影/sft", "other/ppo"}
    ended, stopped = held["film <b> 电影/sft"], held["other/ppo"]
    assert (ended.state, ended.steps, ended.seconds) == ("ended", 10, 61.0)
    assert (stopped.state, stopped.steps, stopped.seconds) == ("stopped", 10, 15.0)
    assert stopped.headlines() == [("loss", 1.9)]
    assert ended.link == "/runs/film%20%3Cb%3E%20%E7%94%B5%E5%BD%B1/sft"


def test_links_that_lead_out_are_not_listed(tmp_path: Path) -> None:
    outside, runs = tmp_path / "outside", tmp_path / "runs"
    stage(outside, "x", "sft")
    folder = stage(runs, "mine", "sft")
    (runs / "out").symlink_to(outside / "x")
    (runs / "mine" / "ppo").symlink_to(outside / "x" / "sft")
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").symlink_to(outside / "x" / "sft" / "metrics.jsonl")
    (held,) = Runs(place_of(runs)).stages()
    assert held.id == "mine/sft" and held.newest == Newest()


def test_a_run_from_a_terminal_runs_while_it_has_its_metrics_open(tmp_path: Path) -> None:
    folder = stage(tmp_path, "a", "sft")
    place = place_of(tmp_path)
    program = "import sys; file = open(sys.argv[1], 'r+b'); print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(folder / "metrics.jsonl")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stdout.readline()
        assert state_of(place, "a", "sft") == "running"
        process.kill()
    assert state_of(place, "a", "sft") == "stopped"
    with (folder / "metrics.jsonl").open("rb"):  # reading it is no sign
        assert state_of(place, "a", "sft") == "stopped"


def test_a_job_says_more_than_the_files(acting: Path) -> None:
    place = place_of(acting)
    stage(acting, "a", "sft")
    failing = place.jobs.submit(["act=fail"], title="t", run="a", stage="sft")
    until(lambda: not place.jobs.job(failing.id).is_active)
    assert state_of(place, "a", "sft") == "failed"
    running = place.jobs.submit(["act=run"], title="t", run="a", stage="sft")
    waiting = place.jobs.submit(["act=words"], title="t", run="new", stage="ppo")
    assert state_of(place, "a", "sft") == "running"
    assert state_of(place, "new", "ppo") == "queued", "it has no folder yet"
    place.jobs.stop(waiting.id)
    place.jobs.kill(running.id)
    until(lambda: state_of(place, "a", "sft") == "stopped")


def test_search(tmp_path: Path) -> None:
    stage(tmp_path, "Film one", "sft", ended=True)
    stage(tmp_path, "Film two", "ppo")
    held = Runs(place_of(tmp_path)).stages()
    assert len(search(held, "", {})) == 2
    assert [found.run for found in search(held, "film PPO", {})] == ["Film two"]
    assert [found.run for found in search(held, "ended", {})] == ["Film one"]
    assert search(held, "film absent", {}) == []
    assert [found.run for found in search(held, "已停止", {"stopped": "已停止"})] == ["Film two"]


def test_fifty_runs_of_ten_thousand_lines(tmp_path: Path) -> None:
    """The bound is loose for slow machines; the aim is one second, and the time is printed."""
    figures = {f"metric/{number}": 0.125 for number in range(20)}
    text = "".join(metric_line(step, loss=1.0, **figures) + "\n" for step in range(10_000))
    for number in range(50):
        folder = stage(tmp_path, f"run {number}", "sft")
        (folder / "metrics.jsonl").write_text(text)
    runs = Runs(place_of(tmp_path))
    start = time.perf_counter()
    held = runs.stages()
    first = time.perf_counter() - start
    assert len(held) == 50
    assert {found.newest.step for found in held} == {9_999}
    start = time.perf_counter()
    assert runs.stages() == held
    again = time.perf_counter() - start
    size = len(text) * 50 / 2**20
    print(f"50 runs of 10,000 lines ({size:.0f} MiB): {first:.3f} s, again {again:.3f} s")
    assert first < 10 and again < 10
