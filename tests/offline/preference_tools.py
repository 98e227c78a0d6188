"""What the tests of the preference stages and of their trainers share."""

import dataclasses
import functools
from typing import Any

import torch

from conf.choices import AdapterKind
from conf.schema import AdapterConfig
from rlhf.cli import config as composing

COMMON: dict[str, Any] = {
    "steps": 8,
    "batch_size": 8,
    "eval_steps": 4,
    "max_length": 40,
    "learning_rate": 5e-3,
    "warmup_ratio": 0.0,
}


LORA = AdapterConfig(kind=AdapterKind.lora, rank=4)


@functools.cache
def preset_of(name: str) -> Any:
    return composing.compose([f"stage={name}", "model=tiny"]).stage


def stage_of(preset: str, **changes: Any) -> Any:
    """A preset's stage as it composes, made small."""
    return dataclasses.replace(preset_of(preset), **(COMMON | changes))


def answer_logprob(model: Any, context: list[int], answer: list[int]) -> float:
    """Sum over the answer's tokens, float64 nats; a first token without a context has none."""
    ids = torch.tensor([context + answer])
    with torch.no_grad():
        logprobs = (
            model(input_ids=ids)
            .logits[0, :-1]
            .double()
            .log_softmax(-1)
            .gather(1, ids[0, 1:, None])[:, 0]
        )
    return float(logprobs[max(len(context) - 1, 0) :].sum())
