"""A tiny random model of any causal family of transformers: its configuration's defaults, with
small sizes under the names that configurations use.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

VOCAB = 160
# Sizes by the names that configurations give them. What is not here keeps its default.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "dim": 64,
    "emb_dim": 64,
    "embedding_size": 64,
    "model_dim": 64,
    "word_embed_proj_dim": 64,
    "hidden_dim": 64,
    "first_k_dense_replace": 1,  # of two layers, so that one has experts
    "intermediate_size": 96,
    "ffn_hidden_size": 96,
    "ffn_dim": 96,
    "feed_forward_size": 96,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "n_inner": 96,
    "d_ff": 96,
    "d_inner": 96,
    "dff": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "expert_intermediate_size": 32,
    "intermediate_size_mlp": 96,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "kv_n_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "attention_head_dim": 16,
    "d_kv": 16,
    "rotary_dim": 8,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "n_ctx": 512,
    "max_seq_len": 512,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "qk_head_dim": 32,
    "hidden_size_per_layer_input": 16,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "time_step_rank": 4,
    "lru_width": 64,
    "attention_hidden_size": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "logits_scaling": 4.0,
    "logit_scale": 0.25,
    "lm_head_multiplier": 0.5,
    "final_logit_softcapping": 5.0,
    "logits_soft_cap": 5.0,
    "output_logit_soft_cap": 5.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Other sizes for vLLM: heads of 32 at least, and latent attention in the one size that it has for
# CPUs.
FOR_VLLM: dict[str, Any] = {
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "attention_head_dim", "v_head_dim"), 32),
    "kv_n_heads": 2,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "qk_head_dim": 96,
    "rotary_dim": 16,
}
# What a family needs beside small sizes.
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_HYBRID = {
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "hybrid"] * 2,
    "attention_head_dim": 32,
    "attention_hidden_size": 128,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96},
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _LINEAR,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2, "expert_ffn_hidden_size": 32},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen4_exp_text": _LINEAR,
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": _HYBRID,
    "zamba2": _HYBRID,
    "zaya": {"num_experts_per_tok": 1},
}


def causal_families() -> list[str]:
    """Every model type for which transformers has a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny(family: str, sizes: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """A random model of `family` in float32, in evaluation mode; `sizes` instead of the usual ones.
    Raises whatever transformers raises for a configuration that it can't build.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(family, sizes), dtype=torch.float32)
    with torch.no_grad():
        for param in model.parameters():
            # the initial 0.02 would leave every distribution flat
            if param.ndim >= 2 and float(param.std()) < 0.1:
                param.mul_(4.0)
    return model.eval()


def small_config(family: str, sizes: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """The configuration of `tiny`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    return kind(**_shrunk(kind, SPECIAL.get(family, {}), {**_SIZES, **sizes}))


def _shrunk(kind: Any, special: dict[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Small values for those of a configuration's defaults that are `sizes`; its parts likewise."""
    defaults = kind()
    values = dict(special)
    for name, value in vars(defaults).items():
        if name in special:
            continue
        if hasattr(value, "to_dict"):
            values[name] = _shrunk(type(value), SPECIAL.get(value.model_type, {}), sizes)
        elif (
            name in sizes and isinstance(value, int | float | None) and not isinstance(value, bool)
        ):
            values[name] = sizes[name]
    if "kv_lora_rank" in values:  # latent attention has as many keys as queries
        values["num_key_value_heads"] = values["num_attention_heads"]
    return values
