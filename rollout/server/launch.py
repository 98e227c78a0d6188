"""The options that a vLLM server of ours starts with: those of the engine in the trainer's process
(rollout/vllm.py), so that both write the same, and what guards and feeds a server.
"""

import json
from typing import Any

import torch

from conf.model import Transfer
from conf.schema import RolloutConfig
from rollout.sampling import device_options
from rollout.server.process import Recipe
from rollout.server.routes import engine_name
from rollout.vllm_private import lora_options

_EXTENSION = "rollout.server.extension.Extension"
_MIDDLEWARE = "rollout.server.middleware.BearerToken"
MODEL = "base"  # the model's name at a server; adapters have others


def device_flags(cfg: RolloutConfig, dtype: torch.dtype, max_tokens: int) -> dict[str, Any]:
    """An engine's options that depend on the device, as a server's command line has them."""
    device = device_options(cfg, dtype, max_tokens)
    device["no_enable_chunked_prefill"] = not device.pop("enable_chunked_prefill", True)
    device.pop("distributed_executor_backend", None)  # that of an engine for each rank
    return device


def recipe_of(
    cfg: RolloutConfig,
    model_path: str,
    *,
    token: str,
    dtype: torch.dtype,
    max_tokens: int,
    transfer: Transfer,
    adapter_rank: int | None = None,
    trust_remote_code: bool = False,
) -> Recipe:
    """How servers of this model are started. `max_tokens`: prompt and response together.
    `transfer`: not auto. `adapter_rank` None: whole weights only. Raises UserError.
    """
    flags = {
        "served_model_name": MODEL,
        "tokens_only": True,  # token ids in, token ids out
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": max_tokens,
        "max_num_seqs": cfg.max_num_seqs,
        "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from
        "seed": 0,
        "generation_config": "vllm",  # no defaults of the model's own
        "trust_remote_code": trust_remote_code,
        "middleware": _MIDDLEWARE,
        "worker_extension_cls": _EXTENSION,
        "weight_transfer_config": json.dumps({"backend": engine_name(transfer)}),
        "disable_uvicorn_access_log": True,
        "uvicorn_log_level": "warning",
        **device_flags(cfg, dtype, max_tokens),
    }
    if adapter_rank is not None:
        flags |= lora_options(adapter_rank, cfg.max_lora_rank)
        if cfg.in_flight:
            flags["max_loras"] = 2  # a response keeps the adapter that it began with
    return Recipe(
        model_path,
        flags,
        cfg.server,
        token,
        lora=adapter_rank is not None,
        handles=transfer is Transfer.ipc,
    )
