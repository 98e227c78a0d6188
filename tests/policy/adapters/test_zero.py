"""Adapters of our own under ZeRO on two CPU ranks take the plain engine's steps. One launch."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conf.adapters import facts_of
from policy.adapters import method_of
from policy.saving import adapter_weights
from tests.policy.adapters import low_rank, zero_worker
from tests.selection import selected

pytestmark = [pytest.mark.distributed, pytest.mark.full]
# names of tensors that are 0 at the start; a fusion's values are the identity
UPDATES = (
    ".lora_B.weight",
    "_default.up.weight",
    ".b.weight",
    ".vera_lambda_b",
    ".oft_R.weight",
)
CASES = [f"{kind}:{stage}" for kind in zero_worker.ADAPTERS for stage in (1, 2, 3)]


@pytest.fixture(scope="module")
def folder(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    one_thread: Iterator[None],
) -> Path:
    """Holds the weights at the end of each selected case, and of the plain engine."""
    folder = tmp_path_factory.mktemp("zero")
    cases = sorted(selected(request, "case"))
    zero_worker.make_earlier(folder)
    for kind in {case.split(":")[0] for case in cases}:
        zero_worker.run(folder, f"{kind}:torch")
    env = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.policy.adapters.zero_worker", str(folder), *cases]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_weights_equal_the_plain_engines(folder: Path, case: str) -> None:
    kind = case.split(":", maxsplit=1)[0]
    found = load_file(folder / f"{case.replace(':', '-')}.safetensors")
    expected = load_file(folder / f"{kind}-torch.safetensors")
    assert found.keys() == expected.keys()
    adapter, forms = zero_worker.ADAPTERS[kind], {"own"}
    if facts_of(adapter).merges:
        forms.add("whole")
    if method_of(adapter).as_lora is not None:
        forms.add("lora")
    assert {name.split(".")[0] for name in found} == forms
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0, msg=name)
    updates = [tensor for name, tensor in expected.items() if name.endswith(UPDATES)]
    for name, tensor in expected.items():
        if name.endswith(".fusion.value.weight"):
            updates.append(tensor - torch.eye(len(tensor)))
        if name.endswith(".ia3_l"):
            updates.append(tensor - 1)
    if "own.prompt_embeddings" in expected:
        start = adapter_weights(low_rank.fresh(zero_worker.ADAPTERS[kind])).tensors
        updates.append(expected["own.prompt_embeddings"] - start["prompt_embeddings"])
    assert max(float(tensor.abs().max()) for tensor in updates) > 1e-3, "nothing trained"
