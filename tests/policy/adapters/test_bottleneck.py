"""Bottleneck adapters against forward passes written by hand, and what is saved of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from conf.adapters import AdapterConfig, facts_of
from conf.choices import AdapterKind, Carrier, Placement
from conf.methods import BottleneckConfig, Composition
from policy.adapters import attach, method_of
from policy.adapters.bottleneck import places
from policy.saving import save_adapter
from rlhf.types import UserError
from tests.online.families import FAMILIES, SIZES

WIDTH, LAYERS, SIZE = 64, 2, 8
IDS = torch.arange(24).view(2, 12)
SITES = {Placement.houlsby: 2, Placement.pfeiffer: 1, Placement.parallel: 1}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}


def options(
    placement: Placement = Placement.pfeiffer, *, name: str = "default", **changes: Any
) -> AdapterConfig:
    own = {key: changes.pop(key) for key in list(changes) if key in ("combine", "nonlinearity")}
    bottleneck = BottleneckConfig(size=changes.pop("size", SIZE), placement=placement, **own)
    bottleneck.scale = changes.pop("scale", 1.0)
    return AdapterConfig(kind=AdapterKind.bottleneck, name=name, bottleneck=bottleneck, **changes)


@pytest.fixture
def base(tiny_model: Callable[..., Path]) -> Callable[[], Any]:
    return lambda: AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32).eval()


def move(model: Any, seed: int = 1) -> Any:
    """As training would: every trained weight moves."""
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        if param.requires_grad:
            param.data.add_(0.1 * torch.randn(param.shape, generator=generator))
    return model.eval()


def by_hand(model: Any, add: Callable[[str, Tensor, Tensor], Tensor]) -> Tensor:
    """Logits of a plain Llama, its blocks computed here. `add`(place, what the module read, what it
    gave) -> what goes on.
    """
    llama = model.model
    hidden = llama.embed_tokens(IDS)
    positions = torch.arange(IDS.shape[1])[None]
    angles = llama.rotary_emb(hidden, positions)
    for number, block in enumerate(llama.layers):
        read = block.input_layernorm(hidden)
        attended = block.self_attn(
            hidden_states=read, position_embeddings=angles, attention_mask=None
        )[0]
        hidden = hidden + add(f"layers.{number}.self_attn.o_proj", read, attended)
        read = block.post_attention_layernorm(hidden)
        fed = block.mlp.down_proj(
            nn.functional.silu(block.mlp.gate_proj(read)) * block.mlp.up_proj(read)
        )
        hidden = hidden + add(f"layers.{number}.mlp.down_proj", read, fed)
    logits: Tensor = model.lm_head(llama.norm(hidden))
    return logits


def blocks_at(adapted: Any, place: str) -> dict[str, dict[str, Tensor]]:
    """Names of the blocks at a place -> their tensors by short names."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, param in adapted.named_parameters():
        if f".{place}.bottleneck_inserts." in name and ".blocks." in name:
            block, rest = name.split(".blocks.block_")[1].split(".", 1)
            found.setdefault(block, {})[rest] = param
    return found


def added(block: dict[str, Tensor], hidden: Tensor, nonlinearity: str, scale: float) -> Tensor:
    low = hidden @ block["down.weight"].T + block["down.bias"]
    return scale * (FUNCTIONS[nonlinearity](low) @ block["up.weight"].T + block["up.bias"])


@pytest.mark.parametrize(
    ("placement", "nonlinearity"),
    [
        (Placement.houlsby, "relu"),
        (Placement.houlsby, "tanh"),
        (Placement.pfeiffer, "gelu"),
        (Placement.parallel, "silu"),
    ],
)
def test_a_forward_pass_by_hand(
    placement: Placement, nonlinearity: str, base: Callable[[], Any]
) -> None:
    adapter = options(placement, nonlinearity=nonlinearity, scale=1.5)
    plain = base().double()
    adapted = move(attach(base(), adapter, task="CAUSAL_LM")).double()

    def add(place: str, read: Tensor, gave: Tensor) -> Tensor:
        if placement is Placement.parallel and place.endswith("down_proj"):
            block = blocks_at(adapted, place.removesuffix(".down_proj"))["default"]
            return gave + added(block, read, nonlinearity, 1.5)
        found = blocks_at(adapted, place)
        if not found:
            assert placement is not Placement.houlsby and place.endswith("o_proj")
            return gave
        return gave + added(found["default"], gave, nonlinearity, 1.5)

    with torch.no_grad():
        expected, found = by_hand(plain, add), adapted(IDS).logits
        assert float((found - plain(IDS).logits).abs().max()) > 1e-2
    assert float((found - expected).abs().max()) < 1e-12


@pytest.mark.parametrize("placement", Placement)
def test_it_starts_as_the_base_and_trains_what_the_formula_says(
    placement: Placement, base: Callable[[], Any]
) -> None:
    adapter = options(placement)
    adapted = attach(base(), adapter, task="CAUSAL_LM").eval()
    trained = [(n, p) for n, p in adapted.named_parameters() if p.requires_grad]
    count = sum(param.numel() for _, param in trained)
    each = 2 * SIZE * WIDTH + SIZE + WIDTH
    assert count == SITES[placement] * LAYERS * each
    assert count == method_of(adapter).expected(base(), adapter)
    assert all(".bottleneck_inserts." in name for name, _ in trained)
    with torch.no_grad():
        start = base()(IDS).logits
        assert torch.equal(adapted(IDS).logits, start)
        move(adapted)
        assert not torch.equal(adapted(IDS).logits, start)
        with adapted.disable_adapter():
            assert torch.equal(adapted(IDS).logits, start)


def test_a_fresh_block_gets_gradients(base: Callable[[], Any]) -> None:
    """U starts at 0, so at first only U and u move; D follows."""
    adapted = attach(base(), options(), task="CAUSAL_LM")
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in gradients.values())
    assert all(bool(grad.any()) for name, grad in gradients.items() if ".up." in name)
    assert not any(bool(grad.any()) for name, grad in gradients.items() if ".down." in name)


def loaded(directory: Path, model: Any) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(directory)).eval()


@pytest.mark.parametrize("placement", Placement)
def test_saved_and_loaded_to_the_bit(
    placement: Placement, base: Callable[[], Any], tmp_path: Path
) -> None:
    adapted = move(attach(base(), options(placement, nonlinearity="gelu"), task="CAUSAL_LM"))
    save_adapter(adapted, tmp_path / "ours")
    adapted.save_pretrained(tmp_path / "pefts")
    with torch.no_grad():
        expected = adapted(IDS).logits
        for place in ("ours", "pefts"):
            assert torch.equal(loaded(tmp_path / place, base())(IDS).logits, expected)


@pytest.fixture
def earlier(base: Callable[[], Any], tmp_path: Path) -> list[str]:
    """Directories of two adapters of other tasks, of different sizes and functions."""
    paths = []
    for seed, (name, function) in enumerate((("first", "tanh"), ("second", "gelu")), start=3):
        adapter = options(name=name, size=4 * seed, nonlinearity=function)
        save_adapter(move(attach(base(), adapter, task="CAUSAL_LM"), seed), tmp_path / name)
        paths.append(str(tmp_path / name))
    return paths


def test_stacked_on_earlier_ones_by_hand(
    base: Callable[[], Any], earlier: list[str], tmp_path: Path
) -> None:
    adapter = options(name="third", load=earlier, load_weights=[1.0, 0.5])
    adapted = attach(base(), adapter, task="CAUSAL_LM").eval()
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == method_of(adapter).expected(base(), adapter)
    held = {n: p.clone() for n, p in adapted.named_parameters() if not p.requires_grad}
    own = [p for n, p in adapted.named_parameters() if ".bottleneck_inserts." in n]
    frozen = sum(param.numel() for param in own if not param.requires_grad)
    assert frozen == method_of(adapter).frozen(base(), adapter) > 0
    with torch.no_grad():
        start = adapted(IDS).logits
    move(adapted, 9)
    assert facts_of(adapter).off_is_start
    with torch.no_grad(), adapted.disable_adapter():  # the earlier ones stay on
        assert torch.equal(adapted(IDS).logits, start)
        assert not torch.equal(start, base()(IDS).logits)
    adapted.double()
    plain = base().double()

    def add(place: str, read: Tensor, gave: Tensor) -> Tensor:
        found = blocks_at(adapted, place)
        if not found:
            return gave
        assert list(found) == ["first", "second", "third"]
        gave = gave + added(found["first"], gave, "tanh", 1.0)
        gave = gave + added(found["second"], gave, "gelu", 0.5)
        return gave + added(found["third"], gave, "relu", 1.0)

    with torch.no_grad():
        assert float((adapted(IDS).logits - by_hand(plain, add)).abs().max()) < 1e-12
    adapted.float()
    for name, param in adapted.named_parameters():
        assert name not in held or torch.equal(param, held[name])
    save_adapter(adapted, tmp_path / "stack")
    again = loaded(tmp_path / "stack", base())
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, adapted(IDS).logits)


def test_fused_by_hand(base: Callable[[], Any], earlier: list[str], tmp_path: Path) -> None:
    """AdapterFusion: attention over what the adapters add, which alone trains."""
    adapter = options(name="both", load=earlier, combine=Composition.fuse)
    adapted = attach(base(), adapter, task="CAUSAL_LM").eval()
    trained = [(n, p) for n, p in adapted.named_parameters() if p.requires_grad]
    assert sum(p.numel() for _, p in trained) == LAYERS * 3 * WIDTH**2
    assert method_of(adapter).expected(base(), adapter) == LAYERS * 3 * WIDTH**2
    assert all(".fusion." in name for name, _ in trained)
    assert not facts_of(adapter).off_is_start  # it starts as a fusion
    move(adapted, 9).double()
    tensors = dict(adapted.named_parameters())
    plain = base().double()

    def add(place: str, read: Tensor, gave: Tensor) -> Tensor:
        found = blocks_at(adapted, place)
        if not found:
            return gave
        stem = f"base_model.model.model.{place}.bottleneck_inserts.default.fusion"
        query, key, value = (tensors[f"{stem}.{n}.weight"] for n in ("query", "key", "value"))
        outs = [added(found["first"], gave, "tanh", 1.0), added(found["second"], gave, "gelu", 1.0)]
        scores = torch.stack([((gave @ query.T) * (out @ key.T)).sum(-1) for out in outs], -1)
        shares = scores.softmax(-1)
        return gave + sum(shares[..., i, None] * (out @ value.T) for i, out in enumerate(outs))

    with torch.no_grad():
        assert float((adapted(IDS).logits - by_hand(plain, add)).abs().max()) < 1e-12
    adapted.float()
    save_adapter(adapted, tmp_path / "fused")
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "fused", base())(IDS).logits, adapted(IDS).logits)
    with pytest.raises(UserError, match="holds a fusion of adapters"):
        attach(base(), options(name="n", load=[str(tmp_path / "fused")]), task="CAUSAL_LM")


def test_what_does_not_fit_together_is_refused(
    base: Callable[[], Any], earlier: list[str], tmp_path: Path
) -> None:
    def refused(adapter: AdapterConfig, message: str) -> None:
        with pytest.raises(UserError, match=message):
            attach(base(), adapter, task="CAUSAL_LM")

    refused(options(name="first", load=earlier), "'first' is the name of more than one")
    refused(options(load=[str(tmp_path / "none")]), "can't be read.*directory adapter/ of a run")
    refused(options(combine=Composition.fuse, load=earlier[:1]), "adapter.load names 1")
    refused(options(Placement.houlsby, load=earlier), "placed as pfeiffer.*placed as houlsby")
    refused(options(targets=["gate_proj"]), r"mlp\.gate_proj gives 96 numbers")
    refused(options(targets=["nothing"]), "no such module as 'nothing'")


def test_named_places(base: Callable[[], Any]) -> None:
    adapter = options(targets=["layers.1.mlp.down_proj"])
    assert places(base(), adapter) == ["model.layers.1.mlp.down_proj"]
    adapted = attach(base(), adapter, task="CAUSAL_LM")
    trained = [name for name, param in adapted.named_parameters() if param.requires_grad]
    assert len(trained) == 4
    assert all(".layers.1.mlp.down_proj.bottleneck_inserts." in name for name in trained)


def test_a_layer_that_the_model_never_calls_is_refused(
    base: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = base()
    mlp = model.model.layers[1].mlp

    def past(x: Tensor) -> Tensor:
        inner = nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
        return nn.functional.linear(inner, mlp.down_proj.weight)

    monkeypatch.setattr(mlp, "forward", past)
    with pytest.raises(UserError, match=r"does not call .*layers\.1\.mlp\.down_proj.*targets"):
        attach(model, options(), task="CAUSAL_LM")


FURTHER = {"gpt2": {}, "opt": {}, "phi": {}, "bloom": {}, "falcon": {}}


@pytest.mark.parametrize("family", [*FAMILIES, *FURTHER])
def test_places_of_families(family: str) -> None:
    """One behind each attention and each feed-forward layer, experts as a whole."""
    config = AutoConfig.for_model(
        family, vocab_size=300, pad_token_id=0, **SIZES | (FAMILIES | FURTHER)[family]
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    modules = dict(model.named_modules())
    found = places(model, options(Placement.houlsby))
    assert len(found) == len(set(found)) == 2 * LAYERS
    assert all(path in modules for path in found)
    assert not any("expert" in path for path in found)
    attention = [path for path in found if "attn" in path or "attention" in path]
    assert len(attention) == LAYERS
    assert places(model, options()) == [path for path in found if path not in attention]


def test_its_way_to_generators() -> None:
    facts = facts_of(options())
    assert (facts.carrier, facts.merges, facts.off_is_start) == (Carrier.modules, False, True)
