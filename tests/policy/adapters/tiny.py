"""The model of the tests of the low-rank family: two layers of a Llama, the same in every call."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

IDS = torch.arange(40, 100)[None]  # [1, 60]
_PARTS = (
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)
LINEARS = [f"model.layers.{layer}.{part}" for layer in range(2) for part in _PARTS]


def small(*, tied: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for param in model.parameters():
        if param.ndim == 2:
            param.data.mul_(4.0)  # the initial 0.02 would leave every distribution flat
    return model.to(dtype).eval()
