"""What holds of RaSA and LoRA-Mini alike: their starts, counts, merges, files and LoRA twins."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from conf.choices import AdapterKind
from conf.schema import AdapterConfig
from policy.adapters import attach, method_of
from policy.adapters.low_rank import LowRankLayer
from policy.model import trainable
from policy.saving import full_weights, save_adapter, save_as_lora
from rlhf.types import UserError
from tests.policy.adapters.low_rank import (
    BOTH,
    IDS,
    base,
    fresh,
    gap,
    logits,
    moved,
)

pytestmark = pytest.mark.parametrize("adapter", BOTH, ids=["rasa", "lora_mini"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_is_the_base_to_the_bit(adapter: AdapterConfig, dtype: torch.dtype) -> None:
    assert torch.equal(logits(fresh(adapter, dtype=dtype)), logits(base(dtype=dtype)))


def test_switched_off_is_the_base_to_the_bit(adapter: AdapterConfig) -> None:
    model = moved(adapter)
    with model.disable_adapter():
        assert gap(model, base()) == 0
    assert gap(model, base()) > 1e-3


@pytest.mark.parametrize(
    "targets", [["all-linear"], ["q_proj", "down_proj"], ["layers.1.mlp.up_proj"]]
)
def test_trained_parameters_are_the_formulas(adapter: AdapterConfig, targets: list[str]) -> None:
    adapter = replace(adapter, targets=targets)
    with torch.device("meta"):
        empty = base()
    counted = sum(param.numel() for param in trainable(fresh(adapter)))
    assert counted == method_of(adapter).expected(empty, adapter)


def test_every_trained_tensor_has_a_gradient(adapter: AdapterConfig) -> None:
    """Those whose other factor is 0 only once it is not."""
    model = moved(adapter)
    model(input_ids=IDS, labels=IDS).loss.backward()
    without = [
        name
        for name, param in model.named_parameters()
        if param.requires_grad and (param.grad is None or not param.grad.any())
    ]
    assert without == []


def test_first_step_moves_something(adapter: AdapterConfig) -> None:
    model = fresh(adapter)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert gap(model, base()) > 1e-3


def test_merged_equals_unmerged(adapter: AdapterConfig) -> None:
    model = moved(adapter)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = base()
    whole.load_state_dict(dict(full_weights(model).tensors))
    assert gap(whole, model) < 1e-5
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    expected = logits(model)
    model.merge_adapter(safe_merge=True)
    assert float((logits(model) - expected).abs().max()) < 1e-5
    model.unmerge_adapter()
    assert float((logits(model) - expected).abs().max()) < 1e-5


def test_merge_of_a_weight_that_is_not_finite_is_refused(adapter: AdapterConfig) -> None:
    model = moved(adapter)
    layer = next(m for m in model.modules() if isinstance(m, LowRankLayer))
    with torch.no_grad():
        trainable(layer)[0][0, 0] = torch.inf
    weight = layer.get_base_layer().weight.clone()
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, weight)


def test_dropout_is_of_the_update_alone(adapter: AdapterConfig) -> None:
    model = moved(replace(adapter, dropout=0.5))
    assert gap(model, moved(adapter)) == 0
    assert not torch.equal(logits(model.train()), logits(model))
    with model.disable_adapter():
        assert gap(model, base()) == 0


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_loaded_by_peft_is_the_same_to_the_bit(
    adapter: AdapterConfig, task: str, tmp_path: Path
) -> None:
    model = moved(adapter, task)
    save_adapter(model, tmp_path)
    torch.manual_seed(7)  # frozen matrices come from the files, no matter how numbers are drawn
    loaded = PeftModel.from_pretrained(base(task), tmp_path, is_trainable=True).eval()
    assert torch.equal(logits(loaded), logits(model))
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    assert [n for n, p in loaded.named_parameters() if p.requires_grad] == names


def test_peft_saves_what_we_save(adapter: AdapterConfig, tmp_path: Path) -> None:
    model = moved(adapter)
    save_adapter(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "peft")
    ours, peft = (
        load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "peft")
    )
    assert ours.keys() == peft.keys()
    assert all(torch.equal(ours[name], peft[name]) for name in ours)
    loaded = PeftModel.from_pretrained(base(), tmp_path / "peft", low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())


def test_the_same_adapter_is_the_same_file(adapter: AdapterConfig, tmp_path: Path) -> None:
    model, files = moved(adapter), set()
    for number in range(8):  # the library orders metadata at random
        save_adapter(model, tmp_path / str(number), name="polite")
        files.add((tmp_path / str(number) / "adapter_model.safetensors").read_bytes())
    assert len(files) == 1
    assert load_file(tmp_path / "0" / "adapter_model.safetensors").keys()


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_twin_is_a_plain_lora_with_the_same_update(
    adapter: AdapterConfig, task: str, tmp_path: Path
) -> None:
    model = moved(adapter, task)
    save_as_lora(method_of(adapter).as_lora, model, tmp_path)
    twin = PeftModel.from_pretrained(base(task), tmp_path).eval()
    assert twin.peft_config["default"].peft_type == "LORA"
    assert gap(twin, model) < 1e-6
    assert gap(twin, base(task)) > 1e-3


def test_twin_of_layers_that_differ(adapter: AdapterConfig, tmp_path: Path) -> None:
    """Of RaSA the pool of a kind with one layer gives another rank than that of three layers."""
    adapter = replace(adapter, targets=["q_proj", "layers.1.mlp.up_proj"])
    model = moved(adapter)
    save_as_lora(method_of(adapter).as_lora, model, tmp_path)
    assert gap(PeftModel.from_pretrained(base(), tmp_path).eval(), model) < 1e-6
    saved = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    pattern = {"model.layers.1.mlp.up_proj": 4} if adapter.kind is AdapterKind.rasa else {}
    assert saved["rank_pattern"] == saved["alpha_pattern"] == pattern


def test_second_adapter_leaves_the_first(adapter: AdapterConfig, tmp_path: Path) -> None:
    """As TRL's DPO does, which adds a copy as its reference."""
    model = moved(adapter)
    expected = logits(model)
    trained = [name for name, param in model.named_parameters() if param.requires_grad]
    model.add_adapter("ref", model.peft_config["default"])
    assert torch.equal(logits(model), expected)
    assert [name for name, param in model.named_parameters() if param.requires_grad] == trained
    save_adapter(model, tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path).eval()), expected)
    model.set_adapter("ref")
    assert gap(model, base()) == 0
    model.set_adapter("default")
    model.delete_adapter("ref")
    assert torch.equal(logits(model), expected)


def test_weights_that_are_transposed(adapter: AdapterConfig) -> None:
    """GPT-2's layers hold [in, out]."""
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    gpt2 = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=1))
    formula = method_of(adapter).expected(gpt2, adapter)
    model = attach(gpt2, adapter, task="CAUSAL_LM").eval()
    assert sum(param.numel() for param in trainable(model)) == formula
    with torch.no_grad():
        for param in trainable(model):
            param.add_(torch.randn_like(param), alpha=0.1)
    expected = logits(model)
    model.merge_adapter()
    assert float((logits(model) - expected).abs().max()) < 1e-5


def test_frozen_tensors_stay(adapter: AdapterConfig) -> None:
    """To the bit, weight decay or not."""
    model = fresh(adapter)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    held: dict[str, Any] = dict(model.named_parameters())
    assert all(torch.equal(held[name], tensor) for name, tensor in frozen.items())


def test_targets_that_are_not_there_are_refused(adapter: AdapterConfig) -> None:
    with pytest.raises(UserError, match=r"adapter\.targets=\['nope'\]"):
        attach(base(), replace(adapter, targets=["nope"]), task="CAUSAL_LM")
