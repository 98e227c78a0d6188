"""What a vLLM engine starts with: its environment and its options. Nothing here imports vllm."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from conf.schema import RolloutConfig
from rlhf.process import distributed

# tokens per KV block on a CPU: only whole blocks of a prompt are shared, and vLLM's own 128 is
# longer than most prompts
_CPU_BLOCK = 32
# Loggers whose warnings mean nothing here: RotaryEmbedding got no weights in a sync (it has none;
# Incoming names missing ones), and without a tokenizer the engine knows no end of sequence (each
# request names it).
QUIET = (
    "vllm.engine.arg_utils",  # that a seed is set, which a seed per request makes moot
    "vllm.model_executor.model_loader.reload.layerwise",
    "vllm.renderers.base",  # that there is no tokenizer, which is as it should be
    "vllm.v1.worker.cpu_worker",  # that threads can't be set after binding
)
# The engine stays in this process, so that weights go over as tensors; nothing is reported to
# vLLM's makers.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
_ENVIRONMENT_DEFAULTS = {"VLLM_LOGGING_LEVEL": "WARNING"}
# What starting an engine changes for everyone else: our own ranks read the first, every child
# process would inherit the second.
_RESTORED = ("LOCAL_WORLD_SIZE", "LD_PRELOAD")
_OVERRIDING = "VLLM_CPU_KVCACHE_SPACE"  # would win over rollout.kv_cache_gib


def errors_only(record: logging.LogRecord) -> bool:
    """A logger's filter."""
    return record.levelno >= logging.ERROR


@contextmanager
def engine_environment() -> Iterator[None]:
    """vLLM's environment variables, set before it is imported; what it changes for other code is
    put back afterwards.
    """
    os.environ.update(_ENVIRONMENT)
    for name, value in _ENVIRONMENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.pop(_OVERRIDING, None)
    before = {name: os.environ.get(name) for name in _RESTORED}
    try:
        yield
    finally:
        for name, old in before.items():
            if old is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = old


def device_options(cfg: RolloutConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The engine's options that depend on the device."""
    if not torch.cuda.is_available():
        # Eager: compiling a model of 1M parameters takes 20 to 40 s at the start and saves 1.5 ms
        # of a 15 ms step (64 sequences, 2 cores).
        options: dict[str, Any] = {
            "kv_cache_memory_bytes": int(cfg.kv_cache_gib * 2**30),
            "enforce_eager": True,
            "block_size": _CPU_BLOCK,
        }
        if dtype is torch.float32:
            # Of latent attention only: on processors with AMX vLLM would take a backend that has
            # bfloat16 alone.
            options["attention_backend"] = "CPU_MLA"
        return options
    options = {
        "gpu_memory_utilization": cfg.gpu_memory_utilization,
        "enforce_eager": cfg.enforce_eager,
    }
    if distributed.world_size() > 1:
        # each rank's engine on its own device; else all take the first
        options["distributed_executor_backend"] = "external_launcher"
    return options


def adapter_directory() -> tempfile.TemporaryDirectory[str]:
    """Where the adapter's files go: in memory, where there is such a folder."""
    shared = Path("/dev/shm")
    folder = shared if os.access(shared, os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="rlhf-adapter-", dir=folder)
