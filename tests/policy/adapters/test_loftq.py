"""LoftQ: a start at what rounding loses, nearer to the model than the rounded weights alone."""

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conf.choices import AdapterKind, LoraInit, Quantization
from conf.schema import AdapterConfig, ModelConfig, facts_of
from policy import adapters
from policy.adapters import loftq
from policy.adapters.quantized import QuantizedLinear, Rounding
from rlhf.offline.preference import start_of
from rlhf.types import UserError
from tests.policy.adapters.test_rounded_base import llama, logits

NF4 = Rounding(Quantization.nf4)
ROUNDS = pytest.mark.parametrize("rounds", [1, 5])


def configured(**options: Any) -> AdapterConfig:
    given = {"kind": AdapterKind.lora, "rank": 8, "quantize": Quantization.nf4}
    return AdapterConfig(**given, init=LoraInit.loftq, **options)


def attached(adapter: AdapterConfig, task: str = "CAUSAL_LM") -> Any:
    return adapters.attach(copy.deepcopy(llama()), adapter, task=task).eval()


def with_a_spectrum(outputs: int = 96, inputs: int = 128) -> Tensor:
    """Singular values that fall as those of trained weights do."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.arange(1, outputs + 1, dtype=torch.float64) ** -0.7
    return ((left * values) @ right).float()


def plain(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):  # takes no random numbers
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def started(weight: Tensor, rank: int, scale: float, rounds: int) -> tuple[Tensor, Tensor]:
    """Q, and the update s B A, of a layer of `weight`."""
    layer = plain(weight)
    hold = functools.partial(QuantizedLinear, layer, NF4)
    held, (down, up) = loftq.alternate(layer.weight, hold, rank=rank, scale=scale, rounds=rounds)
    return held.weight, scale * up @ down


class Grid(nn.Module):
    """Rounds to multiples of a quarter."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.round(4 * weight) / 4


@ROUNDS
def test_rounding_and_singular_vectors_take_turns(rounds: int) -> None:
    weight = 3 * with_a_spectrum(12, 20)
    held, (down, up) = loftq.alternate(weight, Grid, rank=3, scale=4.0, rounds=rounds)
    whole, update = weight.double().numpy(), np.zeros((12, 20))
    for _ in range(rounds):
        rounded = np.round(4 * (whole - update)) / 4
        left, values, right = np.linalg.svd(whole - rounded)
        update = left[:, :3] @ np.diag(values[:3]) @ right[:3]
    assert np.array_equal(held.weight.double().numpy(), rounded)
    np.testing.assert_allclose(4 * (up @ down).numpy(), update, atol=1e-6)
    # both factors have the roots of the singular values, over the root of the scale
    shares = np.sqrt(values[:3] / 4)
    np.testing.assert_allclose(np.linalg.norm(up.numpy(), axis=0), shares, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(down.numpy(), axis=1), shares, rtol=1e-5)


def test_the_start_is_nearer_to_the_weights_with_each_round() -> None:
    weight = with_a_spectrum()
    alone = QuantizedLinear(plain(weight), NF4).weight
    errors = []
    for rounds in (1, 5):
        rounded, update = started(weight, 16, 2.0, rounds)
        errors.append(torch.linalg.norm(weight - rounded - update))
    assert errors[1] < errors[0] < 0.9 * torch.linalg.norm(weight - alone)
    assert torch.equal(started(weight, 16, 2.0, 1)[0], alone), "one round: Q is QLoRA's"


def test_a_projection_finds_nearly_the_same_and_leaves_the_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = with_a_spectrum()
    exact = sum(started(weight, 16, 2.0, 5))
    monkeypatch.setattr(loftq, "_LARGEST_EXACT", 8)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = started(weight, 16, 2.0, 5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(4)
    again = started(weight, 16, 2.0, 5)
    assert torch.equal(found[0], again[0]) and torch.equal(found[1], again[1])
    error = torch.linalg.norm(weight - sum(found))
    assert error < 1.05 * torch.linalg.norm(weight - exact)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loftq_rounds": 1, "rslora": True, "double_quantize": False},
        {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 5.0}},
    ],
)
def test_a_model_starts_nearer_to_what_it_was(options: dict[str, Any]) -> None:
    adapter = configured(**options)
    model = attached(adapter)
    unrounded = logits(llama())
    alone = AdapterConfig(
        kind=AdapterKind.lora,
        quantize=Quantization.nf4,
        double_quantize=adapter.double_quantize,
    )
    rounded = logits(adapters.round_weights(copy.deepcopy(llama()), alone))
    ours, theirs = (torch.linalg.norm(out - unrounded) for out in (logits(model), rounded))
    assert ours < 0.97 * theirs
    # what start/ holds is what the layers hold, and what is left with the adapter off
    start = logits(adapters.round_weights(copy.deepcopy(llama()), adapter))
    with model.disable_adapter():
        assert torch.equal(logits(model), start)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            assert layer.lost is None, f"{name} keeps what only the start needs"


def test_each_layer_starts_at_its_own_scale_and_rank() -> None:
    patterns = {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 5.0}}
    model = attached(configured(**patterns, rslora=True))
    weight = llama().model.layers[1].mlp.up_proj.weight
    rounded, update = started(weight, 2, 5 / 2**0.5, 5)
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    assert torch.equal(layer.get_base_layer().weight, rounded)
    torch.testing.assert_close(layer.get_delta_weight("default"), update, rtol=0, atol=1e-7)
    assert update.abs().max() > 1e-4


def test_layers_without_an_adapter_are_rounded_as_ever() -> None:
    model = attached(configured(targets=["q_proj"], freeze_a=True, save_whole=["k_proj"]))
    held = model.get_base_model().model.layers[0]
    weights = llama().model.layers[0]
    up = held.mlp.up_proj
    assert up.lost is None
    assert torch.equal(up.weight, QuantizedLinear(weights.mlp.up_proj, NF4).weight)
    query = held.self_attn.q_proj
    rounded, update = started(weights.self_attn.q_proj.weight, 8, 4.0, 5)
    assert torch.equal(query.get_base_layer().weight, rounded)
    torch.testing.assert_close(query.get_delta_weight("default"), update, rtol=0, atol=1e-7)
    trained = {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_B", "modules_to_save"}


@pytest.mark.parametrize("options", [{}, {"save_whole": ["norm"]}])
def test_the_reference_is_the_start_rather_than_the_rounded_weights(
    options: dict[str, Any],
) -> None:
    adapter = configured(**options)
    assert not facts_of(adapter).off_is_start
    model = attached(adapter)
    reference = start_of(model, adapter)
    torch.testing.assert_close(logits(reference), logits(model), rtol=0, atol=1e-6)
    with model.disable_adapter():
        assert not torch.allclose(logits(reference), logits(model), atol=1e-4)
    assert not any(param.requires_grad for param in reference.parameters())


# ---- what is refused ----


def test_magnitudes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"adapter\.init='loftq'.*another start with dora=true"):
        configured(dora=True)


def test_more_directions_than_a_layer_has_are_refused_before_weights_load(tmp_path: Path) -> None:
    llama().config.save_pretrained(tmp_path)
    adapter = configured(rank_pattern={"k_proj": 33})
    with pytest.raises(UserError, match=r"init=loftq: .*k_proj has 32 inputs and 16 outputs"):
        adapters.check(ModelConfig(path=str(tmp_path)), adapter, task="CAUSAL_LM")
