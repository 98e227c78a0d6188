"""Families of causal models against a plain forward, as tiny random models: ten of the most used
here, the rest with `make test-full`.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.families import tries
from benchmarks.families.build import causal_families, tiny
from conf.choices import AdapterKind
from conf.schema import AdapterConfig
from policy.adapters import attach
from policy.agreement import can_share_prompts
from policy.saving import iterate_weights, rescuing
from rlhf.types import UserError
from tests.selection import marked_full

COMMON = (
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_oss",
    "granite",
)


@pytest.mark.parametrize("family", marked_full(causal_families(), COMMON))
def test_policy(family: str) -> None:
    """Log-probabilities and gradients, and rows that share a prompt, are right or refused."""
    try:
        model = tiny(family)
    # what transformers can't build from its own defaults says nothing of ours
    except Exception as error:  # noqa: BLE001
        pytest.skip(f"{type(error).__name__}: {error}")
    try:
        assert tries.policy_gap(model) < 1e-4
    except UserError:
        assert family not in COMMON
        return
    if can_share_prompts(model):
        assert tries.packed_gap(model) < 1e-4


EXPERTS = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3")
LORA = AdapterConfig(kind=AdapterKind.lora, rank=4)


@pytest.mark.parametrize("family", marked_full(EXPERTS, EXPERTS[:2]))
def test_lora_on_experts_is_read_back_equal(family: str, tmp_path: Path) -> None:
    """Saved whole and as an adapter; merging leaves the weights that train bit for bit."""
    assert tries.adapter_gap(tiny(family), tmp_path) < 1e-4
    model = attach(tiny(family), LORA, task="CAUSAL_LM")
    adapted = [n for n, p in model.named_parameters() if p.requires_grad and "experts" in n]
    assert adapted
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    list(iterate_weights(model))
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], tensor) for n, tensor in before.items())


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "mamba2"])
def test_experts_that_no_adapter_reaches_are_told(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    """GPT-OSS's; mamba2's convolutions have three dimensions, too."""
    model = tiny(family)
    total = model.num_parameters()
    targets = ["in_proj"] if family == "mamba2" else ["all-linear"]
    attach(model, replace(LORA, targets=targets), task="CAUSAL_LM")
    told = [record.getMessage() for record in caplog.records if "joint tensors" in record.message]
    assert len(told) == (family == "gpt_oss")
    for text in told:
        assert "down_proj, gate_up_proj stay as they are, " in text
        experts, whole = (int(n) for n in re.findall(r"(\d+) of (\d+) parameters", text)[0])
        assert whole == total and 0.5 * total < experts < total


@pytest.mark.parametrize("family", ["phimoe", "mamba", "jamba", "longcat_flash", "zamba"])
def test_layers_that_no_adapter_fits_are_refused_before_training(family: str) -> None:
    with pytest.raises(UserError, match=rf"adapter\.targets.*{family}"):
        attach(tiny(family), LORA, task="CAUSAL_LM")


def test_weights_outlive_a_save_that_fails(tmp_path: Path) -> None:
    model = attach(tiny("llama"), LORA, task="CAUSAL_LM")
    with pytest.raises(OSError, match="disk") as error, rescuing(model, tmp_path):
        raise OSError("no disk")
    kept = load_file(tmp_path / "rescued.safetensors")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert kept.keys() == trained.keys()
    assert all(torch.equal(kept[n], p) for n, p in trained.items())
    assert "rescued.safetensors" in error.value.__notes__[0]
