"""Tiny random models of families that transformers and vLLM both have."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GROUPED = {"num_key_value_heads": 2}
# as DeepSeek's models have it
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.707,
}
# Multi-head latent attention in the one size of latent that vLLM's CPU kernel is compiled for.
LATENT = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    # a dense layer, then one of experts
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "head_dim": 32}
WINDOW = {"head_dim": 32, "sliding_window": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 32},
    "mistral": GROUPED | WINDOW,
    "gemma2": GROUPED | WINDOW,
    "gemma3_text": GROUPED | WINDOW,
    "phi3": GROUPED,
    # transformers has no classifier of it
    "granite": GROUPED,
    # vLLM runs these through its Transformers backend
    "smollm3": GROUPED,
    "olmo": GROUPED,
    "gpt_neox": {},
    # mixtures of experts
    "qwen3_moe": GROUPED | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32},
    "mixtral": GROUPED | EXPERTS | {"num_local_experts": 4},
    "olmoe": GROUPED | {"num_experts": 4, "num_experts_per_tok": 2},
    # as V2-Lite, whose positions are not stretched here
    "deepseek_v2": GROUPED
    | LATENT
    | {
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
    },
    "deepseek_v3": GROUPED
    | LATENT
    | {
        "rope_parameters": _YARN,
        "n_group": 2,
        "topk_group": 1,
        "num_mtp_layers": 0,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    },
    "gpt_oss": GROUPED | EXPERTS | {"num_local_experts": 4, "sliding_window": 16},
}


def tiny_family(family: str, tokenizer_path: Path, folder: Path, **changed: Any) -> Path:
    """A directory with a float32 model of the family and the tokenizer of `tokenizer_path`.
    `changed`: other values of its configuration.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    config = AutoConfig.for_model(
        family,
        vocab_size=300,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SIZES | FAMILIES[family] | changed,
    )
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for param in model.parameters():
        if param.ndim >= 2:
            param.data.mul_(4.0)  # the initial 0.02 would leave every distribution flat
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
