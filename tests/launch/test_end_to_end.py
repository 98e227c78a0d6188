"""Whole runs by launch=local: the same as by torchrun, also with a failure and a signal."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.run.tracking.files import read_jsonl
from tests.launch.launching import figures, finish, is_gone, start_whole, until
from tests.stages.test_resume import options, write_data

pytestmark = [pytest.mark.full, pytest.mark.distributed, pytest.mark.timeout(600)]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LOCAL = ["launch=local", "launch.ranks_per_node=2", "launch.grace_s=30"]


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_two_ranks_learn_what_they_learn_under_torchrun(
    tmp_path: Path, tiny_model: Callable[..., Path], stage: str
) -> None:
    write_data(tmp_path)
    ways = {"torchrun": ([*TORCHRUN, "-m", "rlhf"], []), "local": (["-m", "rlhf"], LOCAL)}
    for name, (before, after) in ways.items():
        given = [*options(stage, tmp_path, tiny_model(), name), "engine=zero2", *after]
        code, errors = finish(start_whole(tmp_path, [*before, *given]))
        assert code == 0, errors
    expected, found = figures(tmp_path / "torchrun" / stage), figures(tmp_path / "local" / stage)
    assert len(found) >= 5
    assert [sorted(row) for row in found] == [sorted(row) for row in expected]
    for row, same in zip(found, expected, strict=True):
        assert row == pytest.approx(same, abs=1e-6)


def test_bad_input_is_the_first_cause(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    write_data(tmp_path)
    given = [*options("sft", tmp_path, tiny_model(), "bad"), "engine=zero2", *LOCAL]
    missing = [word for word in given if not word.startswith("data.path=")]
    missing.append(f"data.path={tmp_path}/missing.jsonl")
    code, errors = finish(start_whole(tmp_path, ["-m", "rlhf", *missing]))
    assert code == 1
    last = errors.strip().splitlines()[-1]
    assert "failed first" in last and "missing.jsonl" in last


def test_a_signal_saves_and_the_run_goes_on(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    write_data(tmp_path)
    given = [*options("grpo", tmp_path, tiny_model(), "stopped"), "engine=zero2", *LOCAL]
    given += ["stage.steps=40", "stage.save_steps=0"]
    run = tmp_path / "stopped" / "grpo"
    process = start_whole(tmp_path, ["-m", "rlhf", *given])
    metrics = run / "metrics.jsonl"
    until(lambda: metrics.is_file() and len(read_jsonl(metrics)) >= 2, 200.0)
    process.send_signal(signal.SIGTERM)
    code, _ = finish(process)
    assert code == 128 + signal.SIGTERM
    steps = len(read_jsonl(metrics))
    assert steps < 40
    assert (run / "checkpoints" / f"step-{steps}").is_dir()
    again = [*given, "run.resume=true", f"stage.steps={steps + 1}", "stage.scheduler=constant"]
    code, errors = finish(start_whole(tmp_path, ["-m", "rlhf", *again]))
    assert code == 0, errors
    assert len(read_jsonl(metrics)) == steps + 1


def test_a_killed_rank_ends_the_other(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    write_data(tmp_path)
    given = [*options("grpo", tmp_path, tiny_model(), "killed"), "engine=zero2", *LOCAL]
    process = start_whole(tmp_path, ["-m", "rlhf", *given, "stage.steps=400"])
    metrics = tmp_path / "killed" / "grpo" / "metrics.jsonl"
    until(lambda: metrics.is_file() and len(read_jsonl(metrics)) >= 1, 200.0)
    ranks = [int(pid) for pid in _children(process.pid)]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    began = time.monotonic()
    code, errors = finish(process)
    assert code == 128 + signal.SIGKILL
    assert "rank 1" in errors.strip().splitlines()[-1]
    assert time.monotonic() - began < 60
    assert all(is_gone(pid) for pid in ranks)


def _children(pid: int) -> list[int]:
    """In the order in which they were started."""
    import psutil

    return sorted(child.pid for child in psutil.Process(pid).children())
