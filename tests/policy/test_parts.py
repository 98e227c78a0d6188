"""Under ZeRO-3 models that are parted while they are read train as those that were whole first, bit
for bit, and no rank holds one whole.
"""

import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conf.adapters import needs_whole
from conf.choices import AdapterKind, LoraInit, Quantization
from conf.schema import AdapterConfig, ModelConfig
from policy.engines import parts
from rlhf.models.loading import load_tokenizer
from tests.online.families import tiny_family
from tests.reward.test_scorer import save_reward_model
from tests.selection import marked_full, selected

pytestmark = [pytest.mark.distributed]
CASES = [
    "tied:none:float32:none",
    "tied:lora:bfloat16:none",
    "untied:none:bfloat16:none",
    "untied:none:bfloat16:cpu",
    "both_names:none:float32:none",
    "qwen3_moe:none:float32:none",
    "tied:critic:float32:none",
    "untied:critic_lora:bfloat16:none",
    "reward:scorer:float32:none",
    *(
        f"untied:{one}:float32:none"
        for one in ("lora", "rasa", "lora_mini", "molora", "bottleneck")
    ),
]
FAST = [
    "tied:none:float32:none",
    "tied:lora:bfloat16:none",
    "tied:critic:float32:none",
    "reward:scorer:float32:none",
]


def make_models(folder: Path, tiny_model: Callable[..., Path]) -> None:
    """The models of the cases. `both_names` is tied by its configuration, but its files hold two
    different tensors, which transformers leaves apart.
    """
    for name, tied in (("tied", True), ("untied", False)):
        (folder / name).symlink_to(tiny_model(tied=tied))
    both = folder / "both_names"
    both.mkdir()
    for file in (folder / "tied").iterdir():
        (both / file.name).write_bytes(file.read_bytes())
    weights = load_file(both / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 0.01
    save_file(weights, str(both / "model.safetensors"), metadata={"format": "pt"})
    tiny_family("qwen3_moe", folder / "tied", folder / "qwen3_moe")
    tokenizer = load_tokenizer(ModelConfig(path=str(folder / "tied")))
    save_reward_model(folder / "reward", tokenizer)


@pytest.fixture(scope="module")
def folder(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., Path],
    one_thread: Iterator[None],
) -> Path:
    """Holds what each selected case ends with, loaded whole and in parts, on two ranks."""
    folder = tmp_path_factory.mktemp("parts")
    make_models(folder, tiny_model)
    env = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.policy.parts_worker", str(folder), *sorted(selected(request, "case"))]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


def found(folder: Path, case: str, mode: str, rank: int) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(
        folder / f"{mode}-{case.replace(':', '-')}-{rank}.safetensors"
    )
    return tensors


@pytest.mark.parametrize("case", marked_full(CASES, FAST))
def test_parted_while_read_is_as_parted_when_whole(folder: Path, case: str) -> None:
    for rank in (0, 1):
        expected, own = (found(folder, case, mode, rank) for mode in ("whole", "parts"))
        assert own.keys() == expected.keys()
        for name in own.keys() - {"held"}:
            assert torch.equal(own[name], expected[name]), name
        if ":scorer:" in case:
            assert len(own["scores"]) == (3 if rank == 0 else 0)
            continue
        assert float(own["norm"]) > 0
        total = int(own["total"])
        assert int(expected["held"]) == total
        # its half, rounded up tensor by tensor, and a new head
        assert total / 2 <= int(own["held"]) < 0.51 * total + 200


def test_two_different_tensors_are_not_tied(folder: Path) -> None:
    """What the case `both_names` is about is there."""
    weights = load_file(folder / "both_names" / "model.safetensors")
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_transformers_has_what_the_loader_relies_on() -> None:
    for name, parameters in parts.USED.items():
        module, _, function = name.rpartition(".")
        used = getattr(importlib.import_module(module), function)
        if parameters is not None:
            assert tuple(inspect.signature(used).parameters) == parameters
    source = inspect.getsource(importlib.import_module("transformers.modeling_utils"))
    assert "safe_open(file, framework=" in source
    source = inspect.getsource(importlib.import_module("transformers.core_model_loading"))
    assert 'is_env_variable_true("HF_DEACTIVATE_ASYNC_LOAD")' in source


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        (AdapterConfig(), False),
        (AdapterConfig(kind=AdapterKind.lora), False),
        (AdapterConfig(kind=AdapterKind.bottleneck), False),
        (AdapterConfig(kind=AdapterKind.lora, dora=True), True),
        (AdapterConfig(kind=AdapterKind.lora, init=LoraInit.pissa), True),
        (AdapterConfig(kind=AdapterKind.lora, quantize=Quantization.nf4), True),
        (AdapterConfig(kind=AdapterKind.prompt), True),
    ],
)
def test_which_adapters_start_from_whole_weights(adapter: AdapterConfig, expected: bool) -> None:
    assert needs_whole(adapter) is expected
