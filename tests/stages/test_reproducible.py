"""Two runs with one seed, each in a process of its own, give the same metrics, samples and weights
to the bit; another seed gives others. Part of it every test run holds: tests/stages/test_resume.py
compares the second half of a run with that of another process.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.stages.test_resume import options, rows, run, write_data

pytestmark = pytest.mark.full
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, sys
from rlhf.__main__ import main

for given in json.loads(sys.argv[1]):
    assert main(given) == 0
"""
ONLINE = [
    "stage.steps=2",
    "stage.save_steps=0",
    "stage.reference_every=0",
    "stage.samples_per_prompt=2",
]
VLLM = [*ONLINE, "rollout=vllm", "rollout.kv_cache_gib=0.05"]
FAST = {"ppo": ONLINE, "sft": ["stage.steps=3", "stage.eval_steps=3"]}


def elsewhere(commands: list[list[str]]) -> None:
    """The commands in a new process, of another hash seed."""
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONHASHSEED": "17",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def same_runs(one: Path, other: Path) -> bool:
    """Whether metrics, samples and every file of weights are equal."""
    assert len(rows(one / "metrics.jsonl")) >= 2 and rows(one / "samples.jsonl"), (
        "there is something to compare"
    )
    weights = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert [path for path in weights if path.parent.name == "model"]
    lines = [
        [rows(place / name) for name in ("metrics.jsonl", "samples.jsonl")]
        for place in (one, other)
    ]
    return lines[0] == lines[1] and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in weights
    )


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., Path],
    one_thread: Iterator[None],
) -> Path:
    """Every stage here as `here`, as `seed` with another seed, and as `there` in another
    process.
    """
    folder = tmp_path_factory.mktemp("reproducible")
    write_data(folder)
    for stage, more in FAST.items():
        run(stage, [*options(stage, folder, tiny_model(), "here"), *more])
        run(stage, [*options(stage, folder, tiny_model(), "seed"), *more, "run.seed=1"])
    elsewhere(
        [[*options(stage, folder, tiny_model(), "there"), *more] for stage, more in FAST.items()]
    )
    return folder


@pytest.mark.parametrize("stage", FAST)
def test_one_seed_gives_the_same_run_in_two_processes(folder: Path, stage: str) -> None:
    assert same_runs(folder / "here" / stage, folder / "there" / stage)


@pytest.mark.parametrize("stage", FAST)
def test_another_seed_gives_another_run(folder: Path, stage: str) -> None:
    here, seed = folder / "here" / stage, folder / "seed" / stage
    assert not same_runs(here, seed)
    for ours, theirs in zip(
        rows(here / "metrics.jsonl")[1:], rows(seed / "metrics.jsonl")[1:], strict=True
    ):
        assert {name: ours[name] for name in ours if "loss" in name} != {
            name: theirs[name] for name in theirs if "loss" in name
        }


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(1200)
def test_vllms_rollouts_are_the_same_in_two_processes(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    write_data(tmp_path)
    given = {
        name: [*options("ppo", tmp_path, tiny_model(), name), *VLLM]
        for name in ("here", "there", "seed")
    }
    elsewhere([given["here"]])
    elsewhere([given["there"], [*given["seed"], "run.seed=1"]])
    here, there, seed = (tmp_path / name / "ppo" for name in ("here", "there", "seed"))
    assert same_runs(here, there) and not same_runs(here, seed)
