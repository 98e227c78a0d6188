"""Scorers: the reward model's last token, invariances, other tokenizers, reward functions, and
every way they fail.
"""

import asyncio
import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

from conf.choices import ModelKind
from conf.schema import ModelConfig, RewardConfig
from reward.model import (
    MANIFEST_FILE,
    Manifest,
    load_reward_model,
    read_manifest,
    template_hash,
    token_batches,
    tokenizer_fingerprint,
    write_manifest,
)
from reward.scorers.computed import FunctionScorer
from reward.scorers.reward_model import RewardModelScorer
from reward.terms import make_scorer
from rlhf.models.encoding import encode_answer, prompt_ids, response_ids
from rlhf.models.loading import load_classifier, train_tokenizer
from rlhf.types import Prompt, Rollout, UserError
from tests.offline.trl_tools import CHATML, TINY, tiny_tokenizer

CPU = torch.device("cpu")


def rollout(
    tokenizer: Any,
    prompt: Any,
    text: str,
    *,
    finished: bool = True,
    name: str = "p0",
    **fields: object,
) -> Rollout:
    ids = prompt_ids(tokenizer, prompt)
    made = Prompt(
        id=name, text=tokenizer.decode(ids), token_ids=tuple(ids), source=prompt, fields=fields
    )
    answer = response_ids(tokenizer, text, finished=finished)
    return Rollout(made, text, answer, [0.0] * len(answer), "stop" if finished else "length", 0)


def save_reward_model(
    directory: Path, tokenizer: Any, *, conversational: bool = False
) -> LlamaForSequenceClassification:
    torch.manual_seed(3)
    model = load_classifier(ModelConfig(kind=ModelKind.tiny, tiny=TINY), tokenizer).eval()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    hashes = {
        "tokenizer_hash": tokenizer_fingerprint(tokenizer),
        "chat_template_hash": template_hash(tokenizer),
    }
    write_manifest(
        directory,
        Manifest(
            base="tiny",
            conversational=conversational,
            max_length=64,
            dtype="float32",
            score_mean=0.1,
            score_std=2.0,
            held_out_texts=10,
            **hashes,
        ),
    )
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    directory = tmp_path_factory.mktemp("reward") / "model"
    save_reward_model(directory, tokenizer)
    return directory


def scorer(path: Path, policy_tokenizer: Any, batch_tokens: int = 8192) -> RewardModelScorer:
    return RewardModelScorer(
        str(path), RewardConfig(batch_tokens=batch_tokens), CPU, policy_tokenizer=policy_tokenizer
    )


def some_rollouts(tokenizer: Any) -> list[Rollout]:
    texts = [" good", " bad awful film plot actor the a the a", " fine great good", " poor"]
    return [
        rollout(tokenizer, "the film", text, finished=i != 2, name=f"p{i}")
        for i, text in enumerate(texts)
    ]


def test_scores_equal_the_plain_forward_and_no_batching_changes_them(
    saved: Path, tokenizer: Any
) -> None:
    rollouts = some_rollouts(tokenizer)
    model = LlamaForSequenceClassification.from_pretrained(saved).eval()
    with torch.no_grad():
        expected = [
            float(model(input_ids=torch.tensor([[*r.prompt.token_ids, *r.token_ids]])).logits)
            for r in rollouts
        ]
    for budget in (1, 25, 8192):
        found = scorer(saved, tokenizer, budget).score(rollouts)
        assert found.total == pytest.approx(expected, abs=1e-6)
        assert found.terms == {"reward_model": found.total}
    assert len({round(s, 4) for s in expected}) == len(expected), (
        "scores that are all alike would show nothing"
    )


def test_end_of_sequence_is_read_also_where_it_pads(saved: Path, tokenizer: Any) -> None:
    """A tokenizer that pads with end-of-sequence: the score still comes from the response's own
    last token.
    """
    padded = scorer(saved, tokenizer)
    padded.module.config.pad_token_id = tokenizer.eos_token_id
    rollouts = some_rollouts(tokenizer)
    assert padded.score(rollouts).total == pytest.approx(
        scorer(saved, tokenizer).score(rollouts).total, abs=1e-6
    )
    without = rollout(tokenizer, "the film", " good", finished=False)
    assert abs(padded.score(rollouts).total[0] - padded.score([without]).total[0]) > 1e-4


def test_moved_directory_loads_alone(saved: Path, tokenizer: Any, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "rm"
    shutil.copytree(saved, moved)
    model = load_reward_model(moved, torch.float32)
    assert model.manifest == read_manifest(saved) and model.manifest.score_std == 2.0
    assert model.tokenizer.eos_token_id == tokenizer.eos_token_id
    assert (
        scorer(moved, tokenizer).score(some_rollouts(tokenizer)).total
        == scorer(saved, tokenizer).score(some_rollouts(tokenizer)).total
    )


def test_what_is_not_a_reward_model(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        read_manifest(tmp_path / "missing" / "model")
    bare = tmp_path / "bare"
    shutil.copytree(saved, bare)
    (bare / MANIFEST_FILE).unlink()
    with pytest.raises(UserError, match="is not a reward model"):
        read_manifest(bare)
    (bare / MANIFEST_FILE).write_text('{"format_version": 99}')
    with pytest.raises(UserError, match="format_version is 99, expected 1"):
        read_manifest(bare)
    (bare / MANIFEST_FILE).write_text('{"format_version": 1, "base": "x"}')
    with pytest.raises(UserError, match="expected the keys"):
        read_manifest(bare)


def test_missing_head_is_noticed(saved: Path, tmp_path: Path) -> None:
    headless = tmp_path / "headless"
    shutil.copytree(saved, headless)
    weights = load_file(headless / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, headless / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"its weights lack score\.weight"):
        load_reward_model(headless, torch.float32)


@settings(deadline=None)  # a loaded machine is no failure
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 100))
def test_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = list(token_batches(lengths, budget))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget
    for batch, following in itertools.pairwise(batches):
        assert (len(batch) + 1) * lengths[following[0]] > budget, "the next row would have fitted"


def test_changed_tokenizer_is_noticed(saved: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(saved, changed)
    train_tokenizer(["other words entirely"] * 3, 280, 64).save_pretrained(changed)
    with pytest.raises(UserError, match="its tokenizer files are not those"):
        load_reward_model(changed, torch.float32)


def other_tokenizer(template: str | None) -> Any:
    other = train_tokenizer(["good great fine bad awful poor film"] * 5, 270, 64)
    other.chat_template = template
    return other


def test_other_tokenizer_without_template_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer.*chat template"):
        scorer(saved, other_tokenizer(CHATML))


def test_other_tokenizer_reads_text_in_the_reward_models_format(tmp_path: Path) -> None:
    own, policy = (
        tiny_tokenizer(CHATML),
        other_tokenizer("{% for m in messages %}[{{ m['content'] }}]{% endfor %}"),
    )
    save_reward_model(tmp_path / "model", own, conversational=True)
    messages = [{"role": "user", "content": "the film"}]
    read = scorer(tmp_path / "model", policy)
    expected = encode_answer(own, messages, [{"role": "assistant", "content": "good"}])
    assert read.token_ids(rollout(policy, messages, "good")) == expected
    assert read.token_ids(rollout(policy, "the film", "good")) == expected, (
        "a plain prompt becomes the user's turn"
    )
    assert read.token_ids(rollout(policy, messages, "good", finished=False)) == expected[:-1]


def test_same_tokenizer_with_another_template_is_read_anew(tmp_path: Path) -> None:
    own, policy = (
        tiny_tokenizer(CHATML),
        tiny_tokenizer("{% for m in messages %}[{{ m['content'] }}]{% endfor %}"),
    )
    save_reward_model(tmp_path / "model", own, conversational=True)
    messages = [{"role": "user", "content": "the film"}]
    found = scorer(tmp_path / "model", policy).token_ids(rollout(policy, messages, "good"))
    assert found == encode_answer(own, messages, [{"role": "assistant", "content": "good"}])
    assert scorer(tmp_path / "model", own).token_ids(rollout(own, messages, "good")) == found


def test_reward_model_failures_name_the_prompt(saved: Path, tokenizer: Any) -> None:
    rollouts = some_rollouts(tokenizer)
    long = rollout(tokenizer, "the film", " good" * 70, name="longest")
    with pytest.raises(UserError, match=r"'longest'.*expected 1 to 64"):
        scorer(saved, tokenizer).score([*rollouts, long])
    broken = scorer(saved, tokenizer)
    with torch.no_grad():
        broken.module.model.embed_tokens.weight[rollouts[1].token_ids[0]] = float("nan")
    with pytest.raises(UserError, match=r"'p1' \('the film'\) is nan"):
        broken.score(rollouts)


# Reward functions live in a module of their own, as a user's would.


def lengths(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    assert set(columns) == {"completion_ids", "answer"}
    return [float(len(c)) for c in completions]


async def slow_lengths(completions: list[Any]) -> list[int]:
    await asyncio.sleep(0)
    return [len(c) for c in completions]


def by_answer(completions: list[Any], answer: list[str | None]) -> torch.Tensor:
    return torch.tensor([1.0 if a == "yes" else 0.0 for a in answer])


def contents(completions: list[Any], prompts: list[Any]) -> list[int]:
    return [
        len(c[0]["content"]) + len(p[0]["content"])
        for c, p in zip(completions, prompts, strict=True)
    ]


def fails_on_bad(completions: list[Any]) -> list[float]:
    if any("bad" in c for c in completions):
        raise ZeroDivisionError("no such thing")
    return [0.0] * len(completions)


def one_too_few(completions: list[Any]) -> list[float]:
    return [0.0] * (len(completions) - 1)


def a_number(completions: list[Any]) -> float:
    return 0.0


def nothing_for_bad(completions: list[Any]) -> list[float | None]:
    return [None if "bad" in c else 0.0 for c in completions]


def infinite_for_bad(completions: list[Any]) -> list[float]:
    return [float("inf") if "bad" in c else 0.0 for c in completions]


def words_for_bad(completions: list[Any]) -> list[Any]:
    return ["0.5" if "bad" in c else 0.0 for c in completions]


def function(name: str) -> FunctionScorer:
    return FunctionScorer(f"{__name__}:{name}")


def test_functions_get_trl_arguments(tokenizer: Any) -> None:
    rollouts = [
        rollout(tokenizer, "the film", " good", answer="yes"),
        rollout(tokenizer, "the film", " bad awful", name="p1", answer="no"),
    ]
    assert function("lengths").score(rollouts).total == [5.0, 10.0]
    assert function("slow_lengths").score(rollouts).terms == {"slow_lengths": [5.0, 10.0]}
    assert function("by_answer").score(rollouts).total == [1.0, 0.0]
    assert function("lengths").score([]).total == []


def test_functions_get_messages_for_messages() -> None:
    tokenizer = tiny_tokenizer(CHATML)
    assert function("contents").score(
        [rollout(tokenizer, [{"role": "user", "content": "ab"}], "xyz")]
    ).total == [5.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails_on_bad", r"raised ZeroDivisionError: no such thing; for prompt 'p1'"),
        ("one_too_few", r"expected a list of 3 numbers.*found 2 values"),
        ("a_number", r"expected a list of 3 numbers.*found float 0.0"),
        ("nothing_for_bad", r"returned None for prompt 'p1'"),
        ("infinite_for_bad", r"returned inf for prompt 'p1'"),
        ("words_for_bad", r"returned '0.5' for prompt 'p1'"),
        ("by_answer", r"takes answer, which no row has"),
    ],
)
def test_function_failures_name_the_prompt(tokenizer: Any, name: str, message: str) -> None:
    rollouts = [
        rollout(tokenizer, "the film", text, name=f"p{i}")
        for i, text in enumerate((" good", " bad", " fine"))
    ]
    with pytest.raises(UserError, match=message):
        function(name).score(rollouts)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_colon", "expected pkg.module:function"),
        ("no.such.module:f", "importing no.such.module failed"),
        (f"{__name__}:gone", "has no function gone"),
    ],
)
def test_functions_that_are_not_there(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FunctionScorer(spec)


def test_make_scorer_takes_one_of_the_two(saved: Path, tokenizer: Any) -> None:
    spec = f"{__name__}:lengths"
    assert isinstance(
        make_scorer(RewardConfig(path=str(saved)), device=CPU, policy_tokenizer=tokenizer),
        RewardModelScorer,
    )
    assert isinstance(
        make_scorer(RewardConfig(function=spec), device=CPU, policy_tokenizer=tokenizer),
        FunctionScorer,
    )
    with pytest.raises(UserError, match="found none"):
        make_scorer(RewardConfig(), device=CPU, policy_tokenizer=tokenizer)
    with pytest.raises(UserError, match="found 2"):
        make_scorer(
            RewardConfig(path=str(saved), function=spec), device=CPU, policy_tokenizer=tokenizer
        )
