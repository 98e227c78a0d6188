"""Layers held in 4 or 8 bits, against their definitions, and against bitsandbytes' own layers."""

import copy

import pytest
import torch
from torch import Tensor, nn

from conf.choices import AdapterKind, Quantization
from conf.schema import AdapterConfig
from policy.adapters import quantized
from policy.adapters.quantized import QuantizedLinear, Rounding, quantize, round_weights
from policy.model import is_rounded
from rlhf.types import UserError

# The 16 values of NF4 (Dettmers et al. 2023, arXiv:2305.14314, appendix E).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
SINGLE, DOUBLE = Rounding(Quantization.nf4, double=False), Rounding(Quantization.nf4)
INT8 = Rounding(Quantization.int8)
ALL = pytest.mark.parametrize("rounding", [SINGLE, DOUBLE, INT8], ids=["nf4", "nf4x2", "int8"])


def layer(outputs: int = 6, inputs: int = 96, *, bias: bool = True) -> nn.Linear:
    """Blocks of 64 weights run over the rows."""
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


def in_blocks(weight: Tensor, scales: Tensor) -> Tensor:
    """NF4 by hand: each weight of a block the nearest of the 16 values times the block's scale."""
    blocks = weight.double().reshape(-1, 64)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    values = torch.tensor(NF4, dtype=torch.float64)
    nearest = (blocks[:, :, None] / largest[:, :, None] - values).abs().argmin(dim=2)
    return (values[nearest] * scales.double().reshape(-1, 1)).reshape(weight.shape)


def test_nf4_is_the_nearest_of_16_values_times_the_blocks_largest() -> None:
    plain = layer()
    largest = plain.weight.reshape(-1, 64).abs().amax(dim=1)
    held = QuantizedLinear(plain, SINGLE)
    assert torch.equal(held.scales, largest)
    torch.testing.assert_close(
        held.weight.double(), in_blocks(plain.weight, largest), rtol=0, atol=1e-7
    )
    assert held.packed.numel() == plain.weight.numel() // 2, "two weights a byte"


def test_double_quantisation_rounds_the_scales_less_their_mean() -> None:
    plain = layer(outputs=96)  # 144 blocks
    largest = plain.weight.reshape(-1, 64).abs().amax(dim=1)
    held = QuantizedLinear(plain, DOUBLE)
    apart = largest - largest.mean()
    values = held.scales_values.double()  # 256 values in [-1, 1]
    wanted = values[(apart[:, None] / apart.abs().max() - values).abs().argmin(dim=1)]
    scales = wanted * apart.abs().max().double() + largest.mean().double()
    torch.testing.assert_close(
        held.weight.double(), in_blocks(plain.weight, scales), rtol=0, atol=1e-6
    )
    assert held.scales.dtype is torch.uint8
    off = (scales - largest.double()).abs().max() / apart.abs().max()
    assert 0 < off < 0.02, "the scales are rounded, and close"


def test_int8_is_the_nearest_127th_of_each_outputs_largest() -> None:
    plain = layer()
    weight = plain.weight.half().double()  # the library reads float16
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    torch.testing.assert_close(
        QuantizedLinear(plain, INT8).weight.double(),
        (weight / step).round() * step,
        rtol=1e-6,
        atol=1e-6,
    )


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients_are_those_of_the_rounded_weights(
    rounding: Rounding, dtype: torch.dtype
) -> None:
    plain = layer().to(dtype)
    held = QuantizedLinear(plain, rounding)
    whole = held.whole()
    assert torch.equal(held.weight, whole.weight) and whole.weight.dtype is dtype
    rows = torch.randn(2, 5, 96, dtype=dtype, requires_grad=True)
    given = torch.randn(2, 5, 6, dtype=dtype)
    outputs, wanted = held(rows), whole(rows)
    assert torch.equal(outputs, wanted)
    found, right = (torch.autograd.grad(y, rows, given)[0] for y in (outputs, wanted))
    torch.testing.assert_close(found, right, rtol=0, atol=1e-6 if dtype is torch.float32 else 0.02)
    by_hand = rows.detach().double() @ whole.weight.double().T + whole.bias.double()
    bound = 1e-5 if dtype is torch.float32 else 0.03
    torch.testing.assert_close(outputs.detach().double(), by_hand, rtol=0, atol=bound)


@ALL
def test_autocast_computes_as_a_plain_layer_does(rounding: Rounding) -> None:
    held = QuantizedLinear(layer(), rounding)
    rows = torch.randn(3, 96, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, wanted = held(rows), held.whole()(rows)
    assert outputs.dtype is torch.bfloat16 and torch.equal(outputs, wanted)
    outputs.float().sum().backward()
    assert rows.grad is not None and rows.grad.dtype is torch.float32 and rows.grad.abs().sum() > 0


@ALL
def test_a_gradient_after_an_evaluation_is_the_one_before(rounding: Rounding) -> None:
    """bitsandbytes' own 4-bit layer loses it on CPUs with bfloat16 products."""
    model = nn.Sequential(QuantizedLinear(layer(96, 96), rounding), nn.Linear(96, 1))
    rows = torch.randn(4, 96, requires_grad=True)

    def gradient() -> Tensor:
        return torch.autograd.grad(model.train()(rows).sum(), rows)[0]

    before = gradient()
    with torch.no_grad():
        model.eval()(rows.detach())
    assert torch.equal(gradient(), before) and before.abs().sum() > 0


@ALL
def test_another_dtype_changes_what_is_read_and_not_what_is_held(rounding: Rounding) -> None:
    held = QuantizedLinear(layer(), rounding)
    weight, kept = held.weight, {name: held.clone() for name, held in held.named_buffers()}
    moved = nn.Sequential(held).to(torch.bfloat16)[0]
    assert torch.equal(moved.weight, weight.to(torch.bfloat16))
    assert all(torch.equal(buffer, kept[name]) for name, buffer in moved.named_buffers())
    assert moved.bias.dtype is torch.bfloat16
    assert torch.equal(copy.deepcopy(held).weight, held.weight)
    assert not [name for name in held.state_dict() if name != "bias"], "never in a checkpoint"


@ALL
def test_a_row_of_zeros_stays_one(rounding: Rounding) -> None:
    plain = layer(8, 128)
    plain.weight[3] = 0.0
    assert torch.equal(QuantizedLinear(plain, rounding).weight[3], torch.zeros(128))


# ---- models ----


def configured(rounding: Rounding = DOUBLE, **options: object) -> AdapterConfig:
    return AdapterConfig(
        kind=AdapterKind.lora,
        quantize=rounding.method,
        double_quantize=rounding.double,
        **options,  # type: ignore[arg-type]
    )


def llama(**changes: object):
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(**{**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, **changes})
    )


@ALL
def test_a_model_held_rounded_is_the_model_of_rounded_weights(rounding: Rounding) -> None:
    plain = llama()
    held, rounded = copy.deepcopy(plain), round_weights(copy.deepcopy(plain), configured(rounding))
    count = quantize(held, configured(rounding))
    assert count == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert is_rounded(held) and not is_rounded(rounded)
    ids = torch.arange(12)[None]
    logits = held(input_ids=ids).logits
    assert torch.equal(logits, rounded(input_ids=ids).logits)
    assert not torch.allclose(logits, plain(input_ids=ids).logits, atol=1e-4)
    assert type(held.lm_head) is nn.Linear, "a head is not held rounded"


def test_modules_that_train_whole_and_shared_weights_stay() -> None:
    model = llama()
    first = model.model.layers[0].mlp
    first.up_proj.weight = first.gate_proj.weight
    quantize(model, configured(save_whole=["layers.1.mlp.up_proj", "o_proj"]))
    left = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert left == {
        "lm_head",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj",
    }


def test_a_model_without_linear_layers_is_refused() -> None:
    from transformers import AutoModelForCausalLM, GPT2Config

    model = AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    )
    with pytest.raises(UserError, match=r"adapter\.quantize=nf4: gpt2 has no plain linear layer"):
        quantize(model, configured())


# ---- beside bitsandbytes' own layers ----


def test_4_bits_are_those_of_bitsandbytes_own_layer() -> None:
    plain = layer(6, 128, bias=False)  # its kernel misreads rows that are no multiple of 64
    theirs = quantized.bitsandbytes().nn.Linear4bit(128, 6, bias=False, quant_type="nf4")
    theirs.weight = type(theirs.weight)(
        plain.weight.data.clone(), requires_grad=False, quant_type="nf4", module=theirs
    )
    theirs.to("cpu")  # rounds
    rows = torch.randn(4, 128, requires_grad=True)
    torch.testing.assert_close(
        QuantizedLinear(plain, DOUBLE)(rows), theirs.train()(rows), rtol=0, atol=1e-5
    )


def test_8_bits_leave_activations_as_they_are() -> None:
    """bitsandbytes' own layer rounds them too: a generator of whole weights would be off by it."""
    plain = layer(96, 96, bias=False)
    theirs = quantized.bitsandbytes().nn.Linear8bitLt(
        96, 96, bias=False, has_fp16_weights=False, threshold=6.0
    )
    theirs.load_state_dict(plain.state_dict())
    theirs.to("cpu")
    rows = torch.randn(64, 96)
    exact = rows @ plain.weight.T
    ours, other = (
        float((found.detach() - exact).abs().mean())
        for found in (QuantizedLinear(plain, INT8)(rows), theirs.eval()(rows))
    )
    assert 0 < ours < 0.75 * other, (ours, other)
