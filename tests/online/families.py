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
EXPERTS = {"num_experts_per_tok": 2, "head_dim": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    # vLLM runs these through its Transformers backend
    "smollm3": GROUPED,
    "olmo": GROUPED,
    "gpt_neox": {},
    # mixtures of experts
    "qwen3_moe": GROUPED | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32},
    "mixtral": GROUPED | EXPERTS | {"num_local_experts": 4},
    "olmoe": GROUPED | {"num_experts": 4, "num_experts_per_tok": 2},
}


def tiny_family(family: str, tokenizer_path: Path, folder: Path) -> Path:
    """A directory with a float32 model of the family and the tokenizer of `tokenizer_path`."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    config = AutoConfig.for_model(
        family,
        vocab_size=300,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SIZES,
        **FAMILIES[family],
    )
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for param in model.parameters():
        if param.ndim >= 2:
            param.data.mul_(4.0)  # the initial 0.02 would leave every distribution flat
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
