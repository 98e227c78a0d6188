"""Responses to prompts with pictures, by both backends, against transformers' own forward."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import rollout
from conf.choices import Dtype, RolloutBackend
from conf.schema import Config, DataConfig, ModelConfig, RolloutConfig
from conf.stages import OnlineStage
from policy.saving import full_weights
from rlhf.models.encoding import prompt_ids
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.models.pictures import picture_inputs, pictures_of, processor_of
from rlhf.online.sync import check_held
from rlhf.types import Message, Prompt, Rollout, UserError
from rollout.sampling import check_read
from tests import vision

# families that vLLM reads without torchvision
CASES = [("hf", family) for family in vision.FAMILIES]
VLLM = [pytest.param(("vllm", "idefics3"), marks=pytest.mark.vllm)]


def config(backend: str, path: Path) -> Config:
    settings = RolloutConfig(
        backend=RolloutBackend(backend), max_response_length=8, kv_cache_gib=0.05, max_num_seqs=16
    )
    return Config(
        stage=OnlineStage(),
        model=ModelConfig(path=str(path), dtype=Dtype.float32),
        rollout=settings,
        data=DataConfig(max_prompt_length=240),
    )


def prompt_of(tokenizer: Any, name: str, *chat: Message) -> Prompt:
    ids = prompt_ids(tokenizer, list(chat))
    return Prompt(name, "", tuple(ids), list(chat), images=tuple(pictures_of(chat)))


@pytest.fixture(scope="module", params=[*CASES, *VLLM])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A generator, the model that it started from, its tokenizer and prompts of several lengths."""
    backend, family = request.param
    folder = tmp_path_factory.mktemp(family)
    cfg = config(backend, vision.tiny_vision(family, folder / "model"))
    tokenizer = load_tokenizer(cfg.model)

    def load() -> Any:
        return load_causal_lm(cfg.model, tokenizer)

    one, two = vision.pictures(folder, [(40, 40), (64, 32)])
    prompts = [
        prompt_of(tokenizer, "one", vision.asked("MARK what is it?", one)),
        prompt_of(tokenizer, "two", vision.asked("is MARK larger than this: MARK?", two, one)),
        prompt_of(tokenizer, "none", vision.asked("what colour is the sky?")),
    ]
    generator = rollout.make_generator(
        cfg, model_path=cfg.model.path, tokenizer=tokenizer, model_factory=load
    )
    yield generator, load().eval(), tokenizer, prompts
    generator.close()


def plain(model: Any, tokenizer: Any, written: Rollout) -> list[float]:
    """The response's logprobs by the model's own forward on this row alone."""
    prompt = written.prompt
    ids = torch.tensor([[*prompt.token_ids, *written.token_ids]])
    inputs = picture_inputs(processor_of(tokenizer), [prompt.images], ids)
    with torch.no_grad():
        logprobs = model(input_ids=ids, **inputs).logits[0, :-1].float().log_softmax(-1)
    chosen = logprobs.gather(1, ids[0, 1:, None]).squeeze(1)
    return chosen[len(prompt.token_ids) - 1 :].tolist()


def gap(model: Any, tokenizer: Any, rollouts: Sequence[Rollout]) -> float:
    gaps = []
    for written in rollouts:
        if set(processor_of(tokenizer).feature_ids) & set(written.token_ids):
            continue  # a random model wrote the token of a picture: transformers looks for one
        expected = plain(model, tokenizer, written)
        for ours, theirs in zip(written.rollout_logprobs, expected, strict=True):
            gaps.append(abs(ours - theirs))
    return max(gaps)


def test_responses_have_the_logprobs_of_a_plain_forward(case: Any) -> None:
    generator, model, tokenizer, prompts = case
    rollouts = generator.generate(prompts, n=3, seed=1)
    assert [written.prompt.id for written in rollouts[::3]] == ["one", "two", "none"]
    assert gap(model, tokenizer, rollouts) < 1e-4


def test_another_picture_gives_other_logprobs(case: Any) -> None:
    generator, _, _, prompts = case
    shown = prompts[0].images[0]
    darker = vision.drawn(Path(shown["path"]).with_name("dark.png"), 40, 40, (0, 0, 0))
    other = dataclasses.replace(prompts[0], images=(darker,))
    written = [
        generator.generate([prompt], seed=2, greedy=True)[0] for prompt in (prompts[0], other)
    ]
    assert written[0].rollout_logprobs != written[1].rollout_logprobs


def test_a_sync_brings_the_weights_of_both_parts(case: Any) -> None:
    generator, model, tokenizer, prompts = case
    before = generator.generate(prompts, n=2, seed=3)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1.1)
    generator.sync(full_weights(model), 1)
    check_held(generator, 1)
    after = generator.generate(prompts, n=2, seed=3)
    assert gap(model, tokenizer, after) < 1e-4
    assert gap(model, tokenizer, before) > 1e-3


def test_a_sync_leaves_out_what_does_not_train(case: Any) -> None:
    """After the test before it: the model has other weights than at the start."""
    generator, model, tokenizer, prompts = case
    generator.sync(full_weights(model), 2)
    frozen = []
    for name, param in model.named_parameters():
        if "vision" in name or "visual" in name:
            param.requires_grad_(False)
            frozen.append(name)
        else:
            param.data.mul_(1.05)
    weights = full_weights(model)
    assert weights.kept == set(frozen) and frozen
    generator.sync(weights, 3)
    check_held(generator, 3)
    assert not set(frozen) & set(generator.sent)
    assert gap(model, tokenizer, generator.generate(prompts, n=2, seed=4)) < 1e-4


def test_a_prompt_without_its_pictures_is_refused(case: Any) -> None:
    generator, _, _, prompts = case
    bare = dataclasses.replace(prompts[0], images=())
    with pytest.raises(UserError, match=r"prompt one: it shows pictures"):
        generator.generate([bare])


def test_tokens_that_vllm_reads_otherwise_are_an_error() -> None:
    picture = {"path": "/a.png", "sha256": "0", "width": 8, "height": 8}
    prompt = Prompt("p", "", (1, 5, 5, 2), images=(picture,))
    check_read(prompt, [1, 5, 5, 2], "idefics3")
    with pytest.raises(UserError, match=r"prompt p.*vLLM reads 3 tokens and the policy 4"):
        check_read(prompt, [1, 5, 2], "idefics3")
