"""Options that exclude each other, and what is handled but worth saying: checks of
`rlhf.checks.preflight`, one message each, with the mend.
"""

import importlib
import math
from pathlib import Path
from typing import Any

from conf.choices import AdapterKind, Dtype, LoraSync, ModelKind, RolloutBackend
from conf.schema import Config
from conf.stages import EvalStage, OfflineStage, OnlineStage
from rlhf.checks import disk as room
from rlhf.checks.memory import GIB
from rlhf.models.loading import json_object, load_tokenizer
from rlhf.process import distributed
from rlhf.types import UserError

_PLANNED_GIB = 0.25  # weights below which a run doesn't take the second for its memory plan
# vllm.config.lora.MaxLoRARanks of vLLM 0.32, which takes 20 s to import
VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def ranks_of(cfg: Config) -> int:
    """Ranks that the run will have: those launched; in a dry run those that it is about."""
    return (
        cfg.engine.gpus
        if cfg.run.dry_run and cfg.engine.gpus is not None
        else distributed.world_size()
    )


def check_devices(cfg: Config) -> None:
    """engine.gpus is what was launched; a dry run may ask about another number."""
    wanted, launched = cfg.engine.gpus, distributed.world_size()
    if (
        not isinstance(cfg.stage, (OfflineStage, OnlineStage))
        or wanted is None
        or cfg.run.dry_run
        or wanted == launched
    ):
        return
    ranks = "1 rank was" if launched == 1 else f"{launched} ranks were"
    raise UserError(
        f"engine.gpus={wanted}, but {ranks} launched. Launch with `torchrun --standalone "
        f"--nproc_per_node {wanted} -m rlhf ...`, "
        "or leave engine.gpus out."
    )


def check_precision(cfg: Config) -> None:
    """float16 gradients vanish without a scaled loss, which only TRL's trainers have; DeepSpeed's
    engine would train bfloat16 in its place.
    """
    if isinstance(cfg.stage, OnlineStage) and cfg.model.dtype is Dtype.float16:
        raise UserError(
            f"model.dtype=float16: stage={cfg.stage.name} scales no loss, so that small "
            "gradients would vanish in float16. "
            "Set model.dtype=bfloat16, or float32."
        )


def vllm_runs(cfg: Config) -> bool:
    """Whether responses come from vLLM."""
    if cfg.rollout.backend is RolloutBackend.auto:
        return bool(importlib.import_module("rlhf.checks.preflight").installed("vllm"))
    return cfg.rollout.backend is RolloutBackend.vllm


def check_lora_rank(cfg: Config) -> None:
    """vLLM has room for adapters of certain ranks only; merged weights have none."""
    adapter, rollout = cfg.adapter, cfg.rollout
    merged = rollout.lora_sync is LoraSync.merged or (
        rollout.lora_sync is LoraSync.auto and adapter.dora
    )
    if (
        not isinstance(cfg.stage, OnlineStage)
        or adapter.kind is AdapterKind.none
        or merged
        or not vllm_runs(cfg)
    ):
        return
    holding = [rank for rank in VLLM_LORA_RANKS if rank >= adapter.rank]
    if not holding:
        raise UserError(
            f"adapter.rank={adapter.rank} is above every LoRA rank that vLLM takes "
            f"({', '.join(map(str, VLLM_LORA_RANKS))}). "
            "Lower adapter.rank, or set rollout.lora_sync=merged."
        )
    if rollout.max_lora_rank is not None and rollout.max_lora_rank not in holding:
        raise UserError(
            f"rollout.max_lora_rank={rollout.max_lora_rank}: with adapter.rank={adapter.rank} "
            f"vLLM takes one of {', '.join(map(str, holding))}. "
            f"Set rollout.max_lora_rank={holding[0]}, or null."
        )


def check_cache(cfg: Config) -> None:
    """vLLM's cache holds one prompt with its response; on a GPU, where the share also holds the
    weights, the memory plan says it.
    """
    import torch

    if (
        not isinstance(cfg.stage, (OnlineStage, EvalStage))
        or not vllm_runs(cfg)
        or torch.cuda.is_available()
    ):
        return
    per_token = cache_bytes_per_token(cfg)
    longest = cfg.data.max_prompt_length + cfg.rollout.max_response_length
    needed = None if per_token is None else per_token * longest / GIB
    if needed is not None and needed > cfg.rollout.kv_cache_gib:
        raise UserError(
            f"rollout.kv_cache_gib={cfg.rollout.kv_cache_gib:g} doesn't hold one sequence: "
            f"data.max_prompt_length={cfg.data.max_prompt_length} + "
            f"rollout.max_response_length={cfg.rollout.max_response_length} tokens take "
            f"{needed:.3g} GiB. "
            f"Set rollout.kv_cache_gib={math.ceil(needed * 10) / 10:g} or more, or lower the "
            "lengths."
        )


def cache_bytes_per_token(cfg: Config) -> int | None:
    """Keys and values of a token in all layers, by a configuration on the disk; None where there is
    none to read (check_lengths says why).
    """
    width = 2 if cfg.model.dtype in (Dtype.bfloat16, Dtype.float16) else 4
    if cfg.model.path is None:
        tiny = cfg.model.tiny
        return (
            2 * tiny.layers * tiny.hidden_size * width if cfg.model.kind is ModelKind.tiny else None
        )
    place = Path(cfg.model.path).expanduser() / "config.json"
    if not place.is_file():
        return None
    content = json_object(place, "this model can't be loaded")
    found = [
        content.get(name) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    ]
    layers, heads, hidden = (value if isinstance(value, int) else 0 for value in found)
    if min(layers, heads, hidden) < 1:  # another family's names
        return None
    size, kv_heads = (
        content.get("head_dim") or hidden // heads,
        content.get("num_key_value_heads") or heads,
    )
    return (
        2 * layers * kv_heads * size * width
        if isinstance(size, int) and isinstance(kv_heads, int)
        else None
    )


def check_padding(cfg: Config) -> list[str]:
    """Padding that is the end-of-sequence token does no harm here, and is said once."""
    if not isinstance(cfg.stage, (OfflineStage, OnlineStage)):
        return []
    tokenizer = policy_tokenizer(cfg)
    if tokenizer is None or tokenizer.pad_token_id != tokenizer.eos_token_id:
        return []
    return [
        f"model.path={cfg.model.path}: padding is the end-of-sequence token "
        f"{tokenizer.eos_token!r}. Masks come from lengths, so the end of a "
        "response still trains; to pad with another token, set pad_token in the model's "
        "tokenizer_config.json."
    ]


def policy_tokenizer(cfg: Config) -> Any:
    """The policy's tokenizer where it is on the disk and quickly read, else None. Raises UserError
    for one that can't be read.
    """
    path = cfg.model.path
    if path is None or cfg.model.gguf_file is not None or not Path(path).expanduser().is_dir():
        return None
    return load_tokenizer(cfg.model, cfg.data.chat_template)


def check_critic(reward_path: str, reward_tokenizer: Any, policy: Any) -> None:
    """A critic that starts from the reward model reads the policy's own tokens; its template has no
    part in that.
    """
    if reward_tokenizer.get_vocab() != policy.get_vocab():
        raise UserError(
            f"stage.critic_init=reward: the reward model {reward_path} has another tokenizer "
            f"({len(reward_tokenizer)} entries) than the policy "
            f"({len(policy)}), so its weights can't read the policy's tokens. Set "
            "stage.critic_init=policy."
        )


def reading_note(
    key: str, path: str, reward_tokenizer: Any, manifest: Any, policy: Any
) -> list[str]:
    """How a reward model reads responses whose tokenizer or template isn't its own; nothing where
    it is.
    """
    models = importlib.import_module("reward.model")
    if not models.same_reading(manifest, policy):
        what = (
            f"another tokenizer ({len(reward_tokenizer)} entries) than the policy ({len(policy)})"
        )
    elif models.template_hash(policy) != manifest.chat_template_hash and manifest.conversational:
        what = "another chat template than the policy"
    else:
        return []
    return [
        f"{key}={path}: the reward model has {what}, so prompts and responses go to it as text, "
        "which its own tokenizer and template put into tokens "
        "anew. To score the policy's own tokens, train it from the policy: stage=reward "
        "model.path=<the policy's model directory>."
    ]


def check_memory(cfg: Config) -> list[str]:
    """Says where the memory plan doesn't fit the devices. Parts of it are assumed, so this is a
    warning.
    """
    if (
        not isinstance(cfg.stage, (OfflineStage, OnlineStage))
        or cfg.run.dry_run
        or cfg.model.path is None
    ):
        return []
    if (room.weight_files(cfg.model.path) or 0) < _PLANNED_GIB * GIB:
        return []
    from rlhf.checks.memory.machine import machine_of
    from rlhf.checks.memory.plan import HEADROOM, plan
    from rlhf.checks.memory.subjects import shapes_of

    machine = machine_of(cfg, all_devices=False)
    shapes, _ = shapes_of(cfg, assume_reward=False)
    found = plan(cfg, shapes, machine)
    if found.fits:
        return []
    usable = (
        f"{HEADROOM * machine.device_gib:.1f} GiB are usable on each "
        f"{'device' if machine.cuda else 'rank'}"
    )
    return [
        f"the memory plan doesn't fit, {usable}: {found.obstacle}. "
        f"`python -m rlhf stage=doctor stage.plan={cfg.stage.name}` with the same model and "
        "engine options says which setting does."
    ]


CHECKS = (check_devices, check_precision, check_lora_rank, check_cache, check_padding)
