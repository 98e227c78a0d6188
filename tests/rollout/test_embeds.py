"""vLLM with virtual tokens in front of every prompt, against a forward pass of embeddings."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import rollout
from rlhf.online.sync import check_held
from rlhf.types import AdapterWeights, FullWeights, SyncError
from tests.rollout.test_rollout import PROMPTS, config, worst

pytestmark = pytest.mark.vllm
AHEAD, WIDTH = 5, 64
NAME = "prompt_embeddings"


@pytest.fixture(scope="module")
def generator(tiny_model: Callable[..., Path]) -> Iterator[Any]:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    from rollout.embeds import EmbedsGenerator

    path = str(tiny_model())
    made = EmbedsGenerator(
        path,
        AutoTokenizer.from_pretrained(path),
        config("vllm").rollout,
        max_tokens=40,
        names=rollout._hub_names(AutoConfig.from_pretrained(path), trust_remote_code=False),
        dtype=torch.float32,
        adapter=AdapterWeights({NAME: virtual(0)}, {}),
    )
    yield made
    made.close()


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32).double()


def virtual(seed: int) -> Tensor:
    """[5, 64] float32, of the size of the model's embeddings."""
    return torch.randn(AHEAD, WIDTH, generator=torch.Generator().manual_seed(seed)) * 0.08


@torch.no_grad()
def by_hand(model: Any, values: Tensor, ids: Sequence[int]) -> list[float]:
    """log p(ids[i] | values, ids[:i]) for i >= 1, in float64."""
    rows = torch.cat((values.double(), model.get_input_embeddings()(torch.tensor(ids))))
    logits = model(inputs_embeds=rows[None]).logits[0, AHEAD:-1]
    found: list[float] = logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]].tolist()
    return found


def test_responses_and_logprobs_are_those_behind_virtual_tokens(generator: Any, model: Any) -> None:
    """Also after a second sync: no prefix of the first is left."""
    for version in (1, 2):
        values = virtual(version)
        generator.sync(AdapterWeights({NAME: values}, {}), version)
        for greedy in (True, False):
            for written in generator.generate(PROMPTS, n=2, seed=3, greedy=greedy):
                ids = [*written.prompt.token_ids, *written.token_ids]
                expected = by_hand(model, values, ids)[len(written.prompt.token_ids) - 1 :]
                assert worst(written.rollout_logprobs, expected) < 1e-5
        for length in (2, 3, 40):
            ids = [3 + 7 * place % 250 for place in range(length)]
            found = generator.logprobs(ids)
            assert len(found) == length - 1
            assert worst(found, by_hand(model, values, ids)) < 1e-5


def test_virtual_tokens_change_what_is_written(generator: Any, model: Any) -> None:
    """So that the test above could fail."""
    ids = [3 + 7 * place % 250 for place in range(20)]
    assert worst(by_hand(model, virtual(1), ids), by_hand(model, virtual(2), ids)) > 0.05


def test_a_sync_is_proved_by_the_virtual_tokens_that_requests_get(generator: Any) -> None:
    generator.sync(AdapterWeights({NAME: virtual(3)}, {}), 3)
    check_held(generator, 3)
    generator._virtual[2, 7] += 1e-3
    with pytest.raises(SyncError, match=NAME):
        check_held(generator, 3)


def test_other_tensors_are_refused_by_name(generator: Any, model: Any) -> None:
    generator.sync(AdapterWeights({NAME: virtual(4)}, {}), 4)
    with pytest.raises(SyncError, match=rf"{NAME} \(shape \[4, 64\], expected \[5, 64\]\)"):
        generator.sync(AdapterWeights({NAME: virtual(5)[1:]}, {}), 5)
    with pytest.raises(SyncError, match=r"lora_A \(the generator's model has no such parameter"):
        generator.sync(AdapterWeights({"lora_A": virtual(5)}, {}), 5)
    with pytest.raises(SyncError, match="started for virtual tokens"):
        generator.sync(FullWeights(iter(model.state_dict().items())), 5)
    assert generator.version == 4
