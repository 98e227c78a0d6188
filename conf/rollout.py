"""The group ``rollout``: how prompts become responses."""

from dataclasses import dataclass

from conf.choices import LoraSync, RolloutBackend
from conf.options import check_options, option


@dataclass(slots=True, kw_only=True)
class RolloutConfig:
    """How prompts become responses: the generator, its sampling and its memory."""

    backend: RolloutBackend = option(
        RolloutBackend.auto,
        "Generator of responses; auto: vLLM where it is installed, else hf, which is logged.",
    )
    max_response_length: int = option(
        1024, "Longest response; longer ones are cut off.", unit="tokens", at_least=1
    )
    temperature: float = option(1.0, "Softmax temperature of sampling.", above=0)
    top_p: float = option(
        1.0, "Sample from the likeliest tokens with this total probability.", above=0, at_most=1
    )
    top_k: int = option(0, "Sample from so many likeliest tokens; 0: from all.", at_least=0)
    kv_cache_gib: float = option(1.0, "Size of the KV cache of vLLM on CPU.", unit="GiB", above=0)
    gpu_memory_utilization: float = option(
        0.3, "Share of the device's memory that vLLM takes on CUDA.", above=0, below=1
    )
    max_num_seqs: int = option(
        256, "Sequences that are decoded at once.", unit="sequences", at_least=1
    )
    enforce_eager: bool = option(False, "vLLM on CUDA: no CUDA graphs.")
    lora_sync: LoraSync = option(
        LoraSync.auto,
        "What vLLM gets of a LoRA policy: the adapter or merged weights; auto: the adapter, except "
        "with DoRA.",
    )
    gap_tolerance: float | None = option(
        None,
        "Largest difference of log-probabilities between sampler and trainer that is accepted; "
        "null: 1e-4 in float32, 0.05 in half precision.",
        unit="nats",
        above=0,
    )
    max_lora_rank: int | None = option(
        None,
        "Largest LoRA rank that vLLM reserves room for; null: the smallest one that holds "
        "adapter.rank.",
        at_least=1,
    )

    def __post_init__(self) -> None:
        check_options(self, "rollout")
