"""The judge of `make chaos`: it sees a torn or doubled line, a torn checkpoint and a figure that is another one."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf import checkpoints
from rlhf.rss import Resident
from rlhf.stages import chaos

STRAIGHT = [{"step": step, "time_s": 1.0, "loss/policy": 0.5 / step} for step in (1, 2, 3)]


def finished(folder: Path, rows: list[dict[str, Any]], end: str = "\n") -> Path:
    """A run directory as a finished run leaves it."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(b"w")
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + end, encoding="utf-8")
    with checkpoints.written(folder / "checkpoints" / "step-2", keep=2) as side:
        (side / "state").write_text("2", encoding="utf-8")
    return folder


def test_a_run_like_the_straight_one_has_no_problem(tmp_path: Path) -> None:
    rows = [row | {"time_s": 9.0, "memory/rss_mb": 3.0, "train/tokens_per_s": 1.0} for row in STRAIGHT]
    assert chaos.check_finished(finished(tmp_path / "run", rows), STRAIGHT, same=True) == []


@pytest.mark.parametrize(
    ("rows", "end", "same", "said"),
    [
        ([*STRAIGHT[:2], STRAIGHT[1], STRAIGHT[2]], "\n", True, r"has the steps \[1, 2, 2, 3\]"),
        (STRAIGHT[:2], "\n", True, r"has the steps \[1, 2\]"),
        (STRAIGHT, "", True, "torn"),
        ([*STRAIGHT[:2], STRAIGHT[2] | {"loss/policy": 0.17}], "\n", True, "step 3: loss/policy differ"),
        ([*STRAIGHT[:2], {"step": 3, "time_s": 1.0}], "\n", True, "step 3: loss/policy differ"),
    ],
)
def test_a_wrong_line_is_seen(tmp_path: Path, rows: list[dict[str, Any]], end: str, same: bool, said: str) -> None:
    (problem,) = chaos.check_finished(finished(tmp_path / "run", rows, end), STRAIGHT, same=same)

    assert re.search(said, problem)


def test_figures_may_differ_where_the_fault_changes_them(tmp_path: Path) -> None:
    rows = [*STRAIGHT[:2], STRAIGHT[2] | {"loss/policy": 0.17}]
    assert chaos.check_finished(finished(tmp_path / "run", rows), STRAIGHT, same=False) == []


def test_torn_checkpoints_leftovers_and_a_missing_model_are_seen(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", STRAIGHT)
    chaos.tear_newest(run)
    (run / "best.part").mkdir()
    (run / "model" / "model.safetensors").unlink()
    problems = " | ".join(chaos.check_finished(run, STRAIGHT, same=True))
    assert "step-2: " in problems and "best.part was left" in problems and "no model was saved" in problems


def test_the_report_fails_for_a_fault_that_was_not_survived(capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = chaos.Outcome(chaos.FAULTS[0], -9, lost=1), chaos.Outcome(chaos.FAULTS[1], 1, problems=["exit code 1 instead of -9"])
    assert chaos.report([good]) == 0
    assert chaos.report([good, bad]) == 1
    assert "2 faults tried, 1 survived; 1 steps were taken again" in capsys.readouterr().out


def test_resident_memory_sees_what_is_allocated() -> None:
    resident = Resident()
    assert resident.figures()["memory/growth_mb"] == 0.0
    block = bytearray(b"x" * (64 * 2**20))
    figures = resident.figures()
    assert 50 < figures["memory/growth_mb"] < 90 and figures["memory/peak_rss_mb"] >= figures["memory/rss_mb"] > 64
    del block
