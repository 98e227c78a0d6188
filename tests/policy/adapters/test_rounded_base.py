"""Adapters beside a frozen model that is held in 4 or 8 bits."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.choices import AdapterKind, LoraInit, Quantization
from conf.schema import AdapterConfig
from policy import adapters
from policy.model import is_rounded
from policy.saving import adapter_weights, iterate_weights
from rlhf.process import libraries
from rlhf.types import UserError

IDS = torch.arange(12)[None]
EACH = pytest.mark.parametrize("method", [Quantization.nf4, Quantization.int8])
FAMILY: list[dict[str, Any]] = [
    {},
    {"dora": True},
    {"rslora": True, "targets": ["q_proj", "down_proj"]},
    {"init": LoraInit.orthogonal, "rank_pattern": {"up_proj": 2}},
    {"freeze_a": True, "targets": ["up_proj"], "save_whole": ["k_proj"]},
    {"kind": AdapterKind.rasa},
    {"kind": AdapterKind.lora_mini, "save_whole": ["norm"]},
]


@functools.cache
def llama() -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return AutoModelForCausalLM.from_config(config)


def configured(**options: Any) -> AdapterConfig:
    return AdapterConfig(**{"kind": AdapterKind.lora, "rank": 4, **options})


def attached(adapter: AdapterConfig, *, moved: bool = False) -> Any:
    """A fresh adapter, or one whose weights moved."""
    base = copy.deepcopy(llama())  # the first one seeds
    torch.manual_seed(1)
    model = adapters.attach(base, adapter, task="CAUSAL_LM")
    if moved:
        for param in model.parameters():
            if param.requires_grad:
                param.data.add_(torch.randn_like(param) * 0.05)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=IDS).logits
    return out


@EACH
@pytest.mark.parametrize("options", FAMILY)
def test_a_fresh_adapter_is_the_rounded_model_and_so_is_one_switched_off(
    method: Quantization, options: dict[str, Any]
) -> None:
    adapter = configured(quantize=method, **options)
    start = logits(adapters.round_weights(copy.deepcopy(llama()), adapter))
    exact = adapter.init is LoraInit.default and not adapter.dora  # else to rounding
    torch.testing.assert_close(logits(attached(adapter)), start, rtol=0, atol=0 if exact else 1e-6)
    moved = attached(adapter, moved=True)
    assert not torch.allclose(logits(moved), start, atol=1e-3)
    with moved.disable_adapter():
        assert torch.equal(logits(moved), start), "the reference"


@EACH
@pytest.mark.parametrize("options", FAMILY)
def test_whole_weights_are_the_rounded_ones_and_the_update(
    method: Quantization, options: dict[str, Any]
) -> None:
    model = attached(configured(quantize=method, **options), moved=True)
    held = {name: tensor.clone() for name, tensor in tensors(model)}
    written = dict(iterate_weights(model))
    assert all(torch.equal(held[name], tensor) for name, tensor in tensors(model)), "to the bit"
    assert is_rounded(model)
    state = {
        name.replace(".modules_to_save.default.", "."): tensor
        for name, tensor in written.items()
        if ".original_module." not in name
    }
    plain = copy.deepcopy(llama())
    assert state.keys() == plain.state_dict().keys()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    plain.load_state_dict(state)
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-5)


def tensors(model: Any) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def test_whole_weights_by_hand() -> None:
    model = attached(configured(quantize=Quantization.nf4, alpha=8.0), moved=True)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    by_hand = layer.base_layer.weight.double() + 8 / 4 * b @ a
    found = dict(iterate_weights(model))["model.layers.1.mlp.up_proj.weight"]
    torch.testing.assert_close(found.double(), by_hand, rtol=0, atol=1e-6)


@EACH
def test_the_adapter_alone_holds_nothing_of_the_base(method: Quantization) -> None:
    names = adapter_weights(attached(configured(quantize=method))).tensors
    assert len(names) == 2 * 7 * 2 and all("lora_" in name for name in names)


@EACH
def test_gradients_are_those_beside_the_rounded_weights_and_stay_after_an_evaluation(
    method: Quantization,
) -> None:
    adapter = configured(quantize=method)
    held = attached(adapter)
    torch.manual_seed(1)
    rounded = adapters.round_weights(copy.deepcopy(llama()), adapter)
    plain = adapters.attach(rounded, configured(), task="CAUSAL_LM")
    adapters.enable_checkpointing(held)
    for model in (held, plain):
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.data.fill_(0.1)  # at 0, A has no gradient
    found = []
    for model in (held, plain, held):
        model.eval()
        logits(model)  # trainers evaluate before their first step
        model.train().zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == 2 * 7 * 2 and all(float(g.abs().max()) > 0 for g in found[0])
    for first, beside, again in zip(*found, strict=True):
        torch.testing.assert_close(first, beside, rtol=0, atol=1e-6)
        assert torch.equal(first, again)


# ---- what is refused ----


def test_full_training_is_refused() -> None:
    with pytest.raises(ValueError, match=r"adapter\.quantize='nf4'.*none with adapter=none"):
        AdapterConfig(quantize=Quantization.nf4)


@pytest.mark.parametrize("init", ["pissa", "olora", "corda"])
def test_a_start_that_changes_the_base_is_refused(init: str) -> None:
    with pytest.raises(ValueError, match=rf"adapter\.init='{init}'.*rounded weights as they are"):
        configured(quantize=Quantization.int8, init=LoraInit(init))


def test_a_missing_library_is_named_before_anything_loads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import importlib.metadata
    import sys

    from conf.schema import ModelConfig

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    libraries.hide_bitsandbytes()
    model = ModelConfig(path=str(tmp_path / "none such"))
    with pytest.raises(UserError, match=r"bitsandbytes .*pip install 'rlhf-toolkit\[quantize\]'"):
        adapters.check(model, configured(quantize=Quantization.nf4), task="CAUSAL_LM")
