"""LoRA-Mini: its equation, its starts, and how little it trains."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from conf.choices import AdapterKind
from conf.methods import LoraMiniConfig
from conf.schema import AdapterConfig
from policy.adapters import attach, lora_mini, method_of
from rlhf.types import UserError
from tests.policy.adapters.low_rank import MINI, base, fresh

PARTS = ("mini_outer_a", "mini_a", "mini_b", "mini_outer_b")


def layer_of(inputs: int, outputs: int, rank: int, inner: int) -> lora_mini.LoraMiniLayer:
    layer = lora_mini.LoraMiniLayer(nn.Linear(inputs, outputs).double())
    layer.put("default", lora_mini.LoraMiniConfig(r=rank, inner=inner, alpha=6.0), "model.q")
    return layer.double()


@torch.no_grad()
def test_forward_by_hand() -> None:
    """dW = alpha / r  B_aux B A A_aux"""
    layer = layer_of(10, 7, rank=3, inner=5)
    outer_a, a, b, outer_b = (getattr(layer, name)["default"].weight for name in PARTS)
    shapes = [tuple(weight.shape) for weight in (outer_a, a, b, outer_b)]
    assert shapes == [(5, 10), (3, 5), (5, 3), (7, 5)]
    nn.init.normal_(b)
    update = 6.0 / 3 * outer_b @ b @ a @ outer_a
    x = torch.randn(4, 10, dtype=torch.float64)
    linear = layer.get_base_layer()
    expected = x @ (linear.weight + update).T + linear.bias
    assert float((layer(x) - expected).abs().max()) < 1e-12
    assert float((layer.get_delta_weight("default") - update).abs().max()) < 1e-12


def test_only_the_inner_matrices_train() -> None:
    trained = {n.split(".")[-3] for n, p in fresh(MINI).named_parameters() if p.requires_grad}
    assert trained == {"mini_a", "mini_b"}


@torch.no_grad()
def test_start_has_the_scale_of_loras() -> None:
    """Entries of A A_aux have the variance of LoRA's A, 1 / (3 in); those of B_aux a step as far as
    one of LoRA's B: the sum of w of them has variance 1.
    """
    torch.manual_seed(0)
    layer = layer_of(400, 300, rank=64, inner=64)
    a, b = layer.factors("default")
    assert not b.any()
    assert float(a.var()) * 3 * 400 == pytest.approx(1, rel=0.1)
    step = layer.mini_outer_b["default"].weight @ torch.ones(64, 64, dtype=torch.float64)
    assert float(step.var()) == pytest.approx(1, rel=0.2)


def test_frozen_matrices_follow_from_names_alone() -> None:
    """A run that resumes attaches a fresh adapter and reads what trained from its checkpoint."""
    models = [base(), base()]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        attach(model, MINI, task="CAUSAL_LM")
    one, other = (dict(model.named_parameters()) for model in models)
    outer = [name for name in one if "mini_outer" in name]
    assert len(outer) == 2 * 7 * 3
    assert all(torch.equal(one[name], other[name]) for name in outer)
    inner = next(name for name in one if ".mini_a." in name)
    assert not torch.equal(one[inner], other[inner])
    end = "self_attn.q_proj.mini_outer_a.default.weight"
    first, second = (one[f"model.layers.{number}.{end}"] for number in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("hidden", [576, 4096])
def test_trains_at_most_a_twentieth_of_loras_parameters(hidden: int) -> None:
    """Of the preset, by the shapes of SmolLM2-135M and of a Llama of 8B."""
    wide = hidden > 1000
    shape = LlamaConfig(
        vocab_size=128,
        hidden_size=hidden,
        intermediate_size=14336 if wide else 1536,
        num_hidden_layers=2,
        num_attention_heads=32 if wide else 9,
        num_key_value_heads=8 if wide else 3,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(shape)
    mini = AdapterConfig(kind=AdapterKind.lora_mini, rank=8)
    plain = AdapterConfig(kind=AdapterKind.lora, rank=8)
    trained = method_of(mini).expected(model, mini)
    assert 0 < trained * 20 <= method_of(plain).expected(model, plain)


def test_inner_width_below_the_rank_is_refused() -> None:
    adapter = replace(MINI, lora_mini=LoraMiniConfig(inner=3))
    with pytest.raises(UserError, match=r"adapter\.lora_mini\.inner=3 .* adapter\.rank=4"):
        attach(base(), adapter, task="CAUSAL_LM")
