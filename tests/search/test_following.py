"""A trial's metrics.jsonl while it grows: lines that are written anew, cut off, torn."""

import json
import math
from pathlib import Path
from typing import Any

from rlhf.search.following import Follower


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_each_step_comes_once_and_torn_lines_wait(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path, "loss")
    assert follower.values() == [] and follower.step is None
    path.write_bytes(lines({"step": 0, "loss": 3.0}) + b'{"step": 1, "lo')
    assert follower.values() == [(0, 3.0)] and follower.step == 0
    path.write_bytes(lines({"step": 0, "loss": 3.0}, {"step": 1, "loss": 2.0}))
    assert follower.values() == [(1, 2.0)]
    assert follower.values() == [] and follower.step == 1


def test_the_last_line_may_get_the_figure_later(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path, "eval_loss")
    path.write_bytes(lines({"step": 1}, {"step": 2, "loss": 1.0}))
    assert follower.values() == [] and follower.step == 2
    path.write_bytes(lines({"step": 1}, {"step": 2, "loss": 1.0, "eval_loss": 0.5}))
    assert follower.values() == [(2, 0.5)]


def test_a_run_that_went_back_tells_only_what_is_new(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path, "loss")
    rows = [{"step": step, "loss": 10.0 - step, "more": "x" * step} for step in range(5)]
    path.write_bytes(lines(*rows))
    assert len(follower.values()) == 5
    path.write_bytes(lines(*rows[:2]))
    assert follower.values() == [] and follower.step == 1
    # cut off and grown beyond the old length between two looks
    path.write_bytes(
        lines(
            *rows[:2], *({**row, "time_s": 12345.678} for row in rows[2:]), {"step": 5, "loss": 1.0}
        )
    )
    new = follower.values() or follower.values()
    assert new == [(5, 1.0)]


def test_no_number_and_no_finite_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        lines(
            {"step": 1, "loss": None, "nonfinite": ["loss"]}, {"step": 2, "loss": "x"}, {"step": 3}
        )
    )
    ((step, value),) = Follower(path, "loss").values()
    assert step == 1 and math.isnan(value)
    follower = Follower(path, None)
    assert follower.values() == [] and follower.step == 3
