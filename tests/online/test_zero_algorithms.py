"""Algorithms that compare responses within groups take the same steps on two ranks under ZeRO as
the plain engine in one process.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.online.test_zero_online import launch, start_folder
from tests.selection import marked_full, selected

pytestmark = pytest.mark.distributed
SIZES = "stage.samples_per_prompt=4:stage.epochs=1"
RUNS = [
    ("zero2:none", f"stage=grpo:{SIZES}"),
    ("zero3:lora", f"stage=grpo:{SIZES}"),
    ("zero1:none", f"stage=online_dpo:{SIZES}:stage.kl_coef=0.0"),
    ("zero3:none", f"stage=dapo:{SIZES}:stage.overlong_buffer=2"),
    ("zero2:none", f"stage=raft:{SIZES}"),
]
# tests/online/test_zero_online.py has ZeRO-1 with an adapter and ZeRO-3 without one.
CASES = marked_full(RUNS, keep=[RUNS[0]])
COMPARED = (
    "objective/scores",
    "objective/kl",
    "objective/entropy",
    "loss/policy",
    "loss/kl",
    "policy/updates",
    "group/equal",
)


def run_directory(folder: Path, run: str) -> Path:
    preset = next(part for part in run.split(":") if part.startswith("stage=")).removeprefix(
        "stage="
    )
    return folder / run.replace(":", "-").replace("=", "_") / preset


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = start_folder(tmp_path_factory.mktemp("zero-algorithms"))
    wanted = selected(request, "engine", "settings")
    cases = [case for case in RUNS if case in wanted]
    plain = dict.fromkeys(f"torch:{engine.split(':')[1]}:{settings}" for engine, settings in cases)
    launch(folder, 1, folder / "start", list(plain))
    launch(folder, 2, folder / "start", [f"{engine}:{settings}" for engine, settings in cases])
    return folder


@pytest.mark.parametrize(("engine", "settings"), CASES)
def test_steps_and_weights_equal_the_torch_engines(runs: Path, engine: str, settings: str) -> None:
    place = run_directory(runs, f"{engine}:{settings}")
    plain = run_directory(runs, f"torch:{engine.split(':')[1]}:{settings}")
    expected, found = (
        [
            json.loads(line)
            for line in (d / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ][1:]
        for d in (plain, place)
    )
    assert len(found) == len(expected) == 3
    for theirs, ours in zip(expected, found, strict=True):
        for name in COMPARED:
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-4), (ours["step"], name)
    ours_weights, theirs_weights = (
        load_file(d / "model" / "model.safetensors") for d in (place, plain)
    )
    start = load_file(runs / "start" / "model.safetensors")
    for name in theirs_weights:
        torch.testing.assert_close(
            ours_weights[name], theirs_weights[name], atol=2e-4, rtol=0, msg=name
        )
    assert max(float((theirs_weights[n] - start[n]).abs().max()) for n in start) > 1e-3
