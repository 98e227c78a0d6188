"""The low-rank family, VeRA, (IA)^3 and OFT: what their papers' equations say, against the modules
that PEFT puts into the model.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor

from conf.choices import AdapterKind, Carrier, LoraInit
from conf.schema import AdapterConfig, facts_of
from policy import adapters
from policy.adapters import sampled, starts
from policy.adapters.targets import adapted_layers
from policy.model import no_gather
from policy.saving import iterate_weights, save_adapter
from rlhf.types import UserError
from tests.policy.adapters.tiny import IDS, LINEARS, small

ROWS = [list(range(start, start + 20)) for start in range(10, 26)]
INIT = {init.value: init for init in LoraInit}
TAKE_A_PART = ("pissa", "olora", "corda")


def lora(**options: Any) -> AdapterConfig:
    return AdapterConfig(kind=AdapterKind.lora, rank=4, alpha=12.0, **options)


ADAPTERS: dict[str, AdapterConfig] = {
    "lora": lora(),
    "rslora": lora(rslora=True),
    "dora": lora(dora=True),
    "lora_fa": lora(freeze_a=True),
    "patterns": lora(
        rank_pattern={"q_proj": 2, r"0\.mlp\.up_proj": 8}, alpha_pattern={"v_proj": 3.0}
    ),
    "whole": lora(save_whole=["norm", "embed_tokens"]),
    **{name: lora(init=INIT[name]) for name in ("gaussian", "orthogonal", "eva", *TAKE_A_PART)},
    "vera": AdapterConfig(kind=AdapterKind.vera, rank=8),
    "ia3": AdapterConfig(kind=AdapterKind.ia3, targets=["k_proj", "v_proj", "down_proj"]),
    "oft": AdapterConfig(kind=AdapterKind.oft),
}
ALL = pytest.mark.parametrize("name", ADAPTERS)


def attached(adapter: AdapterConfig, task: str = "CAUSAL_LM") -> Any:
    model = small(tied=not adapter.save_whole)
    torch.manual_seed(3)
    return adapters.attach(model, adapter, task=task, sample=lambda: ROWS).eval()


@torch.no_grad()
def moved(name: str) -> Any:
    """A model whose adapter has trained, as it were."""
    model = attached(ADAPTERS[name])
    generator = torch.Generator().manual_seed(5)
    for param in model.parameters():
        if param.requires_grad:
            param.add_(0.05 * torch.randn(param.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(input_ids=IDS).logits
    return out


def start(name: str) -> Tensor:
    return logits(small(tied=not ADAPTERS[name].save_whole))


# ---- the start ----


@ALL
def test_the_start_is_the_base(name: str) -> None:
    model = attached(ADAPTERS[name])
    exact = name not in ("orthogonal", "dora", *TAKE_A_PART)
    if exact:
        assert torch.equal(logits(model), start(name))
    torch.testing.assert_close(logits(model), start(name), rtol=0, atol=1e-5)
    with model.disable_adapter():
        off = float((logits(model) - start(name)).abs().max())
    assert (off == 0) is facts_of(ADAPTERS[name]).off_is_start
    if name in TAKE_A_PART:
        assert off > 0.1


@ALL
def test_as_many_parameters_train_as_the_formula_says(name: str) -> None:
    adapter, model = ADAPTERS[name], attached(ADAPTERS[name])
    base = small(tied=not adapter.save_whole)
    names = [n for n, param in model.named_parameters() if param.requires_grad]
    trained = sum(model.get_parameter(n).numel() for n in names)
    formula = adapters.METHODS[adapter.kind].expected(base, adapter)
    if name == "eva":  # its ranks go where the data wants them, as many as before
        ranks = [len(layer) for n, layer in model.state_dict().items() if ".lora_A." in n]
        assert sum(ranks) == 4 * len(LINEARS)
        assert len(set(ranks)) > 1
    else:
        assert trained == formula
    # switching it off and on lets no more train
    with model.disable_adapter():
        pass
    assert names == [n for n, param in model.named_parameters() if param.requires_grad]


# ---- the update ----


def lora_update(layer: Any) -> Tensor:
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.lora_alpha["default"] / len(down) * up @ down


def rslora_update(layer: Any) -> Tensor:
    return lora_update(layer) * len(layer.lora_A["default"].weight) ** 0.5


def dora_weight(layer: Any, base: Tensor) -> Tensor:
    turned = base + lora_update(layer)
    length = layer.lora_magnitude_vector["default"].weight
    return length[:, None] * turned / turned.norm(dim=1, keepdim=True)


def vera_update(layer: Any) -> Tensor:
    down = layer.vera_A["default"][:, : layer.in_features]
    up = layer.vera_B["default"][: layer.out_features]
    inner, outer = layer.vera_lambda_d["default"], layer.vera_lambda_b["default"]
    return outer.diag() @ up @ inner.diag() @ down


def ia3_weight(layer: Any, base: Tensor) -> Tensor:
    scales = layer.ia3_l["default"].flatten()
    if layer.in_features == 96:  # down_proj: what it reads
        return base @ scales.diag()
    return scales.diag() @ base


def oft_weight(layer: Any, base: Tensor) -> Tensor:
    numbers = layer.oft_R["default"].weight
    blocks = []
    for row in numbers:
        skew = torch.zeros(32, 32, dtype=row.dtype)
        skew[*torch.triu_indices(32, 32, 1)] = row
        skew = skew - skew.T
        one = torch.eye(32, dtype=row.dtype)
        blocks.append((one - skew) @ torch.linalg.inv(one + skew))
    turn = torch.block_diag(*blocks)
    torch.testing.assert_close(turn @ turn.T, torch.eye(len(turn), dtype=turn.dtype))
    return base @ turn.T


WEIGHTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "rslora": lambda layer, base: base + rslora_update(layer),
    "dora": dora_weight,
    "vera": lambda layer, base: base + vera_update(layer),
    "ia3": ia3_weight,
    "oft": oft_weight,
}


@ALL
@torch.no_grad()
def test_a_layers_output_is_the_one_written_by_hand(name: str) -> None:
    model = moved(name).double()
    generator = torch.Generator().manual_seed(1)
    by_hand = WEIGHTS.get(name, lambda layer, base: base + lora_update(layer))
    adapted = 0
    for part in model.modules():
        if not hasattr(part, "get_base_layer"):
            continue
        adapted += 1
        weight = part.get_base_layer().weight
        inputs = torch.randn(5, weight.shape[1], generator=generator, dtype=torch.float64)
        torch.testing.assert_close(part(inputs), inputs @ by_hand(part, weight).T)
    assert adapted == len(adapted_layers(small(), ADAPTERS[name]))


@ALL
def test_merged_weights_give_the_same_and_the_adapter_stays(name: str, tmp_path: Path) -> None:
    model = moved(name)
    before = {n: tensor.clone() for n, tensor in model.state_dict().items()}
    weights = dict(iterate_weights(model))
    whole = small(tied=not ADAPTERS[name].save_whole)
    whole.load_state_dict(weights, strict=True)
    torch.testing.assert_close(logits(whole), logits(model), rtol=0, atol=1e-5)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])


@ALL
def test_a_saved_adapter_means_the_same_on_its_base_to_peft_alone(
    name: str, tmp_path: Path
) -> None:
    model = moved(name)
    method = adapters.METHODS[ADAPTERS[name].kind]
    save_adapter(model, tmp_path / "adapter", no_gather, method.saved)
    base = small(tied=not ADAPTERS[name].save_whole)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert (logits(loaded) - start(name)).abs().max() > 0.01
    if name not in TAKE_A_PART:
        assert torch.equal(logits(loaded), logits(model))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), start(name))


@pytest.mark.parametrize("name", ["pissa", "corda"])
@pytest.mark.parametrize(
    "options", [{"rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3.0}}]
)
def test_the_plain_form_keeps_each_layers_scale(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    adapter = lora(init=INIT[name], **options)
    model = attached(adapter)
    torch.testing.assert_close(logits(model), logits(small()), rtol=0, atol=1e-5)
    for param in model.parameters():
        if param.requires_grad:
            param.data *= 1.1
    save_adapter(model, tmp_path, no_gather, adapters.METHODS[adapter.kind].saved)
    loaded = PeftModel.from_pretrained(small(), str(tmp_path)).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


@ALL
def test_it_attaches_alike_in_every_run(name: str) -> None:
    """What a run that goes on has before its checkpoint is read: the base, and frozen parts."""
    first, second = (attached(ADAPTERS[name]).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key])


# ---- starts ----


def test_pissa_takes_the_largest_singular_values_and_olora_an_orthonormal_part() -> None:
    base = small().get_submodule(LINEARS[0]).weight
    for name in ("pissa", "olora"):
        layer = attached(ADAPTERS[name]).get_base_model().get_submodule(LINEARS[0])
        rest = layer.get_base_layer().weight
        torch.testing.assert_close(rest + lora_update(layer), base)
        up = layer.lora_B["default"].weight
        if name == "pissa":
            left, values = torch.linalg.svdvals(rest), torch.linalg.svdvals(base)
            torch.testing.assert_close(left[: len(values) - 4], values[4:], rtol=1e-4, atol=1e-4)
        else:
            torch.testing.assert_close(up.T @ up, torch.eye(4))


def test_pissa_of_large_weights_is_fast_and_the_same_in_every_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact = attached(ADAPTERS["pissa"])
    monkeypatch.setattr(starts, "_LARGEST_EXACT", 16)
    first, second = (attached(ADAPTERS["pissa"]) for _ in range(2))
    torch.testing.assert_close(logits(first), logits(small()), rtol=0, atol=1e-5)
    assert torch.equal(logits(first), logits(second))
    kinds = [model.get_base_model().get_submodule(LINEARS[0]) for model in (exact, first)]
    known, found = (lora_update(layer).norm() for layer in kinds)
    assert 0.99 * known < found < known


def test_corda_leaves_little_where_the_inputs_of_the_rows_are() -> None:
    seen = sampled.moments(small(), LINEARS[:1], ROWS)[LINEARS[0]]
    largest, _ = sampled.directions(seen.products / seen.count, 1)
    rests = {}
    for name in ("corda", "pissa"):
        layer = attached(ADAPTERS[name]).get_base_model().get_submodule(LINEARS[0])
        rests[name] = (layer.get_base_layer().weight @ largest[0]).norm()
    assert rests["corda"] < 0.5 * rests["pissa"]


def test_eva_takes_the_directions_that_pefts_own_finds() -> None:
    found = sampled.eva(small(), dict.fromkeys(LINEARS, 4), ROWS)
    config = LoraConfig(
        r=4, target_modules=LINEARS, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0)
    )
    batch = {"input_ids": torch.tensor(ROWS), "attention_mask": torch.ones(16, 20).long()}
    known = get_eva_state_dict(small(), [batch], config, show_progress_bar=False)
    for name, rows in found.items():
        assert len(rows) == len(known[name])
        torch.testing.assert_close(rows.abs(), known[name].abs().to(rows), rtol=0, atol=1e-2)
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)))


def test_eva_needs_more_tokens_than_directions() -> None:
    with pytest.raises(UserError, match=r"adapter\.sample_rows"):
        sampled.eva(small(), dict.fromkeys(LINEARS, 4), [[5, 6, 7], [8, 9]])


def test_sums_over_inputs_do_not_depend_on_how_many_layers_are_looked_at_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together = sampled.moments(small(), LINEARS, ROWS[:3])
    monkeypatch.setattr(sampled, "_ROOM", 1)
    apart = sampled.moments(small(), LINEARS, ROWS[:3])
    for name in LINEARS:
        assert together[name].count == apart[name].count == 60
        torch.testing.assert_close(together[name].covariance(), apart[name].covariance())


def test_lora_plus_trains_b_faster() -> None:
    adapter = lora(rate_ratio=16.0)
    model = attached(adapter)
    scale = adapters.METHODS[adapter.kind].rate_scale
    scales = {n: scale(n, adapter) for n, param in model.named_parameters() if param.requires_grad}
    assert {n for n, value in scales.items() if value == 16} == {n for n in scales if "lora_B" in n}
    assert {n for n, value in scales.items() if value == 1} == {n for n in scales if "lora_A" in n}


# ---- what follows, what is refused ----


def test_how_each_goes_to_a_generator() -> None:
    merged = {name for name, a in ADAPTERS.items() if facts_of(a).carrier is Carrier.merged}
    assert merged == {"dora", "whole", "vera", "ia3", "oft", *TAKE_A_PART}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_pattern": {"qproj": 2}}, r"adapter\.rank_pattern: 'qproj' names none"),
        ({"alpha_pattern": {"9.*q_proj": 2.0}}, r"adapter\.alpha_pattern: '9"),
        ({"rank_pattern": {"q_proj": 0}}, "expected a number above 0"),
        ({"rank_pattern": {"(q": 2}}, "no regular expression"),
        ({"save_whole": ["embed_tokens"]}, "tied embeddings"),
        ({"save_whole": ["lm_head"]}, "tied embeddings"),
        ({"save_whole": ["mlp"]}, "is adapted"),
        ({"save_whole": ["nrm"]}, "no such module as 'nrm'"),
        ({"targets": ["lm_head"]}, "tied embeddings"),
        ({"init": LoraInit.pissa, "rank_pattern": {"v_proj": 65}}, "too few for 65 directions"),
    ],
)
def test_what_a_model_cannot_have_is_refused(options: dict[str, Any], message: str) -> None:
    with torch.device("meta"):
        model = small()
    with pytest.raises(UserError, match=message):
        adapters.METHODS[AdapterKind.lora].check(model, lora(**options), True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": LoraInit.orthogonal, "rank": 3}, "even ranks"),
        ({"init": LoraInit.loftq}, "nf4 with init=loftq"),
        ({"init": LoraInit.pissa, "dora": True}, "another start with dora"),
        ({"init": LoraInit.corda, "quantize": "nf4"}, "rounded weights"),
    ],
)
def test_options_that_rule_each_other_out(options: dict[str, Any], message: str) -> None:
    from conf.choices import Quantization

    if "quantize" in options:
        options = {**options, "quantize": Quantization(options["quantize"])}
    with pytest.raises(ValueError, match=message):
        AdapterConfig(kind=AdapterKind.lora, **options)


def test_a_start_from_rows_is_refused_where_there_are_none() -> None:
    for init in (LoraInit.eva, LoraInit.corda):
        with pytest.raises(UserError, match="looks at rows"):
            adapters.attach(small(), lora(init=init), task="CAUSAL_LM")


def test_blocks_of_oft_divide_each_layers_inputs() -> None:
    from conf.methods import OftConfig

    adapter = AdapterConfig(kind=AdapterKind.oft, oft=OftConfig(block_size=48))
    with pytest.raises(UserError, match=r"q_proj has 64 inputs.*Expected one of 2, 4, 8, 16, 32"):
        adapters.METHODS[AdapterKind.oft].check(small(), adapter, True)


def test_names_of_whole_modules_are_whole() -> None:
    model = attached(ADAPTERS["whole"])
    trained = [n for n, param in model.named_parameters() if param.requires_grad]
    assert not any("layernorm" in name for name in trained)
    assert sum(".norm." in name for name in trained) == 1
