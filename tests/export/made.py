"""Tiny models of the families that can be written as GGUF, with a tokenizer that has a template."""

from pathlib import Path
from typing import Any

import torch

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|system|>\nBe kind.<|end|>\n' }}{% endif %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def language_model(kind: str, tokenizer: Any, **config: Any) -> Any:
    """A random float32 model whose next tokens differ clearly in likelihood."""
    from transformers import AutoConfig, AutoModelForCausalLM

    special = {
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    sizes = {"vocab_size": len(tokenizer), **_SIZES, **special, **config}
    torch.manual_seed(3)
    made = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **sizes), dtype=torch.float32
    )
    for param in made.parameters():
        if param.ndim == 2:
            param.data.mul_(4.0)  # the initial 0.02 would leave every distribution flat
        else:
            param.data.add_(0.1 * torch.randn_like(param))  # norms and biases that do something
    return made


def plain_spoken(model: Any, tokenizer: Any) -> Any:
    """`model`, untied, that never prefers a token which is no printable text: pieces of characters
    are shown otherwise by different programs.
    """
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        if not (text.isascii() and text.isprintable()):
            model.lm_head.weight.data[token] = 0
    return model


def saved(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
