"""Prompts of several lengths behind virtual tokens, by transformers: where a family reads padding
in front otherwise, they are continued by length, and each as by itself.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.families.build import tiny
from conf.choices import AdapterKind
from conf.methods import PromptConfig
from conf.schema import AdapterConfig, ModelConfig
from policy import adapters
from rlhf.models.loading import load_tokenizer
from rlhf.types import Prompt, Rollout
from rollout.hf import HFGenerator
from rollout.sampling import Sampling

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = (9, 4, 9, 2, 6)
PROMPT, PREFIX = AdapterKind.prompt, AdapterKind.prefix


def prompts() -> list[Prompt]:
    made = []
    for number, length in enumerate(LENGTHS):
        ids = tuple(range(20 + 11 * number, 20 + 11 * number + length))
        made.append(Prompt(str(number), "", ids))
    return made


def make(family: str, kind: AdapterKind, tokenizer: Any) -> HFGenerator:
    def factory() -> Any:
        torch.manual_seed(1)
        model = tiny(family).eval()
        for param in model.parameters():
            if param.ndim >= 2:
                param.data.mul_(4.0)
        adapter = AdapterConfig(kind=kind, prompt=PromptConfig(tokens=5))
        return adapters.attach(model, adapter, task="CAUSAL_LM", sample=lambda: [[30, 31, 32]])

    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_response_length=5)
    device = torch.device("cpu")
    return HFGenerator(factory, tokenizer, sampling, max_tokens=20, max_num_seqs=4, device=device)


def gap(together: list[Rollout], alone: list[Rollout]) -> float:
    """The largest distance of first logprobs in nats."""
    pairs = zip(together, alone, strict=True)
    return max(abs(one.rollout_logprobs[0] - other.rollout_logprobs[0]) for one, other in pairs)


@pytest.mark.parametrize(
    ("family", "kind", "pads"),
    [
        ("llama", PROMPT, True),
        ("bloom", PREFIX, True),
        ("mpt", PROMPT, False),
        ("mpt", PREFIX, False),
        ("jamba", PROMPT, False),
        ("qwen3_next", PROMPT, False),
    ],
)
def test_each_is_continued_as_by_itself(
    family: str,
    kind: AdapterKind,
    pads: bool,
    tiny_model: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    generator = make(family, kind, load_tokenizer(ModelConfig(path=str(tiny_model()))))
    assert generator._pads is pads
    assert ("prompts of one length" in caplog.text) is not pads
    together = generator.generate(prompts(), greedy=True, seed=0)
    alone = []
    for prompt in prompts():
        alone += generator.generate([prompt], greedy=True, seed=0)
    assert [one.prompt.id for one in together] == ["0", "1", "2", "3", "4"]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert gap(together, alone) < 1e-4
    generator._pads = True
    padded = gap(generator.generate(prompts(), greedy=True, seed=0), alone)
    assert (padded < 1e-4) is pads, "as it would be in one batch"
