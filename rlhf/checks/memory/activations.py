"""What a forward pass keeps for its backward pass, and what a pass without one has at once.

Counted tensor by tensor as autograd saves them in transformers' Llama with PyTorch's
scaled-dot-product attention (sdpa), for one token of a block: hidden size h, queries q and keys k
columns, inner width i, a heads, w bytes a number. tests/checks/test_memory_activations.py counts
the saved tensors.

    each norm       its input in float32, 4h; one number, 4; where its weight trains the normalised
    input, w h; its output, w h
    attention       queries, keys, values and result, w (2q + 2k); the logarithms of the softmax's
    sums, 4a
                    eager: keys and values repeated for every head, and a row of probabilities, in
                    half precision in float32 as well
    feed-forward    gate, its activation, up, their product, 4 w i
    LoRA            a frozen layer keeps no input, but each adapter its own: in half precision a
    float32 copy, as PEFT's adapters are float32
    autocast        float32 norms, and a half-precision copy of what each linear layer reads

Korthikanti et al. 2022 (arXiv:2205.05198, equation 1) count a GPT block in half precision with
dropout and with attention scores kept: s b h (34 + 5 a s / h). It is in `korthikanti`; ours differs
since sdpa keeps no scores, there is no dropout, and RMSNorm computes in float32.
"""

from dataclasses import dataclass

from conf.adapters import planned_rank
from conf.choices import AdapterKind, Placement
from conf.schema import AdapterConfig
from rlhf.checks.memory.shapes import Shape

# what vLLM measures beside weights and cache at its start (activations, graphs); assumed, not
# measured here
VLLM_OVERHEAD_GIB = 1.5
# tokens up to which a pack of shared prompts has a dense mask (policy/model.py)
LONGEST_DENSE = 512
_BLOCK = 16  # tokens of a block of vLLM's cache on a GPU
# logits that TRL's fused head has at once (trl/kernels/chunked_logprob.py)
HEAD_TILE = 4096 * 16384


def korthikanti(s: int, b: int, h: int, a: int, *, recompute: bool = False) -> float:
    """Bytes of activations of one GPT block: s tokens, b rows, hidden size h, a heads; with full
    recomputation the input alone (2 s b h).
    """
    return float(2 * s * b * h if recompute else s * b * h * (34 + 5 * a * s / h))


def dense_pack(shape: Shape, tokens: int) -> int:
    """Tokens of the longest pack of shared prompts that has a dense mask: eager attention has no
    other. One pack may fill a micro-batch.
    """
    return tokens if shape.eager else min(tokens, LONGEST_DENSE)


@dataclass(frozen=True, slots=True)
class Beside:
    """What an adapter keeps of a pass, in one block. Counted tensor by tensor, as the rest."""

    inner: float  # numbers of its own for one token
    plain: float = 0.0  # numbers for one token in the precision of the layers beside it
    # Whether the inputs of the layers that it stands beside are kept: those of matrices that train.
    reads: bool = True
    copies: int = 1  # of such an input in half precision, each in float32
    weights: float = 0.0  # numbers, whatever the tokens
    # Halves of the lowest block, its attention and its feed-forward layer, that come before all
    # that trains, so that no gradient passes through them.
    spared: int = 0
    ahead: int = 0  # keys and values in front of each row's, in every block


def beside(shape: Shape, adapter: AdapterConfig) -> Beside | None:
    """What the adapter's method keeps; None without an adapter."""
    kind, rank, layers = adapter.kind, planned_rank(adapter), shape.layers
    if kind is AdapterKind.none:
        return None
    chosen = [one for one in shape.linears if _is_target(one.name, adapter)]
    each = len(chosen) / layers  # adapted layers of a block
    if kind is AdapterKind.molora:
        # both products of every expert, and the router's shares
        experts = adapter.molora.experts
        return Beside(each * (2 * experts * rank + experts), copies=2)
    if kind is AdapterKind.rasa:
        shared = adapter.rasa.shared
        return Beside(each * 2 * (rank - shared + shared * layers))
    if kind is AdapterKind.lora_mini:
        return Beside(each * (adapter.lora_mini.inner + rank), reads=False)
    if kind is AdapterKind.bottleneck:
        sites = 2 if adapter.bottleneck.placement is Placement.houlsby else 1
        inner = sites * (shape.hidden + 2 * adapter.bottleneck.size)
        return Beside(inner, reads=False, spared=3 - sites)
    if kind is AdapterKind.ia3:
        keys = 2 * shape.kv_heads * shape.head_size
        return Beside(keys + shape.intermediate, reads=False)
    if kind is AdapterKind.prefix:
        return Beside(0.0, reads=False, ahead=adapter.prompt.tokens)
    if kind in (AdapterKind.prompt, AdapterKind.ptuning):
        return Beside(0.0, reads=False)
    outputs = sum(one.outputs for one in chosen) / layers
    if kind is AdapterKind.vera:
        return Beside(each * rank + outputs, reads=False)
    if kind is AdapterKind.oft:
        # blocks of rotations, and what Cayley's transform makes them of
        inputs = sum(one.inputs for one in chosen) / layers
        return Beside(0.0, weights=3.0 * inputs * adapter.oft.block_size)
    if kind is AdapterKind.adalora:
        return Beside(each * 2 * adapter.adalora.initial_rank, copies=2)
    if adapter.dora:
        # The layer's product and the update's. The sum of weights whose norms are taken is gone
        # after the layer, since no gradient passes through the norms.
        return Beside(each * rank + outputs, plain=outputs)
    return Beside(each * rank, reads=not adapter.freeze_a)


def virtual_tokens(adapter: AdapterConfig) -> int:
    """Tokens that a method puts in front of each row; a prefix's are keys and values alone."""
    rows = (AdapterKind.prompt, AdapterKind.ptuning)
    return adapter.prompt.tokens if adapter.kind in rows else 0


def _is_target(name: str, adapter: AdapterConfig) -> bool:
    return list(adapter.targets) == ["all-linear"] or name in adapter.targets


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass: what decides how much it keeps."""

    tokens: int  # padding included
    width: int  # bytes of a weight, and of an activation but under autocast
    length: int = 0  # tokens of a row, for attention that keeps its scores
    adapter: Beside | None = None  # beside frozen weights; None: the weights train
    # PEFT's own; under DeepSpeed's bf16 an adapter is bfloat16 as all else
    adapter_float32: bool = True
    autocast: bool = False  # float32 weights that train, half-precision products (TRL)
    masked: bool = False  # a mask of ours (shared prompts): keys are repeated for every head
    # tokens of the longest pack with a dense mask, of which every block keeps a copy in its dtype
    pack: int = 0
    checkpointing: bool = False
    layers: int | None = None  # blocks that a gradient passes through; None: all


def block_bytes(shape: Shape, p: Pass) -> float:
    """Bytes that one block keeps for one token."""
    return sum(_halves(shape, p)) + _adapter_bytes(shape, p)


def _halves(shape: Shape, p: Pass) -> tuple[float, float]:
    """Of a block's attention and of its feed-forward layer, each with the norm before it."""
    h, w = shape.hidden, 2 if p.autocast else p.width
    one = p.adapter
    copies = _copies(p)
    reads = one is None or one.reads
    queries = shape.heads * shape.head_size
    keys = queries if p.masked or shape.eager else shape.kv_heads * shape.head_size
    norm = 4 * h + 4
    if one is None:
        norm += p.width * h
    if reads and not copies and not p.autocast:
        norm += w * h
    attention = float(w * (2 * queries + 2 * keys))
    if one is not None and one.ahead and p.length:
        attention += w * 2 * keys * one.ahead / p.length
    seen = max(p.length, p.pack)
    attention += shape.heads * (seen * (w + (4 if w == 2 else 0)) if shape.eager else 4)
    attention += w * p.pack
    inner = 4
    if copies or not reads:
        inner = 3
    mlp = w * inner * shape.intermediate
    return norm + attention, norm + mlp


def _copies(p: Pass) -> bool:
    """Whether an adapter in float32 stands beside weights in half precision."""
    return p.adapter is not None and p.adapter_float32 and p.width == 2


def _adapter_bytes(shape: Shape, p: Pass) -> float:
    """Of what an adapter keeps in a block for itself, and of copies of what layers read."""
    one, copies = p.adapter, _copies(p)
    if one is not None:
        width = 4 if copies else p.width
        inner = width * (one.inner + one.weights / p.tokens)
        inner += p.width * one.plain
        if copies and one.reads:
            inner += 4 * one.copies * shape.adapted
        return inner
    # of queries, keys, values, gate and up; the other two layers read half precision as it is
    if p.autocast:
        return 2.0 * 5 * shape.hidden
    return 0.0


def kept(shape: Shape, p: Pass) -> float:
    """Bytes of activations that live at the end of the forward pass, the head left out. Blocks that
    no gradient passes through keep none; checkpointing keeps the inputs of all.
    """
    passed = shape.layers if p.layers is None else p.layers
    share = passed / shape.layers
    # of a block, for one token: all that checkpointing keeps (the paper's 2 s b h)
    inputs = p.width * shape.hidden
    last_norm = (4 if p.adapter else 4 + p.width) * shape.hidden
    # half-precision copies of the weights
    casts = 2.0 * sum(one.inputs * one.outputs for one in shape.linears) if p.autocast else 0.0
    casts *= share
    # a pack's mask as it comes, a byte for each pair of tokens; ids and positions
    given = p.pack + 16 if p.pack else 0
    if p.checkpointing:
        return (
            p.tokens * (shape.layers * inputs + block_bytes(shape, p) + last_norm + given)
            + casts / shape.layers
        )
    # the lowest of these blocks has an input without a gradient, so its first norm keeps no copy
    spared = 0.0
    if 0 < passed < shape.layers:
        spared = 4.0 * shape.hidden
    if p.adapter is not None and passed:
        spared += sum(_halves(shape, p)[: p.adapter.spared])
    return p.tokens * (passed * block_bytes(shape, p) + last_norm + given - spared) + casts


def backward_transient(shape: Shape, p: Pass) -> float:
    """Gradients of activations that a block's backward pass has at once: those of the
    feed-forward's three inner tensors and of its input.
    """
    return p.tokens * p.width * (3 * shape.intermediate + 2 * shape.hidden)


def forward_transient(shape: Shape, p: Pass) -> float:
    """What a pass without gradients has at once: the residual, a norm's float32 copies, and the
    three inner tensors of a feed-forward layer.
    """
    return p.tokens * (p.width * (3 * shape.hidden + 3 * shape.intermediate) + 8 * shape.hidden)


def policy_head(
    shape: Shape, rows: int, width: int, *, temperature: float, entropy_grad: bool, grad: bool
) -> float:
    """Bytes of the logits of `rows` tokens, the most of a chunk (policy/logprobs.py), and of the
    head's hidden states.

    The logits are float32. Without a gradient of the entropy they exist once, since probabilities
    and gradient overwrite them; half-precision ones exist beside them while they are converted and,
    as gradients, on the way back; with a temperature other than 1 there are two. With a gradient of
    the entropy the logarithm, its exponential, their product and three gradients make five.
    """
    once = 4 * rows * shape.vocab
    if entropy_grad and grad:
        return 5.0 * once
    return once * (2.0 if temperature != 1.0 else 1.5 if width == 2 else 1.0)


def trl_head(shape: Shape, tokens: int, width: int, *, fused: bool, trained: bool) -> float:
    """Bytes of TRL's heads: `fused` (SFT, DPO, KTO) a tile of logits and, where the head trains,
    its float32 gradient; else all logits.

    All logits: themselves, in float32, their log-softmax and its gradient.
    """
    if fused:
        return float(
            min(HEAD_TILE, tokens * shape.vocab) * (width + 4)
            + (4 * shape.vocab * shape.hidden if trained else 0)
        )
    return float(tokens * shape.vocab * (12 + (4 if width == 2 else 0)))


# ---- the generator ----


def kv_bytes_per_token(shape: Shape, width: int) -> int:
    """Keys and values of every layer: 2 x layers x key-value heads x head size x bytes (Kwon et al.
    2023, arXiv:2309.06180, section 3).
    """
    return 2 * shape.layers * shape.kv_heads * shape.head_size * width


@dataclass(frozen=True, slots=True)
class Cache:
    """What a share of memory holds."""

    tokens: int
    sequences: int  # of full length at the same time


def cache_of(bytes_left: float, shape: Shape, width: int, max_tokens: int) -> Cache:
    """The cache that fits into `bytes_left`; 0 tokens where nothing is left."""
    tokens = max(0, int(bytes_left // kv_bytes_per_token(shape, width)))
    blocks = -(-max_tokens // _BLOCK) * _BLOCK
    return Cache(tokens, tokens // blocks)


def least_share(
    shape: Shape, width: int, max_tokens: int, sequences: int, device_gib: float
) -> float:
    """vLLM's gpu_memory_utilization that holds the weights, its overhead and `sequences` of full
    length, in steps of 0.05; above 1: it can't.
    """
    blocks = -(-max_tokens // _BLOCK) * _BLOCK
    needed = width * shape.parameters + sequences * blocks * kv_bytes_per_token(shape, width)
    share = (needed / 2**30 + VLLM_OVERHEAD_GIB) / device_gib
    return -(-round(share * 1000) // 50) * 0.05


def transformers_bytes(
    shape: Shape, width: int, sequences: int, prompt: int, response: int, adapter: int
) -> float:
    """Hugging Face generate: a model of its own, a cache that grows by copying one layer's keys,
    and four float32 rows of logits a sequence.
    """
    cache = kv_bytes_per_token(shape, width) * sequences * (prompt + response)
    return (
        width * shape.parameters
        + 4 * adapter
        + cache * (1 + 1 / (2 * shape.layers))
        + 16 * sequences * shape.vocab
    )
