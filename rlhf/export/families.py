"""The model families whose weights can be written as GGUF: llama.cpp's names, and the numbers of
the file's header. All else is refused by name before weights load.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.types import UserError

# What llama.cpp computes in place of the frequencies of a model's rotary embedding.
ROPE_FACTORS = "rope_freqs.weight"
_ROPES = ("default", "llama3")


@dataclass(frozen=True, slots=True)
class Family:
    """How llama.cpp knows a family."""

    name: str  # of the architecture
    # llama.cpp turns neighbouring pairs of numbers where transformers turns halves: the rows of the
    # query and key matrices are in another order
    turns_pairs: bool = False
    biases: bool = False  # whether its layers for queries, keys and values have biases


FAMILIES = {
    "LlamaForCausalLM": Family("llama", turns_pairs=True),
    "MistralForCausalLM": Family("llama", turns_pairs=True),
    "Qwen2ForCausalLM": Family("qwen2", biases=True),
    "Qwen3ForCausalLM": Family("qwen3"),
}


def family_of(config: Any, name: str) -> Family:
    """The family of a model with this configuration; `name`: of its class. Raises UserError where
    it, or a trait of the model, has no place in a GGUF file as it is written here.
    """
    family = FAMILIES.get(name)
    if family is None:
        raise UserError(
            f"stage.gguf: models of the family {name} can't be written as GGUF here. Known: "
            f"{', '.join(FAMILIES)}. Leave stage.gguf out for safetensors."
        )
    for what, value in _unwritten(config, family):
        raise UserError(
            f"stage.gguf: {what}={value!r} in the model's config.json has no place in a GGUF file "
            f"of the architecture {family.name}. Leave stage.gguf out for safetensors."
        )
    return family


def _unwritten(config: Any, family: Family) -> Iterator[tuple[str, Any]]:
    """Traits of the model that the file would lose."""
    rope = rope_of(config)
    if rope["rope_type"] not in _ROPES:
        yield "rope_type", rope["rope_type"]
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield "partial_rotary_factor", rope["partial_rotary_factor"]
    if config.hidden_act not in ("silu", "swish"):
        yield "hidden_act", config.hidden_act
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            yield name, True
    windows = getattr(config, "use_sliding_window", True)
    if windows and getattr(config, "sliding_window", None) is not None:
        yield "sliding_window", config.sliding_window
    if head_width(config) % 2:
        yield "head_dim", head_width(config)


def unread(config: Any, family: Family) -> list[str]:
    """Names of what transformers does not read of a file, and takes from config.json alone."""
    names = []
    if rope_of(config)["rope_type"] != "default":
        names.append("rope_type")
    plain = {"qwen2": config.hidden_size // config.num_attention_heads, "qwen3": 128}
    if head_width(config) != plain.get(family.name, head_width(config)):
        names.append("head_dim")
    return names


def rope_of(config: Any) -> dict[str, Any]:
    """The rotary embedding's parameters; ``rope_type`` and ``rope_theta`` are always there."""
    given = dict(getattr(config, "rope_parameters", None) or {})
    return {"rope_type": "default", "rope_theta": 10000.0} | given


def head_width(config: Any) -> int:
    """Numbers of one attention head."""
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


# ---- tensors ----


def tensors_of(model: Any, family: Family) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file by llama.cpp's name, as the file holds it, on the CPU in the model's
    number format. Raises UserError for one that has no name there.
    """
    config = model.config
    name_of = _names(family, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embedding where it is left out
        value = tensor.detach().cpu()
        if family.turns_pairs and name.endswith(("q_proj.weight", "k_proj.weight")):
            value = _in_pairs(value, head_width(config))
        yield name_of(name), value
    if rope_of(config)["rope_type"] != "default":
        yield ROPE_FACTORS, _rope_factors(model)


def _names(family: Family, layers: int) -> Callable[[str], str]:
    """From transformers' names to llama.cpp's."""
    import gguf

    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.name)
    known = gguf.get_tensor_name_map(kind, layers)

    def name_of(name: str) -> str:
        found = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None or (name.endswith(".bias") and not family.biases):
            raise UserError(
                f"stage.gguf: the tensor {name} has no name in a GGUF file of the architecture "
                f"{family.name}. Leave stage.gguf out for safetensors."
            )
        return str(found)

    return name_of


def _in_pairs(weight: Tensor, width: int) -> Tensor:
    """Rows of a query or key matrix [heads * width, hidden], each head's two halves interleaved."""
    heads = weight.shape[0] // width
    halves = weight.reshape(heads, 2, width // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def _rope_factors(model: Any) -> Tensor:
    """What the plain frequencies are divided by [head width / 2], float32."""
    width = head_width(model.config)
    theta = float(rope_of(model.config)["rope_theta"])
    powers = torch.arange(0, width, 2, dtype=torch.float64) / width
    own = model.model.rotary_emb.inv_freq.detach().cpu().double()
    return (theta**-powers / own).float()


# ---- the header ----


def header(writer: Any, config: Any, rows: int) -> None:
    """Write the numbers that llama.cpp builds the model from. `rows`: of the embedding."""
    width = head_width(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope_of(config)["rope_theta"]))
    writer.add_vocab_size(rows)
