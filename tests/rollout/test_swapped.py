"""Several adapters of one base, swapped in one vLLM engine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.choices import AdapterKind, Carrier
from conf.schema import AdapterConfig
from policy import adapters
from policy.model import no_gather
from policy.saving import adapter_weights
from rlhf.types import AdapterWeights
from tests.rollout.test_rollout import config, make

pytestmark = [pytest.mark.vllm, pytest.mark.full]
IDS = (torch.arange(20, 50) * 7 % 250).tolist()


def adapted(base: Path, seed: int, **options: Any) -> Any:
    """A model with an adapter that has trained, as it were."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapter = AdapterConfig(kind=AdapterKind.lora, **options)
    model = adapters.attach(model, adapter, task="CAUSAL_LM").eval()
    torch.manual_seed(seed)
    for param in model.parameters():
        if param.requires_grad:
            param.data.add_(0.05 * torch.randn_like(param))
    return model


@torch.no_grad()
def logprobs(model: Any) -> torch.Tensor:
    ids = torch.tensor([IDS])
    log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    picked: torch.Tensor = log_p.gather(1, ids[0, 1:, None]).squeeze(1)
    return picked


def test_adapters_swapped_in_one_engine_each_equal_transformers(
    tiny_model: Callable[..., Path],
) -> None:
    base = tiny_model()
    models = {
        "first": adapted(base, 1, rank=4, alpha=8.0),
        "second": adapted(base, 2, rank=2, alpha=6.0, targets=["q_proj", "v_proj"]),
        "third": adapted(base, 3, rank=4, rank_pattern={"down_proj": 8}, rslora=True),
    }
    expected = {name: logprobs(model) for name, model in models.items()}
    assert (expected["first"] - expected["second"]).abs().max() > 0.1
    generator: Any = make(config("vllm"), base, carrier=Carrier.lora, adapter_rank=8)
    try:
        for version, (name, model) in enumerate(models.items(), start=1):
            weights = adapter_weights(model, no_gather)
            generator.sync(AdapterWeights(weights.tensors, weights.config, name), version)
            found = torch.tensor(generator.logprobs(IDS))
            torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-4)
        for name in ("first", "third", "second", "first"):
            generator.choose(name)
            found = torch.tensor(generator.logprobs(IDS))
            torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-4)
    finally:
        generator.close()
