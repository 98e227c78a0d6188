"""Whole runs of adapters on two CPU ranks: LoftQ starts on every rank as in one process, and a run
of AdaLoRA under ZeRO goes on to the bit. One launch.
"""

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf.cli import config
from rlhf.run.context import RunContext
from rlhf.stages import rows as stage_rows
from tests import toys
from tests.offline import trl_tools
from tests.stages.adapter_ranks_worker import MODULES

pytestmark = [pytest.mark.distributed, pytest.mark.full, pytest.mark.usefixtures("one_thread")]
COMMON = ["model.dtype=float32", "tracking=none", "stage.learning_rate=1e-2"]
OFFLINE = [*COMMON, "stage.batch_size=4", "stage.eval_steps=2", "stage.max_length=48"]
ONLINE = [*COMMON, "data.max_prompt_length=24", "rollout.max_response_length=4", "rollout=hf"]
ONLINE += ["reward.function=tests.toys:even_tokens", "stage.save_steps=0", "stage.steps=2"]
ONLINE += ["stage.prompts_per_step=2", "stage.samples_per_prompt=2"]
LOFTQ = ["adapter=loftq", "adapter.rank=4", "stage.steps=2"]
ADALORA = ["adapter=adalora", "adapter.rank=2", "adapter.adalora.initial_rank=4"]
ADALORA += ["stage.steps=8", "stage.save_steps=1"]
# stage -> engine on two ranks
LOFTQ_RUNS = {"sft": "zero2", "dpo": "zero2", "kto": "zero2", "orpo": "zero3", "grpo": "zero3"}
ADALORA_RUNS = {"sft": "zero2", "dpo": "zero1", "kto": "zero2"}
KILLED_AT = 4


def options(folder: Path, base: Path, stage: str, name: str, *more: str) -> list[str]:
    """Of a run in folder/name."""
    files = {"sft": "sft", "grpo": "prompts"}
    given = [f"stage={stage}", f"run.dir={folder}", f"run.name={name}", f"model.path={base}"]
    given += [f"data.path={folder / files.get(stage, 'pairs')}.jsonl"]
    return [*given, *(ONLINE if stage == "grpo" else OFFLINE), *more]


def commands(folder: Path, base: Path) -> list[dict[str, Any]]:
    """What the two ranks run."""
    found = []
    for stage, engine in LOFTQ_RUNS.items():
        given = options(folder, base, stage, "two", *LOFTQ, f"engine={engine}")
        found.append({"options": given, "killed_at": None})
    for stage, engine in ADALORA_RUNS.items():
        for name in ("straight", "broken", "broken"):
            given = options(folder, base, stage, name, *ADALORA, f"engine={engine}")
            resumes = bool(found) and found[-1]["killed_at"] is not None
            if resumes:
                given.append("run.resume=true")
            killed_at = KILLED_AT if name == "broken" and not resumes else None
            found.append({"options": given, "killed_at": killed_at})
    return found


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., Path],
    one_thread: Iterator[None],
) -> Path:
    """Holds the runs of both ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    trl_tools.write_rows(folder / "sft.jsonl", trl_tools.sft_rows(40))
    trl_tools.write_rows(folder / "pairs.jsonl", trl_tools.pair_rows(40))
    toys.write_jsonl(folder / "prompts.jsonl", toys.prompt_rows())
    env = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.stages.adapter_ranks_worker"]
    given = json.dumps(commands(folder, tiny_model()))
    done = subprocess.run(
        [*command, given], env=env, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


def weights(directory: Path, part: str = "adapter") -> dict[str, torch.Tensor]:
    name = "adapter_model" if part == "adapter" else "model"
    return load_file(directory / part / f"{name}.safetensors")


def rows_of(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", LOFTQ_RUNS)
def test_loftq_is_on_every_rank_what_it_is_in_one_process(
    stage: str, folder: Path, tiny_model: Callable[..., Path]
) -> None:
    """start/ to the bit; what trained within 1e-4 (online the responses may part, so there the
    start and the distance from the reference are looked at).
    """
    given = options(folder, tiny_model(), stage, "one", *LOFTQ)
    module = importlib.import_module(f"rlhf.stages.{MODULES[stage]}")
    module.run(RunContext.open(config.compose(given)), stage_rows)
    one, two = folder / "one" / stage, folder / "two" / stage
    expected, found = weights(one, "start"), weights(two, "start")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    if stage == "grpo":
        rows = rows_of(two)
        assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-6)
        assert all(row["rollout/logprob_gap"] < 1e-4 for row in rows)
        return
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, atol=1e-4, rtol=0, msg=name)
    if stage == "dpo":
        first = next(row for row in rows_of(two) if "eval_loss" in row)
        assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", ADALORA_RUNS)
def test_adalora_under_zero_goes_on_to_the_bit(stage: str, folder: Path) -> None:
    straight, broken = folder / "straight" / stage, folder / "broken" / stage
    starts = json.loads((broken / "manifest.json").read_text(encoding="utf-8"))["starts"]
    assert len(starts) == 2
    assert starts[1]["resume_from"].endswith(f"-{KILLED_AT - 1}")
    expected, found = weights(straight), weights(broken)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    left = sum(int((t != 0).sum()) for name, t in found.items() if name.endswith("lora_E"))
    summary = json.loads((broken / "summary.json").read_text(encoding="utf-8"))["adapter"]
    assert 0 < left <= summary["used"] == summary["budget"]
