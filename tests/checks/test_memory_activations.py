"""The memory plan's activations against the tensors that autograd saves, one by one; the published
formula against a block of its time.
"""

import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from conf.choices import AdapterKind, Placement, Quantization
from conf.methods import BottleneckConfig
from conf.schedule import TrainPart
from conf.schema import AdapterConfig
from policy.adapters import attach, enable_checkpointing
from policy.batching import collate, pack
from policy.logprobs import selected_logprobs
from policy.model import LONGEST_DENSE, base_of
from rlhf.checks.memory import activations, shapes
from rlhf.checks.memory.activations import Pass

ROWS, LENGTH = 4, 128


class Held:
    """What autograd keeps of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(module: nn.Module, run: Any) -> int:
    """Bytes of the storages that autograd still keeps when `run` is done, the module's own weights
    left out, each counted once.
    """
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: weakref.WeakSet[Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Held:
        held = Held(tensor)
        kept.add(held)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        out = run()
    assert out is not None
    storages = [held.tensor.untyped_storage() for held in kept]
    sizes = {one.data_ptr(): one.nbytes() for one in storages}
    return sum(size for place, size in sizes.items() if place not in own)


def model_and_shape(
    attention: str, dtype: torch.dtype, kv_heads: int, rank: int
) -> tuple[Any, shapes.Shape]:
    from transformers import AutoModelForCausalLM

    config = shapes.llama(
        vocab=1000, hidden=256, intermediate=640, layers=4, heads=4, kv_heads=kv_heads, tied=True
    )
    model: Any = AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=attention
    )
    if rank:
        model = attach(model, AdapterConfig(kind=AdapterKind.lora, rank=rank), task="CAUSAL_LM")
    return model, shapes.shape_of_config(config, "x", eager=attention == "eager")


def measure(model: Any, **more: Any) -> int:
    ids = torch.randint(0, 1000, (ROWS, LENGTH))
    return saved_bytes(
        model,
        lambda: base_of(model).model(input_ids=ids, use_cache=False, **more).last_hidden_state,
    )


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_pass_keeps_what_the_formula_says(
    attention: str, dtype: torch.dtype, kv_heads: int, rank: int
) -> None:
    model, shape = model_and_shape(attention, dtype, kv_heads, rank)
    adapter = AdapterConfig(kind=AdapterKind.lora, rank=rank) if rank else AdapterConfig()
    beside = activations.beside(shape, adapter)
    expected = activations.kept(
        shape, Pass(ROWS * LENGTH, dtype.itemsize, length=LENGTH, adapter=beside)
    )
    assert expected == pytest.approx(measure(model), rel=0.05)


@pytest.mark.parametrize("layers", [1, 3])
def test_blocks_that_no_gradient_passes_keep_nothing(layers: int) -> None:
    model, shape = model_and_shape("sdpa", torch.float32, 2, 0)
    train = TrainPart(layers=layers)
    passed = shapes.trained_parts(shape, train, classifier=False).layers
    attach(model, AdapterConfig(), task="CAUSAL_LM", train=train)
    p = Pass(ROWS * LENGTH, 4, length=LENGTH, layers=passed)
    assert passed == layers
    assert activations.kept(shape, p) == pytest.approx(measure(model), rel=0.05)


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8, "quantize": Quantization.nf4},
    "lora, A frozen": {"rank": 8, "freeze_a": True},
    "lora, dora": {"rank": 8, "dora": True},
    "rasa": {"rank": 8},
    "lora_mini": {"rank": 8},
    "molora": {"rank": 4},
    "adalora": {},
    "bottleneck": {},
    "bottleneck, houlsby": {"bottleneck": BottleneckConfig(placement=Placement.houlsby)},
    "ia3": {"targets": ["k_proj", "v_proj", "down_proj"]},
    "vera": {"rank": 64},
    "oft": {},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_a_methods_pass_keeps_what_the_plan_says(method: str, dtype: torch.dtype) -> None:
    kind = AdapterKind(method.partition(",")[0])
    adapter = AdapterConfig(kind=kind, **METHODS[method])
    model, shape = model_and_shape("sdpa", dtype, 2, 0)
    model = attach(model, adapter, task="CAUSAL_LM")
    beside = activations.beside(shape, adapter)
    assert beside is not None
    p = Pass(ROWS * LENGTH, dtype.itemsize, length=LENGTH, adapter=beside)
    expected, found = activations.kept(shape, p), measure(model)
    print(f"{method} in {dtype}: measured {found / 1e6:.1f} MB, planned {expected / 1e6:.1f}")
    assert expected == pytest.approx(found, rel=0.15)


def test_checkpointing_keeps_a_blocks_input_alone() -> None:
    model, shape = model_and_shape("sdpa", torch.float32, 4, 0)
    enable_checkpointing(model)
    model.train()
    p = Pass(ROWS * LENGTH, 4, length=LENGTH, checkpointing=True)
    # a block is computed anew on the way back
    in_the_pass = activations.kept(shape, p) - p.tokens * activations.block_bytes(shape, p)
    assert in_the_pass == pytest.approx(measure(model), rel=0.05)
    assert (
        activations.kept(shape, p)
        < activations.kept(shape, Pass(ROWS * LENGTH, 4, length=LENGTH)) / 2.5
    )


def test_autocast_keeps_half_precision_copies_of_inputs_and_weights() -> None:
    model, shape = model_and_shape("sdpa", torch.float32, 2, 0)
    with torch.autocast("cpu", torch.bfloat16):
        found = measure(model)
    assert activations.kept(
        shape, Pass(ROWS * LENGTH, 4, length=LENGTH, autocast=True)
    ) == pytest.approx(found, rel=0.1)


def test_a_mask_of_ours_repeats_the_keys() -> None:
    model, shape = model_and_shape("sdpa", torch.float32, 2, 0)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None].expand(ROWS, -1, -1, -1)
    expected = activations.kept(shape, Pass(ROWS * LENGTH, 4, length=LENGTH, masked=True))
    assert expected == pytest.approx(measure(model, attention_mask=mask), rel=0.05)
    assert expected > 1.03 * activations.kept(shape, Pass(ROWS * LENGTH, 4, length=LENGTH))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_pack_of_shared_prompts_keeps_no_more_than_the_plan_counts(attention: str) -> None:
    """Of as many tokens as engine.micro_tokens: a prompt of 128 and six responses of 65."""
    model, shape = model_and_shape(attention, torch.float32, 2, 0)
    packed = pack(collate([[1] * 128] * 6, [[2] * 65] * 6, 0), [list(range(6))])
    tokens = packed.input_ids.numel()
    assert tokens == 128 + 6 * 64
    found = saved_bytes(
        model,
        lambda: (
            base_of(model)
            .model(
                input_ids=packed.input_ids,
                position_ids=packed.position_ids,
                attention_mask=packed.attention_mask,
                use_cache=False,
            )
            .last_hidden_state
        ),
    )
    planned = activations.kept(shape, Pass(tokens, 4, length=128 + 65, masked=True, pack=tokens))
    assert activations.LONGEST_DENSE == LONGEST_DENSE == tokens
    assert found <= planned
    assert planned < 1.1 * found


def test_the_heads_logits_exist_as_often_as_the_formula_says() -> None:
    """Kept between the passes, of one chunk; what is there only for a moment is in the measured
    peaks (tests/checks/test_memory_measured.py).
    """
    _, shape = model_and_shape("sdpa", torch.float32, 4, 0)
    rows = 64
    head = nn.Linear(shape.hidden, shape.vocab, bias=False)
    hidden, labels = (
        torch.randn(rows, shape.hidden, requires_grad=True),
        torch.randint(0, shape.vocab, (rows,)),
    )
    inputs = hidden.untyped_storage().nbytes() + labels.untyped_storage().nbytes()
    found = saved_bytes(
        head, lambda: selected_logprobs(hidden, head, labels, chunk=rows, entropy_grad=False)
    )
    plain = activations.policy_head(shape, rows, 4, temperature=1.0, entropy_grad=False, grad=True)
    assert plain == pytest.approx(found - inputs, rel=0.02)
    with_entropy = (
        saved_bytes(
            head, lambda: selected_logprobs(hidden, head, labels, chunk=rows, entropy_grad=True)
        )
        - inputs
    )
    assert (
        plain
        < with_entropy
        < activations.policy_head(shape, rows, 4, temperature=1.0, entropy_grad=True, grad=True)
    )


class Block(nn.Module):
    """The block of Korthikanti et al. 2022, section 4.1: dropout of 0.1 in three places, attention
    scores that are kept, GELU, half precision.
    """

    def __init__(self, h: int, a: int) -> None:
        super().__init__()
        self.a = a
        self.norms = nn.ModuleList(nn.LayerNorm(h) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Linear(h, h) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(h, h), nn.Linear(h, 4 * h), nn.Linear(4 * h, h)

    def forward(self, x: Tensor) -> Tensor:
        b, s, h = x.shape
        y = self.norms[0](x)
        q, k, v = (linear(y).view(b, s, self.a, h // self.a).transpose(1, 2) for linear in self.qkv)
        scores = (q @ k.transpose(2, 3)) / math.sqrt(h // self.a)
        p = functional.dropout(scores.softmax(-1), 0.1)
        x = x + functional.dropout(self.out((p @ v).transpose(1, 2).reshape(b, s, h)), 0.1)
        y = self.up(self.norms[1](x))
        return x + functional.dropout(self.down(functional.gelu(y)), 0.1)


def test_the_published_formula_counts_the_block_that_it_was_made_for() -> None:
    """Equation 1: s b h (34 + 5 a s / h). PyTorch's dropout keeps its mask in half precision on a
    CPU, where the paper has one byte.
    """
    s, b, h, a = 64, 2, 128, 4
    block = Block(h, a).to(torch.bfloat16)
    x = torch.randn(b, s, h, dtype=torch.bfloat16, requires_grad=True)
    found = saved_bytes(block, lambda: block(x))
    masks = s * b * (a * s + 2 * h)  # elements of the three masks, one byte less each in the paper
    assert found - masks == pytest.approx(activations.korthikanti(s, b, h, a), rel=0.02)
    assert activations.korthikanti(s, b, h, a, recompute=True) == 2 * s * b * h
