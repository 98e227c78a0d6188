"""PPO, and algorithms that compare responses within groups, under DeepSpeed's ZeRO on two CPU ranks
take the same steps as the plain engine in this process. One launch makes all runs.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from conf.schema import TinyConfig
from rlhf.models.loading import tiny_config, train_tokenizer
from tests import toys
from tests.online import zero_online_worker
from tests.selection import marked_full, selected

pytestmark = pytest.mark.distributed
RUNS = [f"zero{stage}:{adapter}" for stage in (1, 2, 3) for adapter in ("none", "lora")] + [
    "zero3:none:engine.offload=cpu",
    "zero0:none",
]
# Each ZeRO stage and each kind of adapter once, together with the algorithms.
CASES = marked_full(RUNS, keep=["zero1:lora", "zero3:none"])
_SIZES = "stage.samples_per_prompt=4:stage.epochs=1"
_NOISE = "stage.noise_scale=0.5:engine.micro_tokens=1"
ALGORITHMS = [
    f"zero2:none:stage=grpo:{_SIZES}",
    f"zero3:lora:stage=grpo:{_SIZES}",
    f"zero1:none:stage=online_dpo:{_SIZES}:stage.kl_coef=0.0",
    f"zero3:none:stage=dapo:{_SIZES}:stage.overlong_buffer=2:stage.minibatches=1",
    f"zero2:none:stage=raft:{_SIZES}",
    # each response is a micro-batch, so that these are the same on two ranks
    *(f"zero{zero}:none:stage=grpo:{_SIZES}:{_NOISE}" for zero in (0, 3)),
    f"zero2:lora:stage=grpo:{_SIZES}:{_NOISE}",
]
# parts of the policy, and one block after the other
_GRPO = f"none:stage=grpo:{_SIZES}:stage.weight_decay=0.3:stage.adam_eps=1e-5"
ALGORITHMS += [f"zero{zero}:{_GRPO}:stage.train.layers=1" for zero in (1, 3)]
ALGORITHMS += [
    f"zero{zero}:{_GRPO}:stage.unfreeze.every=1:stage.depth_decay=0.5" for zero in (1, 2, 3)
]
# each rank writes the next step's responses in a thread of its own
AHEAD = f"zero2:none:stage=grpo:{_SIZES}:stage.ahead=1"
ALGORITHMS.append(AHEAD)


def folder_of(folder: Path, run: str) -> Path:
    preset = next((part for part in run.split(":") if part.startswith("stage=")), "stage=ppo")
    return folder / run.replace(":", "-").replace("=", "_") / preset.removeprefix("stage=")


def in_one_process(run: str) -> str:
    """The run of the plain engine that `run` is compared with."""
    return "torch:" + run.split(":", 1)[1]


COMPARED = (
    "objective/scores",
    "objective/kl",
    "objective/entropy",
    "loss/policy",
    "loss/value",
    "policy/approxkl",
    "rollout/response_length",
)
COMPARED_IN_GROUPS = (
    "objective/scores",
    "objective/kl",
    "objective/entropy",
    "loss/policy",
    "loss/kl",
    "policy/updates",
    "group/equal",
)
NOISE = ("train/noise_trace", "train/noise_square")
WATCHED = (
    "reward/length_correlation",
    "reward/format_correlation",
    "group/std",
    "judge/score",
    "judge/score_se",
    "judge/proxy",
    "judge/length",
)


def launch(
    folder: Path, start: Path, runs: list[str], worker: str = "tests.online.zero_online_worker"
) -> None:
    """The runs on two ranks."""
    env = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
    ]
    command += ["-m", worker, str(folder), str(start), *runs]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def start_folder(folder: Path) -> Path:
    """Prompts, held-out prompts and the starting policy of every launch, in `folder`."""
    toys.write_jsonl(folder / "prompts.jsonl", toys.prompt_rows())
    toys.write_jsonl(
        folder / "held_out.jsonl", [{"prompt": f"omega {number}"} for number in range(3)]
    )
    torch.manual_seed(0)
    tokenizer = train_tokenizer([str(row["prompt"]) for row in toys.prompt_rows()], 300, 64)
    shape = TinyConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, layers=2, heads=1, max_positions=64
    )
    LlamaForCausalLM(tiny_config(shape, tokenizer)).save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    return folder


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    one_thread: Iterator[None],
) -> Path:
    folder = start_folder(tmp_path_factory.mktemp("zero"))
    wanted = selected(request, "run") | selected(request, "algorithm")
    plain = dict.fromkeys(in_one_process(run) for run in ALGORITHMS if run in wanted)
    for run in ("torch:none", "torch:lora", *plain):
        zero_online_worker.run(str(folder), str(folder / "start"), run)
    launch(folder, folder / "start", [run for run in [*RUNS, *ALGORITHMS] if run in wanted])
    return folder


def rows(folder: Path, run: str) -> list[dict[str, float]]:
    """The lines of the steps; line 0 holds the judge's figures of the start alone."""
    path = folder_of(folder, run) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][1:]


@pytest.mark.parametrize("run", CASES)
def test_losses_equal_the_torch_engines(runs: Path, run: str) -> None:
    expected, found = rows(runs, "torch:" + run.split(":")[1]), rows(runs, run)
    assert len(found) == len(expected) == 3
    for theirs, ours in zip(expected, found, strict=True):
        for name in COMPARED:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), (ours["step"], name)
        assert ours["rollout/logprob_gap"] < 1e-4 and ours["rollout/probe_gap"] < 1e-4
    assert abs(expected[-1]["loss/policy"]) > 1e-3 and abs(expected[-1]["objective/kl"]) > 1e-4, (
        "the comparison would hold for a policy that never moves"
    )


@pytest.mark.parametrize("run", CASES)
def test_every_rank_count_is_watched_alike_and_keeps_the_same_weights(runs: Path, run: str) -> None:
    adapter = run.split(":")[1]
    expected, found = rows(runs, "torch:" + adapter), rows(runs, run)
    assert ["judge/score" in row for row in found] == [False, True, True]
    for theirs, ours in zip(expected, found, strict=True):
        for name in WATCHED:
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-4), (ours["step"], name)
    best = [folder / "best" for folder in (runs / f"torch-{adapter}" / "ppo", folder_of(runs, run))]
    assert (best[0] / "judge.json").read_text(encoding="utf-8") == (
        best[1] / "judge.json"
    ).read_text(encoding="utf-8")
    kept = [load_file(place / "model" / "model.safetensors") for place in best]
    assert kept[0].keys() == kept[1].keys()
    for name in kept[0]:
        torch.testing.assert_close(kept[1][name], kept[0][name], atol=1e-4, rtol=0, msg=name)
    assert (best[1] / "adapter" / "adapter_model.safetensors").exists() is (adapter == "lora")


@pytest.mark.parametrize("run", CASES)
def test_saved_weights_equal_the_torch_engines(runs: Path, run: str) -> None:
    adapter = run.split(":")[1]
    expected = load_file(runs / f"torch-{adapter}" / "ppo" / "model" / "model.safetensors")
    found = load_file(folder_of(runs, run) / "model" / "model.safetensors")
    start = load_file(runs / "start" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=0, msg=name)
    assert max(float((expected[n] - start[n]).abs().max()) for n in expected) > 1e-3


@pytest.mark.parametrize("algorithm", marked_full(ALGORITHMS, keep=[ALGORITHMS[0], AHEAD]))
def test_an_algorithm_over_groups_takes_the_torch_engines_steps(runs: Path, algorithm: str) -> None:
    plain = in_one_process(algorithm)
    expected, found = rows(runs, plain), rows(runs, algorithm)
    assert len(found) == len(expected) == 3
    for theirs, ours in zip(expected, found, strict=True):
        for name in COMPARED_IN_GROUPS:
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-4), (ours["step"], name)
        for name in NOISE if "noise_scale" in algorithm else ():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), (ours["step"], name)
    if algorithm == AHEAD:
        assert [row["ahead/staleness"] for row in found] == [0, 1, 1]
    weights, reference = (
        load_file(folder_of(runs, run) / "model" / "model.safetensors")
        for run in (algorithm, plain)
    )
    start = load_file(runs / "start" / "model.safetensors")
    for name in reference:
        torch.testing.assert_close(weights[name], reference[name], atol=2e-4, rtol=0, msg=name)
    assert max(float((reference[n] - start[n]).abs().max()) for n in start) > 1e-3
    if "stage.train.layers=1" in algorithm:
        moved = {n for n in start if not torch.equal(weights[n], start[n])}
        assert moved == {n for n in start if n.startswith("model.layers.1.")}
