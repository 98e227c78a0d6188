"""What the tests of RaSA and LoRA-Mini share: tiny models with adapters whose update is not 0."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from conf.choices import AdapterKind
from conf.methods import LoraMiniConfig, RasaConfig
from conf.schema import AdapterConfig
from policy.adapters import attach

RASA = AdapterConfig(kind=AdapterKind.rasa, rank=4, alpha=8.0, rasa=RasaConfig(shared=1))
MINI = AdapterConfig(
    kind=AdapterKind.lora_mini, rank=4, alpha=8.0, lora_mini=LoraMiniConfig(inner=8)
)
BOTH = [RASA, MINI]
IDS = torch.arange(24).reshape(2, 12)
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_labels": 1,
}


def base(task: str = "CAUSAL_LM", dtype: torch.dtype = torch.float32) -> Any:
    """A Llama of three layers, always the same."""
    torch.manual_seed(0)
    made = LlamaForCausalLM if task == "CAUSAL_LM" else LlamaForSequenceClassification
    return made(LlamaConfig(**SHAPE)).to(dtype).eval()


def fresh(adapter: AdapterConfig, task: str = "CAUSAL_LM", dtype: Any = torch.float32) -> Any:
    rows = IDS.tolist() * 8
    return attach(base(task, dtype), adapter, task=task, sample=lambda: rows).eval()


def moved(adapter: AdapterConfig, task: str = "CAUSAL_LM", dtype: Any = torch.float32) -> Any:
    """An adapted model whose trained tensors are all away from their starts."""
    model = fresh(adapter, task, dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(torch.randn_like(param), alpha=0.1)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def gap(one: Any, other: Any) -> float:
    """Largest difference of two models' logits."""
    return float((logits(one) - logits(other)).abs().max())
