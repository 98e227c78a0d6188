"""Rows with pictures: what the policy and a critic say of them, however they are cut."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.choices import Dtype
from conf.schema import ModelConfig
from policy.batching import Batch, Pictures, collate
from policy.forward import Layout, plan_passes, policy_logprobs, run_policy
from policy.model import PolicyModule
from rlhf.models.encoding import prompt_ids
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.models.pictures import picture_inputs, processor_of
from rlhf.types import Picture
from tests import vision

SIZES = ((40, 40), (64, 32), (64, 32))  # the last two can stand in each other's place
ANSWERS = ([20, 21, 22, 23, 24], [30, 31], [40, 41, 42], [50, 51, 52, 53])


def rows_of(
    tokenizer: Any, shown: Sequence[Picture]
) -> list[tuple[list[int], tuple[Picture, ...]]]:
    """Prompts with one, two and no pictures, of several lengths, and what they show."""
    one, two, three = shown
    asked = (
        [vision.asked("MARK what is it?", one)],
        [vision.asked("MARK or MARK: which one is red?", two, three)],
        [vision.asked("what colour is the sky?")],
        [vision.asked("a longer question, behind it MARK", three)],
    )
    pictures = ((one,), (two, three), (), (three,))
    return [(prompt_ids(tokenizer, chat), own) for chat, own in zip(asked, pictures, strict=True)]


@pytest.fixture(scope="module", params=list(vision.FAMILIES))
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family's model, its tokenizer, and a batch of four rows."""
    folder = tmp_path_factory.mktemp(request.param)
    path = vision.tiny_vision(request.param, folder / "model")
    cfg = ModelConfig(path=str(path), dtype=Dtype.float32)
    tokenizer = load_tokenizer(cfg)
    model = load_causal_lm(cfg, tokenizer).eval()
    rows = rows_of(tokenizer, vision.pictures(folder, SIZES))
    batch = collate([ids for ids, _ in rows], ANSWERS, tokenizer.pad_token_id)
    opened = partial(picture_inputs, processor_of(tokenizer))
    batch = replace(batch, pictures=Pictures(tuple(own for _, own in rows), opened))
    return model, tokenizer, batch, rows


def plain(model: Any, tokenizer: Any, ids: list[int], own: tuple[Picture, ...]) -> Tensor:
    """Logprobs of a row's tokens after the first by transformers' own forward, alone."""
    whole = torch.tensor([ids])
    inputs = picture_inputs(processor_of(tokenizer), [own], whole)
    with torch.no_grad():
        logits = model(input_ids=whole, attention_mask=torch.ones_like(whole), **inputs).logits
    logprobs = logits[0, :-1].float().log_softmax(dim=-1)
    return logprobs.gather(1, whole[0, 1:, None]).squeeze(1)


def measured(model: Any, batch: Batch, budget: int) -> Tensor:
    module = PolicyModule(model, chunk=7)
    groups = torch.arange(len(ANSWERS))
    return policy_logprobs(module, batch, groups, range(len(ANSWERS)), Layout(budget))[0]


@pytest.mark.parametrize("budget", [1, 4096])
def test_the_policy_says_what_the_model_says_of_each_row_alone(toy: Any, budget: int) -> None:
    model, tokenizer, batch, rows = toy
    logprobs = measured(model, batch, budget)
    for row, ((ids, own), answer) in enumerate(zip(rows, ANSWERS, strict=True)):
        expected = plain(model, tokenizer, [*ids, *answer], own)[-len(answer) :]
        found = logprobs[row, : len(answer)]
        assert torch.allclose(found, expected, atol=1e-5), (found - expected).abs().max()


def test_the_policy_looks_at_the_pictures(toy: Any) -> None:
    model, _, batch, _ = toy
    first, second, third, fourth = batch.pictures.rows
    turned = (first, second[::-1], third, fourth)
    other = replace(batch, pictures=replace(batch.pictures, rows=turned))
    before, after = measured(model, batch, 4096), measured(model, other, 4096)
    assert float((before - after)[1].abs().max()) > 1e-3
    assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]])


def gradient(model: Any, batch: Batch, budget: int) -> dict[str, Tensor]:
    """Of the sum of all logprobs, by parameter."""
    module = PolicyModule(model, chunk=7)
    model.zero_grad(set_to_none=True)
    layout, groups = Layout(budget), torch.arange(len(ANSWERS))
    for packs in plan_passes(batch, groups, range(len(ANSWERS)), layout):
        done = run_policy(module, batch, packs, layout)
        done.logprobs.sum().backward()
    return {
        name: param.grad.clone()
        for name, param in model.named_parameters()
        if param.grad is not None
    }


def test_the_split_in_micro_batches_changes_no_gradient(toy: Any) -> None:
    model, _, batch, _ = toy
    whole, single = gradient(model, batch, 4096), gradient(model, batch, 1)
    assert whole.keys() == single.keys()
    assert any("vision" in name or "visual" in name for name in whole)
    for name, found in single.items():
        scale = whole[name].abs().max().clamp(min=1e-3)
        assert float((found - whole[name]).abs().max() / scale) < 1e-3, name


def test_select_keeps_each_rows_pictures(toy: Any) -> None:
    _, _, batch, _ = toy
    chosen = batch.select([3, 1])
    assert chosen.pictures.rows == (batch.pictures.rows[3], batch.pictures.rows[1])
    assert batch.to("cpu").pictures is batch.pictures


def test_pixels_are_made_for_the_rows_of_a_pass_alone(toy: Any) -> None:
    _, _, batch, _ = toy
    asked: list[int] = []

    def opened(rows: Sequence[Sequence[Picture]], ids: Tensor) -> dict[str, Tensor]:
        asked.append(len(rows))
        return batch.pictures.inputs(rows, ids)

    watched = replace(batch, pictures=Pictures(batch.pictures.rows, opened))
    measured(toy[0], watched, 1)
    assert asked == [1] * len(ANSWERS)


def test_a_batch_of_text_gets_no_pictures() -> None:
    batch = collate([[5, 6]], [[7]], 0)
    assert batch.seen() == {}
