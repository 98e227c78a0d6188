"""Configurations of DeepSpeed, FSDP and accelerate as our engines."""

import re
from collections.abc import Mapping
from typing import Any

from rlhf.migrate import reading
from rlhf.migrate.shared import computed, impossible
from rlhf.migrate.tables import Answer, Fate, Settings, listing, whole
from rlhf.types import UserError

ENGINE = ("engine", "engine.offload", "engine.nvme_path")


def deepspeed(s: Settings, value: Any) -> Answer:
    """A DeepSpeed configuration: its name (zero2), its file, or its keys. Raises UserError for a
    file that is here and can't be read.
    """
    if isinstance(value, Mapping):
        return _of_deepspeed(value)
    text = str(value)
    try:
        file = reading.beside(s.file, text)
    except UserError:
        return _by_name(text)
    return _of_deepspeed(reading.mapping(file))


def _by_name(text: str) -> Answer:
    """A configuration that is not here, by its name."""
    named = re.search(r"(?:zero|z|stage)[_-]?([0-3])", text)
    if named is None:
        return impossible(f"{text} is not here, and its name tells no ZeRO stage")
    options: dict[str, Any] = {"engine": f"zero{named[1]}"}
    if "offload" in text:
        options["engine.offload"] = "cpu"
    return computed(options, "the ZeRO stage is read from the name")


def _of_deepspeed(config: Mapping[str, Any]) -> Answer:
    zero = config.get("zero_optimization") or {}
    options: dict[str, Any] = {"engine": f"zero{zero.get('stage', 0)}"}
    for part in ("offload_optimizer", "offload_param"):
        offloaded = zero.get(part) or {}
        device = offloaded.get("device", "none")
        if device != "none":
            options["engine.offload"] = device
            if device == "nvme":
                options["engine.nvme_path"] = offloaded.get("nvme_path")
    return computed(options, "of it, stage and offloading count; DeepSpeed gets the rest from here")


def fsdp(value: Any) -> Answer:
    """FSDP's sharding words as ZeRO."""
    words = " ".join(listing(value)) if not isinstance(value, bool) else "full_shard"
    options: dict[str, Any] = {"engine": "zero2" if "shard_grad_op" in words else "zero3"}
    if "offload" in words:
        options["engine.offload"] = "cpu"
    return computed(options, "FSDP's sharding is ZeRO's: gradients (2), weights too (3)")


def accelerate(s: Settings, value: Any) -> Answer:
    """accelerate's configuration file: DeepSpeed's or FSDP's part of it."""
    text = str(value)
    try:
        config = reading.mapping(reading.beside(s.file, text))
    except UserError:
        named = fsdp("full_shard") if "fsdp" in text else deepspeed(s, text)
        return Answer(named.fate, named.options, f"read from its name: {text}")
    kind = str(config.get("distributed_type", "NO")).upper()
    if kind == "FSDP":
        return fsdp("full_shard")
    if kind != "DEEPSPEED":
        return computed({}, f"distributed_type: {kind}")
    zero = config.get("deepspeed_config") or {}
    options: dict[str, Any] = {"engine": f"zero{zero.get('zero_stage', 0)}"}
    if zero.get("offload_optimizer_device", "none") != "none":
        options["engine.offload"] = zero["offload_optimizer_device"]
    return computed(options)


def shared_rows(s: Settings, value: Any) -> Answer:
    """Ranks that share each row (context or sequence parallel)."""
    ranks = whole(value)
    if ranks <= 1:
        return Answer(Fate.idle, note="off, as here")
    if s.schema not in ("sft", "ppo"):
        return impossible("ranks share rows in SFT and in online stages alone")
    return Answer(Fate.taken, {"engine.sequence_parallel": ranks})
