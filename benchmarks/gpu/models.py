"""Models built from a configuration with random weights: nothing is downloaded.

python -m benchmarks.gpu.models DIRECTORY SIZE
"""

import sys
from pathlib import Path
from typing import Any

import torch

from rlhf.models.loading import train_tokenizer

# Shapes of SmolLM2-135M, Qwen2.5-0.5B and Qwen2.5-1.5B, as Llamas; and one for tests on a CPU.
SIZES: dict[str, dict[str, int]] = {
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 400,
    },
}
_POSITIONS = 4096
_ENTRIES = 300  # of the tokenizer: the other rows of the embedding are padding, as in large models
_SHARPER = 4.0  # times the initial embedding, which would leave every distribution flat
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")


def texts(count: int, words: int) -> list[str]:
    """Texts of so many words, each another."""
    out = []
    for number in range(count):
        picked = [WORDS[(number * 7 + place * (number + 3)) % len(WORDS)] for place in range(words)]
        out.append(f"{number} {' '.join(picked)}")
    return out


def config_of(size: str, tokenizer: Any) -> Any:
    """The configuration of a size."""
    from transformers import LlamaConfig

    return LlamaConfig(
        **SIZES[size],
        max_position_embeddings=_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build(folder: Path, size: str) -> None:
    """Write model and tokenizer into `folder`: bfloat16 on a CUDA device, else float32."""
    from transformers import AutoModelForCausalLM

    cuda = torch.cuda.is_available()
    tokenizer = train_tokenizer(texts(64, 16), _ENTRIES, _POSITIONS)
    torch.manual_seed(0)
    with torch.device("cuda" if cuda else "cpu"):
        model = AutoModelForCausalLM.from_config(
            config_of(size, tokenizer), dtype=torch.bfloat16 if cuda else torch.float32
        )
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(_SHARPER)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]), sys.argv[2])
