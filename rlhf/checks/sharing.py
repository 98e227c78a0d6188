"""What engine.sequence_parallel can be combined with, asked before any weight loads. Ranks that
share rows hold a part of every row's tokens each, and of the attention some heads over all tokens.
"""

from typing import Any

from conf.adapters import virtual_tokens
from conf.choices import AdapterKind
from conf.schema import AdapterConfig, EngineConfig, ModelConfig
from conf.stages import OfflineStage, OnlineStage, SFTStage, TrainStage
from rlhf.checks.memory.shapes import can_plan, read_shape
from rlhf.types import UserError

# Turns of positions that depend on the longest row that a rank sees.
_BY_LENGTH = {"longrope", "su", "dynamic"}
_ALIKE = ("sdpa", None)  # attention that needs no mask for whole causal rows


def check(
    stage: TrainStage,
    model: ModelConfig,
    adapter: AdapterConfig,
    engine: EngineConfig,
    longest: int,
    launched: int,
) -> None:
    """Raises UserError, by the name of what ranks can't share rows with. longest: row in tokens;
    launched: ranks in all.
    """
    ranks = engine.sequence_parallel
    if ranks == 1:
        return
    problem = _of_options(stage, model, adapter)
    if launched % ranks:
        problem = f"engine.gpus={launched}, the ranks in all, are no multiple of it"
    if problem is None and engine.share_prompts:
        problem = "engine.share_prompts=true needs a mask, and these ranks attend without"
    if problem is None and can_plan(model):
        problem = _of_model(read_shape(model).model, ranks, longest)
    if problem is not None:
        raise UserError(
            f"engine.sequence_parallel={ranks}: {problem}. Set engine.sequence_parallel=1."
        )


def obstacle(
    stage: OfflineStage, model: ModelConfig, adapter: AdapterConfig, lm: Any, ranks: int
) -> str | None:
    """Why so many ranks can't share the rows of a stage; None where they can. lm: the model on the
    meta device.
    """
    return _of_options(stage, model, adapter) or _of_model(lm, ranks, stage.max_length)


def _of_options(stage: TrainStage, model: ModelConfig, adapter: AdapterConfig) -> str | None:
    """Why the stage, the adapter or the attention of the options can't have it."""
    problem = None
    if isinstance(stage, SFTStage):
        if stage.packing:
            problem = "stage.packing=true keeps the rows of a sequence apart by a mask"
        if stage.neftune_alpha is not None:
            problem = "stage.neftune_alpha goes by a row's length, and each rank has a share of it"
    elif isinstance(stage, OnlineStage):
        problem = _of_online(stage, adapter)
    else:
        problem = (
            f"stage={stage.name} takes its loss from whole rows within TRL; ranks share rows in "
            "stage=sft and the online stages"
        )
    if stage.noise_scale is not None:
        problem = (
            f"stage.noise_scale={stage.noise_scale} compares the gradients of ranks, which belong "
            "to the same rows here"
        )
    if virtual_tokens(adapter) or adapter.kind is AdapterKind.prefix:
        problem = f"adapter={adapter.kind.value} puts virtual tokens in front of each part of a row"
    if model.attn_implementation not in _ALIKE:
        problem = f"model.attn_implementation={model.attn_implementation} is not sdpa"
    return problem


def _of_online(stage: OnlineStage, adapter: AdapterConfig) -> str | None:
    """A micro-batch is run twice (policy/shared_engine.py), so both passes have to be equal."""
    if stage.dropout:
        return "stage.dropout=true is drawn anew in the second pass of each micro-batch"
    if adapter.dropout:
        return f"adapter.dropout={adapter.dropout} is drawn anew in the second pass"
    if adapter.kind is AdapterKind.adalora:
        return "adapter=adalora has a penalty of its own, beside what the rows say"
    return None


def _of_model(model: Any, ranks: int, longest: int) -> str | None:
    """Why a model, built on the meta device, can't have it; `longest` row in tokens."""
    config = model.config.get_text_config()
    family = f"the model ({model.config.model_type})"
    heads = int(config.num_attention_heads)
    keys = int(getattr(config, "num_key_value_heads", None) or heads)
    if heads % ranks:
        return f"{family} has {heads} attention heads, which {ranks} ranks don't divide"
    if keys % ranks and ranks % keys:
        return f"{family} has {keys} heads of keys and values, which {ranks} ranks don't divide"
    special = _special_attention(config, longest)
    if special is not None:
        return f"{family} has {special}"
    if config._attn_implementation != "sdpa" or not model._supports_attention_backend:
        return f"{family} doesn't ask transformers for its attention (sdpa)"
    return None


def _special_attention(config: Any, longest: int) -> str | None:
    """What keeps a token from being read with all those before it, by any rank."""
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True) or (window and window >= longest):
        window = None
    fine = {"full_attention"} if window else {"full_attention", "sliding_attention"}
    others = sorted({*(getattr(config, "layer_types", None) or ())} - fine)
    if others:
        return f"layers of {', '.join(others)}"
    if window and not getattr(config, "layer_types", None):
        return f"a sliding window of {window} tokens, less than stage.max_length={longest}"
    if getattr(config, "attention_chunk_size", None):
        return "attention by chunks"
    if getattr(config, "kv_lora_rank", None):
        return "latent attention, whose keys and values differ in size"
    kinds = _rope_types(config) & _BY_LENGTH
    if kinds:
        return f"positions that turn by the longest row (rope_type={min(kinds)})"
    return None


def _rope_types(config: Any) -> set[Any]:
    """How positions are turned, in any kind of layer."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    entries = [rope, *(entry for entry in rope.values() if isinstance(entry, dict))]
    return {entry.get(name) for entry in entries for name in ("rope_type", "type")}
