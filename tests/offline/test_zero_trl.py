"""SFT, reward models and DPO under DeepSpeed's ZeRO on two CPU ranks take the same steps as the
torch engine in this process.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conf.choices import ModelKind
from conf.schema import ModelConfig
from rlhf.models.loading import load_causal_lm
from tests.offline import trl_tools, zero_trl_worker
from tests.online.families import tiny_family
from tests.selection import marked_full, selected

pytestmark = pytest.mark.distributed
TOLERANCE = 1e-4  # nats of loss, and weights
TWO_RANKS = [
    (stage, zero, adapter)
    for stage in ("sft", "reward")
    for zero in (1, 2, 3)
    for adapter in ("none", "lora")
]
# the reference is a second engine, or the adapter turned off
TWO_RANKS += [("dpo", 3, "none"), ("dpo", 2, "lora")]
TWO_RANKS += [("soft", 2, "none")]
# parts of the model, and one block after the other
FROZEN = {  # what moves, beside the last norm
    "top": "model.layers.1.",
    "kept": "model.layers.1.",  # the states of the rest are read from the disk
    "unfrozen": "model.layers.",
}
TWO_RANKS += [("reward", zero, "top") for zero in (1, 2, 3)]
TWO_RANKS += [("sft", zero, "unfrozen") for zero in (1, 2, 3)] + [("dpo", 3, "top")]
TWO_RANKS += [("reward", zero, "kept") for zero in (2, 3)]
TWO_RANKS += [("growing", 2, "none"), ("noisy", 1, "lora")]
TWO_RANKS += [("noisy", 2, "none"), ("noisy", 3, "none")]
TWO_RANKS += [("sft", 3, "gelora")]  # rank 0 looks at rows before all train
FAMILIES = {"granite": "reward", "olmoe": "reward", "qwen3_moe": "sft"}  # beside Llama; their rows
TWO_RANKS += [(family, 3, "none") for family in FAMILIES]
ONE_RANK = [("sft", 3, "none"), ("reward", 2, "lora")]  # engine=zero* without torchrun
# Weights and an adapter, ZeRO without and with split weights; the whole matrix, and DPO's second
# model, are make test-full's. ZeRO-2 is held by tests/online/test_zero_online.py.
COVERING = [("sft", 1, "none"), ("reward", 3, "lora")]
Case = tuple[str, int | None, str]


def spec_of(folder: Path, name: str, cases: Sequence[Case]) -> dict[str, Any]:
    """What the worker runs, into the directory `name`."""
    return {
        "out": str(folder / name),
        "sft": str(folder / "sft.jsonl"),
        "reward": str(folder / "reward.jsonl"),
        "soft": str(folder / "soft.jsonl"),
        "dpo": str(folder / "reward.jsonl"),
        "growing": str(folder / "sft.jsonl"),
        "noisy": str(folder / "sft.jsonl"),
        **{family: str(folder / f"{rows}.jsonl") for family, rows in FAMILIES.items()},
        "model": str(folder / "model"),
        "models": {family: str(folder / family) for family in FAMILIES},
        "cases": cases,
    }


def launch(folder: Path, name: str, command: list[str], cases: Sequence[Case]) -> None:
    """Run `cases` in one launch."""
    spec = spec_of(folder, name, cases)
    (folder / f"{name}.json").write_text(json.dumps(spec), encoding="utf-8")
    extra = {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        "HF_HUB_OFFLINE": "1",
    }
    environment = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    } | extra
    whole = [
        sys.executable,
        *command,
        "-m",
        "tests.offline.zero_trl_worker",
        str(folder / f"{name}.json"),
    ]
    done = subprocess.run(
        whole, env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    one_thread: Iterator[None],
) -> Path:
    """Directory with one/ (torch engine, and ZeRO at one rank without a launcher) and two/ (ZeRO on
    two ranks).
    """
    wanted = selected(request, "stage", "zero", "adapter")
    folder = tmp_path_factory.mktemp("zero")
    trl_tools.write_rows(folder / "sft.jsonl", trl_tools.sft_rows())
    trl_tools.write_rows(folder / "reward.jsonl", trl_tools.pair_rows())
    soft = [
        row | {"soft_label": 0.5 if i % 3 == 0 else 0.95, "weight": 1 + i % 2}
        for i, row in enumerate(trl_tools.pair_rows())
    ]
    trl_tools.write_rows(folder / "soft.jsonl", soft)
    tokenizer = trl_tools.tiny_tokenizer()
    torch.manual_seed(0)
    load_causal_lm(
        ModelConfig(kind=ModelKind.tiny, tiny=trl_tools.TINY), tokenizer
    ).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for family in {stage for stage, _, _ in wanted} & FAMILIES.keys():
        tiny_family(family, folder / "model", folder / family)
    one_rank: list[Case] = [case for case in ONE_RANK if case in wanted]
    two_ranks: list[Case] = [case for case in TWO_RANKS if case in wanted]
    compared = dict.fromkeys((stage, None, adapter) for stage, _, adapter in one_rank + two_ranks)
    for case in compared:
        zero_trl_worker.run_case(spec_of(folder, "one", []), *case)
    if one_rank:
        launch(folder, "one", [], one_rank)
    launch(
        folder,
        "two",
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
        two_ranks,
    )
    return folder


def check_losses(expected_run: Path, found_run: Path) -> None:
    expected, found = trl_tools.losses(expected_run), trl_tools.losses(found_run)
    assert len(found) == len(expected) == 4
    assert found == pytest.approx(expected, abs=TOLERANCE)
    first, last = (
        json.loads((run / "summary.json").read_text())["metrics"]["eval_loss"]
        for run in (expected_run, found_run)
    )
    assert first < trl_tools.metric_lines(expected_run)[0]["eval_loss"] - 10 * TOLERANCE, (
        "a model that stands still would pass"
    )
    # TRL weighs held-out batches equally, so their split over ranks shows
    assert first == pytest.approx(last, abs=1e-2)


def check_weights(expected_run: Path, found_run: Path) -> None:
    compared = 0
    for path in [
        *expected_run.glob("model/*.safetensors"),
        *expected_run.glob("adapter/*.safetensors"),
    ]:
        expected, found = load_file(path), load_file(found_run / path.relative_to(expected_run))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=TOLERANCE, rtol=0, msg=name)
            compared += 1
    assert compared >= 20


@pytest.mark.parametrize(("stage", "zero", "adapter"), marked_full(TWO_RANKS, COVERING))
def test_two_ranks_equal_the_torch_engine(runs: Path, stage: str, zero: int, adapter: str) -> None:
    expected, found = (
        runs / "one" / f"torch-{adapter}" / stage,
        runs / "two" / f"zero{zero}-{adapter}" / stage,
    )
    check_losses(expected, found)
    check_weights(expected, found)
    if stage == "noisy":
        check_noise(expected, found)


def check_noise(expected_run: Path, found_run: Path) -> None:
    """Micro-batches are the same, on one rank or two."""
    for name in ("train/noise_trace", "train/noise_square"):
        expected, found = (
            [line[name] for line in trl_tools.metric_lines(run) if name in line]
            for run in (expected_run, found_run)
        )
        assert len(expected) == 4 and found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("stage", "zero", "adapter"), marked_full(ONE_RANK, []))
def test_one_rank_without_a_launcher_equals_the_torch_engine(
    runs: Path, stage: str, zero: int, adapter: str
) -> None:
    expected, found = (
        runs / "one" / f"torch-{adapter}" / stage,
        runs / "one" / f"zero{zero}-{adapter}" / stage,
    )
    check_losses(expected, found)
    check_weights(expected, found)


@pytest.mark.parametrize(
    ("stage", "zero", "adapter"),
    marked_full([case for case in TWO_RANKS if case[2] in FROZEN], []),
)
def test_what_is_frozen_stays_to_the_bit(runs: Path, stage: str, zero: int, adapter: str) -> None:
    """With weight decay; what waits to the end of the run as well."""
    (start,) = (runs / "model").glob("*.safetensors")
    (end,) = (runs / "two" / f"zero{zero}-{adapter}" / stage / "model").glob("*.safetensors")
    before, after = load_file(start), load_file(end)
    moved = {name for name, t in after.items() if name in before and not t.equal(before[name])}
    expected = {name for name in before if name.startswith(FROZEN[adapter])}
    if adapter == "unfrozen":
        expected.add("model.norm.weight")
    assert moved == expected
