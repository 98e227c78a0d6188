"""The generator's memory: weights and key-value cache, of vLLM or of transformers."""

from dataclasses import dataclass

from rlhf.checks.memory.shapes import Shape

# what vLLM measures beside weights and cache at its start (activations, graphs); assumed, not
# measured here
VLLM_OVERHEAD_GIB = 1.5
_BLOCK = 16  # tokens of a block of vLLM's cache on a GPU


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
