"""Prompts with pictures through the loop: what samples is what trains, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText

from conf.schema import Config
from rlhf.cli import config
from rlhf.models.encoding import prompt_ids
from rlhf.models.loading import load_tokenizer
from rlhf.models.pictures import pictures_of
from rlhf.run.context import RunContext
from rlhf.stages import online as online_stage
from rlhf.types import EncodedPrompts, EncodedRows, Prompt, UserError
from tests import vision

OFTEN = ("idefics3", "qwen2_vl")
CASES = [
    *((family, "hf") for family in OFTEN),
    *(pytest.param(f, "hf", marks=pytest.mark.full) for f in vision.FAMILIES if f not in OFTEN),
    pytest.param("idefics3", "vllm", marks=pytest.mark.vllm),
]
SEEN: list[list[Any]] = []  # what the reward function was given


def short_words(completions: list[Any], images: list[Any], **_: Any) -> list[float]:
    """Something that differs from answer to answer."""
    SEEN.append(images)
    return [float(len(completion[-1]["content"]) % 7) for completion in completions]


class Reader:
    """The rows of a stage, made here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read_prompts(self, cfg: Config) -> EncodedPrompts:
        tokenizer = load_tokenizer(cfg.model)
        shown = vision.pictures(self.folder, [(40, 40), (64, 32), (28, 50), (40, 40)])
        prompts = []
        for number, picture in enumerate(shown):
            chat = [vision.asked("MARK what is it?" if number % 2 else "tell: MARK", picture)]
            if number == 3:
                chat = [vision.asked("is MARK like MARK?", picture, shown[0])]
            ids, images = prompt_ids(tokenizer, chat), pictures_of(chat)
            prompts.append(Prompt(str(number), "", tuple(ids), chat, images=tuple(images)))
        return EncodedPrompts(tokenizer, prompts, [], ())

    def read_rows(self, cfg: Config, micro: int) -> EncodedRows:
        raise NotImplementedError


def options(model: Path, folder: Path, *overrides: str) -> list[str]:
    return [
        "stage=grpo",
        f"model.path={model}",
        "rollout.kv_cache_gib=0.05",
        "rollout.max_response_length=8",
        "tracking=none",
        f"run.dir={folder}",
        "data.path=prompts.jsonl",
        "data.max_prompt_length=240",
        "reward.function=tests.online.test_pictures:short_words",
        "stage.steps=2",
        "stage.prompts_per_step=4",
        "stage.samples_per_prompt=4",
        "stage.learning_rate=1e-3",
        "stage.save_steps=0",
        *overrides,
    ]


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_the_loop_trains_both_parts_on_what_was_sampled(
    family: str, backend: str, tmp_path: Path
) -> None:
    model = vision.tiny_vision(family, tmp_path / "model")
    cfg = config.compose(options(model, tmp_path, f"rollout={backend}"))
    SEEN.clear()
    online_stage.run(RunContext.open(cfg, ()), Reader(tmp_path))
    run = tmp_path / cfg.run.name / "grpo"
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    for step in map(json.loads, lines):
        assert 0 <= step["rollout/logprob_gap"] < 1e-4
        assert 0 <= step["rollout/probe_gap"] < 1e-4
        # a response of a random model may hold the token of a picture: it does not train
        assert 12 <= step["rollout/trained_responses"] <= 16
    assert [len(images) for images in SEEN] == [16, 16]
    assert {len(shown) for shown in SEEN[0]} == {1, 2}
    sample = json.loads((run / "samples.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert sample["images"][0].endswith(".png")
    before, after = (
        AutoModelForImageTextToText.from_pretrained(place).state_dict()
        for place in (model, run / "model")
    )
    moved = {name for name in before if not before[name].equal(after[name])}
    assert any("vision" in name or "visual" in name for name in moved)
    assert any("language" in name or "text_model" in name for name in moved)


@pytest.mark.parametrize(
    "given",
    [
        "engine.share_prompts=true",
        "stage.advantage=gae",
        "environment=reasoning_gym",
        "rollout=server",
        "reward.path=rm",
        "stage.watch.judge_path=rm",
    ],
)
def test_what_does_not_go_together_is_refused_by_name(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before weights load. What is refused before that for other reasons is let through here."""
    model = vision.tiny_vision("idefics3", tmp_path / "model")
    monkeypatch.setattr(online_stage, "APART_CHECKS", {})
    monkeypatch.setattr(online_stage, "check_turns", lambda *args: None)
    monkeypatch.setattr(online_stage, "acting_in", lambda *args: None)
    cfg = config.compose(options(model, tmp_path, given))
    with pytest.raises(UserError, match=rf"{re.escape(given)}: .*reads pictures"):
        online_stage.check(cfg)


def test_a_response_with_the_token_of_a_picture_does_not_train() -> None:
    from policy.batching import without_tokens

    rows, clean = without_tokens([[5, 6], [7, 5, 7]], (7,), 0)
    assert rows == [[5, 6], [0, 5, 0]]
    assert clean == [True, False]
