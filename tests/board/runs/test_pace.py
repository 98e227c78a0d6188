"""How long a run takes, as earlier ones took, and as its own steps so far took."""

import platform
from pathlib import Path
from typing import Any

import pytest

from rlhf.board.app import Place
from rlhf.board.jobs.store import Jobs
from rlhf.board.runs.pace import estimate, left, seconds_a_step, work_of
from tests.board.acting import acting, until
from tests.board.making import client, metric_line, stage

__all__ = ["acting"]

WORK = {"stage": "sft", "steps": 100, "rows": 8, "parameters": 1000, "machine": platform.node()}


def ended(jobs: Jobs, run: str, **work: Any) -> None:
    job = jobs.submit(["act=words"], title=run, run=run, stage="sft", work={**WORK, **work})
    until(lambda: not jobs.job(job.id).is_active)


def test_as_the_newest_run_that_is_like_it(acting: Path) -> None:
    """Steps in `stage` take 1.5 s each."""
    jobs = Jobs(acting)
    assert estimate(WORK, jobs.jobs(), acting) is None
    stage(acting, "like", "sft")
    ended(jobs, "like", rows=4)
    for run, other in (("large", {"parameters": 2000}), ("away", {"machine": "elsewhere"})):
        stage(acting, run, "sft")
        ended(jobs, run, **other)
    ended(jobs, "nothing yet")
    found = estimate(WORK, jobs.jobs(), acting)
    assert found is not None and found.other.run == "like"
    assert (found.other_pace, found.other_rows) == (pytest.approx(1.5), 4)
    assert found.seconds == pytest.approx(100 * 1.5 * 2), "twice the rows in each step"
    # another job at its run directory, of which nothing is known: the metrics are that one's now
    job = jobs.submit(["act=words"], title="like", run="like", stage="sft")
    until(lambda: not jobs.job(job.id).is_active)
    assert estimate(WORK, jobs.jobs(), acting) is None


def test_what_is_left(tmp_path: Path) -> None:
    folder = stage(tmp_path, "a", "sft", steps=range(1, 41))
    assert left(WORK, folder / "metrics.jsonl") == pytest.approx(60 * 1.5)
    assert left({**WORK, "steps": 10}, folder / "metrics.jsonl") == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "lines", [[], [metric_line(1)], ["{"], [metric_line(3), metric_line(2)], ['{"step": 1}'] * 2]
)
def test_nothing_is_known_before_the_second_step(tmp_path: Path, lines: list[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    assert seconds_a_step(path) is None
    path.write_text("".join(line + "\n" for line in lines))
    assert seconds_a_step(path) is None and left(WORK, path) is None


def test_a_dry_run_without_a_model_of_known_size() -> None:
    assert work_of({}) is None and work_of({"work": {"steps": 1, "parameters": 0}}) is None
    assert work_of({"work": {"steps": 1, "parameters": 7}}) == {
        "steps": 1,
        "parameters": 7,
        "machine": platform.node(),
    }


def test_the_page_of_a_run_says_it(acting: Path) -> None:
    place = Place(acting, acting.parent / "uploads", 1 << 20, False)
    browser = client(place)
    stage(acting, "a", "sft", steps=range(1, 41))
    job = place.jobs.submit(["act=run"], title="a", run="a", stage="sft", work=WORK)
    until(lambda: place.jobs.job(job.id).state == "running")
    assert browser.get("/runs/a/sft/live").json()["left"] == "1:30"
    assert '<dd data-field="left">1:30</dd>' in browser.get("/runs/a/sft").text
    other = place.jobs.submit(["act=run"], title="b", run="b", stage="sft", work=WORK)
    assert "not known before" in browser.get("/runs/b/sft/live").json()["left"]
    for each in (other, job):
        place.jobs.kill(each.id)
    until(lambda: not place.jobs.job(job.id).is_active)
    assert browser.get("/runs/a/sft/live").json()["left"] == ""
