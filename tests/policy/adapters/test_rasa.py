"""RaSA: its equation, its pools, and what its paper proves of them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from conf.methods import RasaConfig
from policy.adapters import attach, rasa
from policy.saving import save_adapter
from rlhf.types import UserError
from tests.policy.adapters.low_rank import RASA, base, moved

POOLS = ("rasa_shared_a", "rasa_shared_b")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, width, bias=False)


class Stack(nn.Module):
    """Layers of one kind."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))


def stack(layers: int, width: int, **options: Any) -> tuple[Any, list[Any]]:
    """An adapted stack in float64, and its layers."""
    torch.manual_seed(0)
    config = rasa.RasaConfig(target_modules=["q"], **options)
    model = get_peft_model(Stack(layers, width).double(), config)
    return model, [block.q for block in model.base_model.model.layers]


def weights(layer: Any) -> list[Tensor]:
    """A, B, A of the pool, B of the pool, diagonal."""
    names = ("rasa_a", "rasa_b", *POOLS, "rasa_scale")
    return [getattr(layer, name)["default"].weight for name in names]


@torch.no_grad()
def test_forward_by_hand() -> None:
    """dW_i = [B_i B_S] diag(d_i) [A_i; A_S]"""
    model, layers = stack(3, 10, r=4, shared=2, alpha=8.0)
    for param in model.parameters():
        param.data.normal_()
    x = torch.randn(5, 10, dtype=torch.float64)
    for layer in layers:
        a, b, pool_a, pool_b, diagonal = weights(layer)
        assert a.shape == (2, 10) and pool_a.shape == (6, 10)
        assert b.shape == (10, 2) and pool_b.shape == (10, 6)
        update = torch.cat((b, pool_b), 1) @ diagonal.diag() @ torch.cat((a, pool_a))
        expected = x @ (layer.get_base_layer().weight + update).T
        assert float((layer(x) - expected).abs().max()) < 1e-12
        assert float((layer.get_delta_weight("default") - update).abs().max()) < 1e-12


def test_start_is_the_authors() -> None:
    _, layers = stack(5, 10, r=4, shared=1, alpha=6.0)
    for layer in layers:
        a, b, pool_a, pool_b, diagonal = weights(layer)
        assert a.any() and pool_a.any()
        assert not b.any() and not pool_b.any()
        assert diagonal.tolist() == pytest.approx([1.0] * 3 + [0.6] * 5)


def pools(model: Any) -> dict[str, set[int]]:
    """Kind of layer -> the parameters in its layers' pools, by id."""
    found: dict[str, set[int]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, rasa.RasaLayer):
            own = [id(getattr(layer, pool)["default"].weight) for pool in POOLS]
            found.setdefault(rasa.kind_of(name), set()).update(own)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_a_kind_share_their_pool(dtype: torch.dtype, tmp_path: Any) -> None:
    """Also once PEFT has made float32 of it, and after it was assigned from a file."""
    model = moved(RASA, dtype=dtype)
    assert len(pools(model)) == 7
    assert all(len(ids) == 2 for ids in pools(model).values())
    save_adapter(model, tmp_path)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(base(dtype=dtype), tmp_path, low_cpu_mem_usage=low)
        assert all(len(ids) == 2 for ids in pools(loaded).values())
        assert len(list(loaded.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.11.self_attn.q_proj", "model.layers.*.self_attn.q_proj"),
        ("h.0.mlp", "h.*.mlp"),
        ("layers.2.experts.13.up", "layers.*.experts.13.up"),
        ("vision.fc1", "vision.fc1"),
    ],
)
def test_kinds_are_names_without_the_blocks_number(name: str, kind: str) -> None:
    assert rasa.kind_of(name) == kind


def test_a_step_through_one_layer_moves_the_others() -> None:
    _, layers = stack(3, 10, r=4, shared=1)
    layers[0](torch.randn(2, 10, dtype=torch.float64)).sum().backward()
    gradient = weights(layers[2])[3].grad
    assert gradient is not None and gradient.any()


def test_beats_lora_of_equal_parameters_at_reconstructing_random_updates() -> None:
    """From LoRA's optimum, which truncated singular values give (Eckart and Young), sharing leads
    to a smaller error. The diagonals' parameters are granted to LoRA as a share of its next rank.
    """
    count, width, r, k = 6, 32, 4, 1
    model, layers = stack(count, width, r=r, shared=k)
    wanted = torch.randn(count, width, width, dtype=torch.float64)
    u, s, v = torch.linalg.svd(wanted)
    left, right = u * s.sqrt()[:, None], v * s.sqrt()[:, :, None]
    with torch.no_grad():
        for number, layer in enumerate(layers):
            a, b, pool_a, pool_b, diagonal = weights(layer)
            a.copy_(right[number, : r - k])
            b.copy_(left[number, :, : r - k])
            mine = slice(number * k, (number + 1) * k)
            pool_a[mine] = right[number, r - k : r]
            pool_b[:, mine] = left[number, :, r - k : r]
            diagonal.zero_()[: r - k] = 1
            diagonal[r - k :][mine] = 1

    def error() -> Tensor:
        updates = torch.stack([layer.get_delta_weight("default") for layer in layers])
        return (updates - wanted).square().sum()

    best_lora = s[:, r:].square().sum()
    assert error().item() == pytest.approx(best_lora.item(), rel=1e-9)
    trained = [param for param in model.parameters() if param.requires_grad]
    extra = sum(param.numel() for param in trained) - count * r * 2 * width
    assert extra == count * (r - k + k * count)
    next_rank = s[:, r].square().sum() * extra / (count * 2 * width)
    optimizer = torch.optim.Adam(trained, lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        loss = error()
        loss.backward()
        optimizer.step()
    assert error().item() < 0.97 * (best_lora - next_rank).item()


def test_sharing_every_basis_is_refused() -> None:
    adapter = replace(RASA, rasa=RasaConfig(shared=4))
    with pytest.raises(UserError, match=r"adapter\.rasa\.shared=4 .* adapter\.rank=4"):
        attach(base(), adapter, task="CAUSAL_LM")
