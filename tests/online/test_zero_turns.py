"""Episodes of several turns, from the sampler to the weights: in one process with PPO and GRPO, and
under ZeRO on two ranks, which take the steps of the plain engine.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf.online import setup
from rlhf.types import Rollout, TrainingDiverged, Turn
from tests.online import episodes_worker, zero_online_worker
from tests.online.test_zero_online import (
    COMPARED,
    COMPARED_IN_GROUPS,
    folder_of,
    in_one_process,
    launch,
    rows,
    start_folder,
)

_CREDIT = "stage.turn_credit=turn:stage.turn_discount=0.9"
PPO = f"zero2:none:{episodes_worker.SETTINGS}:{_CREDIT}"
_GROUPS = "stage.samples_per_prompt=4:stage.epochs=1"
GRPO = f"zero3:none:stage=grpo:{episodes_worker.SETTINGS}:{_CREDIT}:{_GROUPS}"
RLOO = f"zero2:lora:stage=rloo:{episodes_worker.SETTINGS}:stage.turn_discount=0.9:{_GROUPS}"
RUNS = [PPO, PPO.replace("zero2", "zero3"), GRPO, GRPO.replace("zero3", "zero2"), RLOO]
TURNS = ("rollout/turns", "rollout/observed_tokens", "turn/return_1", "turn/return_2")


def run_here(monkeypatch: pytest.MonkeyPatch, folder: Path, run: str) -> Path:
    with monkeypatch.context() as patch:
        patch.setattr(setup, "make_generator", episodes_worker.around(setup.make_generator))
        zero_online_worker.run(str(folder), str(folder / "start"), in_one_process(run))
    return folder_of(folder, in_one_process(run))


@pytest.mark.parametrize("run", [PPO, GRPO])
def test_a_run_trains_on_what_the_policy_wrote(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: str
) -> None:
    done = run_here(monkeypatch, start_folder(tmp_path), run)
    lines = rows(tmp_path, in_one_process(run))
    assert len(lines) == 3
    for line in lines:
        assert line["rollout/logprob_gap"] < 1e-4
        assert line["rollout/observed_tokens"] == pytest.approx(3 * (line["rollout/turns"] - 1))
        assert 1 < line["rollout/turns"] < 3
        assert line["rollout/response_length"] <= 6 * line["rollout/turns"]
        assert line["reward/episode"] == pytest.approx(
            line["turn/reward"] * line["rollout/turns"], abs=1e-5
        )
    samples = [json.loads(text) for text in (done / "samples.jsonl").read_text().splitlines()]
    assert {turn["role"] for row in samples for turn in row["turns"]} == {
        "assistant",
        "environment",
    }


class _OffByOne(episodes_worker.Episodes):
    """Says that the first token of a later turn came from the environment, and that the last one of
    its answer was written.
    """

    def generate(self, *args: Any, **options: Any) -> list[Rollout]:
        rollouts = super().generate(*args, **options)
        for rollout in rollouts:
            first, *later = rollout.turns
            moved = [
                Turn(turn.start - 1, turn.end, turn.text, turn.reward, turn.observation)
                for turn in later
            ]
            rollout.turns = (first, *moved)
        return rollouts


def test_a_turn_that_is_off_by_one_stops_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The sampler has no logprob of a token that it did not write."""
    make = setup.make_generator
    monkeypatch.setattr(
        setup, "make_generator", lambda *args, **options: _OffByOne(make(*args, **options))
    )
    start_folder(tmp_path)
    with pytest.raises(TrainingDiverged, match=r"rollout\.gap_tolerance"):
        zero_online_worker.run(str(tmp_path), str(tmp_path / "start"), in_one_process(PPO))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, one_thread: Iterator[None]) -> Path:
    folder = start_folder(tmp_path_factory.mktemp("turns"))
    with pytest.MonkeyPatch.context() as patch:
        for run in dict.fromkeys(in_one_process(run) for run in RUNS):
            run_here(patch, folder, run)
    launch(folder, folder / "start", RUNS, "tests.online.episodes_worker")
    return folder


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_take_the_torch_engines_steps(ranks: Path, run: str) -> None:
    plain = in_one_process(run)
    expected, found = rows(ranks, plain), rows(ranks, run)
    assert len(found) == len(expected) == 3
    compared = COMPARED if "stage=" not in run.split(":")[2] else COMPARED_IN_GROUPS
    for theirs, ours in zip(expected, found, strict=True):
        for name in (*compared, *TURNS):
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-4), (ours["step"], name)
        assert ours["rollout/logprob_gap"] < 1e-4
    weights, reference = (
        load_file(folder_of(ranks, one) / "model" / "model.safetensors") for one in (run, plain)
    )
    start = load_file(ranks / "start" / "model.safetensors")
    for name in reference:
        torch.testing.assert_close(weights[name], reference[name], atol=2e-4, rtol=0, msg=name)
    assert max(float((reference[n] - start[n]).abs().max()) for n in start) > 1e-3
