"""Rows with pictures on TRL's trainers: they learn, their log-probabilities are those of a plain
forward pass, and splitting or resuming changes nothing.
"""

import json
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from conf.adapters import AdapterPart
from conf.choices import AdapterKind, EngineKind
from conf.schedule import TrainPart
from conf.schema import AdapterConfig, Config, DataConfig, EngineConfig, ModelConfig, RunConfig
from conf.stages import CPOStage, KTOStage, ORPOStage, PreferenceStage, RewardStage, SFTStage
from rlhf.models.encoding import IGNORED
from rlhf.models.loading import load_causal_lm, load_tokenizer, without_weights
from rlhf.models.parts import added_by
from rlhf.models.pictures import opened, picture_inputs, processor_of
from rlhf.models.templates import rendered_short, row_pictures
from rlhf.offline import picture_rows, setup
from rlhf.offline.training import fit
from rlhf.rows.pairs import PairEncoder
from rlhf.run.context import RunContext
from rlhf.stages import preference, reward, sft
from rlhf.stages import rows as stage_rows
from rlhf.types import PICTURES, Interrupted, UserError
from tests import vision
from tests.offline import trl_tools
from tests.vision import made

__all__ = ["made"]  # a fixture

_FAST = ("idefics3", "qwen2_vl", "llava")
FAMILIES = [
    name if name in _FAST else pytest.param(name, marks=pytest.mark.full)
    for name in vision.FAMILIES
    if name != "aya_vision"
]
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}
COMMON: dict[str, Any] = {
    "steps": 6,
    "batch_size": 4,
    "eval_steps": 3,
    "max_length": 256,
    "warmup_ratio": 0.0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two colours and several sizes."""
    place = tmp_path_factory.mktemp("pictures")
    for name, colour in COLOURS.items():
        for number, (width, height) in enumerate(((32, 32), (64, 40))):
            vision.drawn(place / f"{name}{number}.png", width, height, colour)
    return place


def shown_rows(count: int = 20) -> list[dict[str, Any]]:
    """What colour a picture, or the second of two, has; every fourth row has none."""
    rng = random.Random(0)
    out = []
    for number in range(count):
        colour, other = rng.choice(sorted(COLOURS)), rng.choice(sorted(COLOURS))
        images = [f"{colour}{rng.randrange(2)}.png"]
        text = "<image>what colour?"
        if number % 4 == 1:
            images = [f"{other}0.png", *images]
            text = "<image>and <image>what colour has the second?"
        if number % 4 == 3:
            images, text = [], f"say {colour}"
        turns = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": colour},
        ]
        out.append({"messages": turns, "images": images})
    return out


def pairs(count: int = 20) -> list[dict[str, Any]]:
    out = []
    for row in shown_rows(count):
        question, answer = row["messages"]
        wrong = "blue" if answer["content"] == "red" else "red"
        out.append(
            {
                "prompt": [question],
                "chosen": [answer],
                "rejected": [{"role": "assistant", "content": wrong}],
                "images": row["images"],
            }
        )
    return out


def configured(
    stage: Any, model: Path, folder: Path, name: str, rows: list[dict[str, Any]], **groups: Any
) -> Config:
    data = trl_tools.write_rows(folder / f"{stage.name}_{name}.jsonl", rows)
    return trl_tools.config(
        stage,
        folder,
        name,
        rows,
        model=ModelConfig(path=str(model)),
        data=DataConfig(path=str(data), eval_fraction=0.2),
        **groups,
    )


def run(cfg: Config, stage: Any = sft) -> Path:
    ctx = RunContext.open(cfg)
    stage.run(ctx, stage_rows)
    return ctx.dir


def metrics(directory: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((directory / "summary.json").read_text())["metrics"]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_sft_learns(made: Callable[[str], Path], folder: Path, family: str) -> None:
    stage = SFTStage(**COMMON | {"learning_rate": 5e-3})
    out = run(configured(stage, made(family), folder, family, shown_rows()))
    figures = metrics(out)
    assert figures["eval_loss"] < figures["initial/eval_loss"] - 0.5
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4
    cfg = ModelConfig(path=str(out / "model"))
    tokenizer = load_tokenizer(cfg)
    assert processor_of(tokenizer) is not None
    before = load_file(made(family) / "model.safetensors")
    after = load_file(out / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("vision" in name or "visual" in name for name in moved)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_a_plain_forward_passes(
    made: Callable[[str], Path], folder: Path, family: str
) -> None:
    """What the trainer computes of a batch of rows with one, two and no pictures, against
    transformers' processor and model, row by row.
    """
    stage = SFTStage(**COMMON | {"learning_rate": 1e-9})
    cfg = configured(stage, made(family), folder, f"plain-{family}", shown_rows())
    ctx = RunContext.open(cfg)
    rows = stage_rows.read_rows(cfg, 4)
    trainer = sft.make_trainer(ctx, sft.begin(4, cfg.engine), rows)
    chosen = [rows.train[number] for number in range(8)]
    batch = trainer.data_collator(chosen)
    model = trainer.model.eval()
    with torch.no_grad():
        ours = model(**batch, fused_lm_head=True).log_probs  # [B, L - 1]
    tokenizer = rows.tokenizer
    processor = processor_of(tokenizer)
    plain = load_causal_lm(cfg.model, load_tokenizer(cfg.model)).eval()
    assert processor is not None
    counts = set()
    for number, row in enumerate(chosen):
        shown = row_pictures(row)
        counts.add(len(shown))
        ids = torch.tensor([row["input_ids"]])
        extra = picture_inputs(processor, [shown], ids)
        with torch.no_grad():
            logits = plain(input_ids=ids, **extra).logits.float()
        expected = logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        trained = torch.tensor(row["labels"])[1:] != IGNORED
        assert trained.any()
        found = ours[number, : len(expected)]
        torch.testing.assert_close(found[trained], expected[trained], atol=1e-5, rtol=0)
        assert not found[~trained].any()
    assert counts == {0, 1, 2}


def test_what_is_encoded_is_what_the_processor_makes(
    made: Callable[[str], Path], folder: Path
) -> None:
    """Through files and formats: token ids, pixels and labels of a row."""
    stage = SFTStage(**COMMON | {"completion_only": False})
    cfg = configured(stage, made("qwen2_vl"), folder, "encoded", shown_rows())
    rows = stage_rows.read_rows(cfg, 4)
    processor = processor_of(rows.tokenizer)
    assert processor is not None
    row = next(row for row in rows.train if len(row_pictures(row)) == 2)
    shown = row_pictures(row)
    chat = [
        vision.asked("MARKand MARKwhat colour has the second?", *shown),
        vision.said(rows.tokenizer.decode(row["input_ids"][-4:]).split("\n")[-1].split("<|")[0]),
    ]
    text = rendered_short(rows.tokenizer, chat, generation_prompt=False).removesuffix("\n")
    images = [opened(picture) for picture in shown]
    given = processor.inner(text=[text], images=images, return_tensors="pt")
    assert row["input_ids"] == given["input_ids"][0].tolist()
    extra = picture_inputs(processor, [shown], given["input_ids"])
    assert torch.equal(extra["pixel_values"], given["pixel_values"])
    assert torch.equal(extra["image_grid_thw"], given["image_grid_thw"])
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label == (IGNORED if token in processor.feature_ids else token)


def test_a_split_of_the_batch_changes_nothing(made: Callable[[str], Path], folder: Path) -> None:
    """Rows with and without pictures in micro-batches of four, of one, and by tokens."""
    stage = SFTStage(**COMMON | {"learning_rate": 5e-3, "steps": 3})
    found = []
    engines = [
        EngineConfig(micro_batch_size=4),
        EngineConfig(micro_batch_size=1),
        EngineConfig(micro_batch_tokens=128),
    ]
    for number, engine in enumerate(engines):
        name = f"split{number}"
        cfg = configured(stage, made("idefics3"), folder, name, shown_rows(), engine=engine)
        out = run(cfg)
        found.append(load_file(out / "model" / "model.safetensors"))
    for other in found[1:]:
        for name, tensor in found[0].items():
            torch.testing.assert_close(tensor, other[name], atol=2e-5, rtol=1e-4)


def test_a_resumed_run_is_one_that_never_stopped(made: Callable[[str], Path], folder: Path) -> None:
    stage = SFTStage(**COMMON | {"learning_rate": 5e-3})
    whole = run(configured(stage, made("qwen2_vl"), folder, "whole", shown_rows()))
    cfg = configured(stage, made("qwen2_vl"), folder, "halves", shown_rows())
    ctx = RunContext.open(cfg)
    rows = stage_rows.read_rows(cfg, 4)
    trainer = sft.make_trainer(ctx, sft.begin(4, cfg.engine), rows)
    trainer.add_callback(Asking(3))
    with ctx.closing(), pytest.raises(Interrupted):
        fit(trainer, ctx)
    again = configured(
        stage,
        made("qwen2_vl"),
        folder,
        "halves",
        shown_rows(),
        run=RunConfig(dir=str(folder / "runs"), name="halves", resume=True),
    )
    out = run(again)
    before = load_file(whole / "model" / "model.safetensors")
    after = load_file(out / "model" / "model.safetensors")
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


class Asking(TrainerCallback):
    """Asks to stop after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_row_whose_picture_is_cut_is_left_out(
    made: Callable[[str], Path], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage = SFTStage(**COMMON | {"max_length": 64})
    cfg = configured(stage, made("idefics3"), folder, "cut", shown_rows(40))
    rows = stage_rows.read_rows(cfg, 4)
    assert "a picture of theirs lies beyond stage.max_length=64" in caplog.text
    processor = processor_of(rows.tokenizer)
    assert processor is not None
    for row in rows.train:
        features = processor.features(row["input_ids"])
        assert features % 4 == 0
        assert (features > 0) == bool(row_pictures(row))


PREFERENCES: dict[str, Any] = {
    "dpo": PreferenceStage(**COMMON | {"learning_rate": 3e-3}),
    "cpo": CPOStage(**COMMON | {"learning_rate": 3e-3}),
    "orpo": ORPOStage(**COMMON | {"learning_rate": 3e-3}),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_learn(made: Callable[[str], Path], folder: Path, name: str) -> None:
    stage = PREFERENCES[name]
    out = run(configured(stage, made("qwen2_vl"), folder, name, pairs()), preference)
    figures = metrics(out)
    assert figures["eval_loss"] < figures["initial/eval_loss"] - 0.01


def test_kto_learns(made: Callable[[str], Path], folder: Path) -> None:
    rows = []
    for number, pair in enumerate(pairs()):
        side = ("chosen", "rejected")[number % 2]
        rows.append(
            {
                "prompt": pair["prompt"],
                "completion": pair[side],
                "label": side == "chosen",
                "images": pair["images"],
            }
        )
    stage = KTOStage(**COMMON | {"learning_rate": 3e-3})
    out = run(configured(stage, made("qwen2_vl"), folder, "kto", rows), preference)
    # the few held-out answers are all good ones, of which KTO's loss is 1/2 whatever is learned
    assert metrics(out)["loss"] < 0.5 - 0.01


def test_a_pair_of_different_pictures_is_refused(made: Callable[[str], Path], folder: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(made("qwen2_vl"))))
    first, second = vision.pictures(folder, [(32, 32), (64, 40)])
    answer = vision.said("red")
    value = {
        "chosen": [vision.asked("MARKwhich?", first), answer],
        "rejected": [vision.asked("MARKwhich?", second), answer],
    }
    encode = PairEncoder(tokenizer, 64, margin=False, carried={})
    with pytest.raises(ValueError, match="same pictures"):
        encode(value, Counter())


def test_text_rows_have_no_column_of_pictures(folder: Path) -> None:
    cfg = trl_tools.config(SFTStage(**COMMON), folder, "text", trl_tools.sft_rows())
    rows = stage_rows.read_rows(cfg, 4)
    assert PICTURES not in rows.train.column_names


def test_a_reward_model_learns(made: Callable[[str], Path], folder: Path) -> None:
    stage = RewardStage(**COMMON | {"learning_rate": 3e-3})
    out = run(configured(stage, made("qwen2_vl"), folder, "reward", pairs()), reward)
    figures = metrics(out)
    assert figures["eval_loss"] < figures["initial/eval_loss"]


@pytest.mark.parametrize(
    ("changed", "engine", "word"),
    [
        ({"packing": True}, EngineConfig(), "stage.packing"),
        ({}, EngineConfig(kind=EngineKind.deepspeed, sequence_parallel=2), "sequence_parallel"),
    ],
)
def test_what_pictures_can_not_go_with_is_refused(
    made: Callable[[str], Path], changed: dict[str, Any], engine: EngineConfig, word: str
) -> None:
    path = str(made("idefics3"))
    with pytest.raises(UserError, match=rf"{word}.*reads pictures"):
        picture_rows.check(path, SFTStage(**COMMON | changed), engine, 0)
    with pytest.raises(UserError, match="16 virtual tokens"):
        picture_rows.check(path, SFTStage(**COMMON), EngineConfig(), 16)
    frozen = RewardStage(**COMMON | {"cache_frozen": True})
    with pytest.raises(UserError, match="cache_frozen"):
        picture_rows.check(path, frozen, EngineConfig(), 0)


def test_a_family_that_trl_computes_otherwise_is_refused(made: Callable[[str], Path]) -> None:
    path = str(made("aya_vision"))
    with pytest.raises(UserError, match="logit_scale"):
        picture_rows.check(path, SFTStage(**COMMON), EngineConfig(), 0)
    picture_rows.check(path, RewardStage(**COMMON), EngineConfig(), 0)


def test_zero3_wants_pictures_in_all_rows_or_none(
    made: Callable[[str], Path], folder: Path
) -> None:
    stage = SFTStage(**COMMON)
    rows = stage_rows.read_rows(
        configured(stage, made("qwen2_vl"), folder, "mixed", shown_rows()), 4
    )
    setup.check_rows(stage, EngineConfig(), rows)
    engine = EngineConfig(kind=EngineKind.deepspeed, zero_stage=3)
    with pytest.raises(UserError, match="engine=zero3"):
        setup.check_rows(stage, engine, rows)


@pytest.mark.parametrize("part", list(AdapterPart))
def test_an_adapter_is_on_the_part_that_is_asked_for(
    made: Callable[[str], Path], folder: Path, part: AdapterPart
) -> None:
    """The other part is as it was, bit for bit, once the adapter is merged; memory's count and
    PEFT's agree.
    """
    adapter = AdapterConfig(kind=AdapterKind.lora, rank=4, part=part, merge_on_save=True)
    stage = SFTStage(**COMMON | {"learning_rate": 5e-3, "steps": 2, "eval_steps": 2})
    model = made("idefics3")
    cfg = configured(stage, model, folder, f"lora-{part.value}", shown_rows(), adapter=adapter)
    setup.check(cfg)
    out = run(cfg)
    before = load_file(model / "model.safetensors")
    after = load_file(out / "model" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    in_text = {name for name in moved if name.startswith("model.text_model.")}
    assert bool(in_text) == (part is not AdapterPart.vision)
    assert bool(moved - in_text) == (part is not AdapterPart.language)
    files = load_file(out / "adapter" / "adapter_model.safetensors")
    counted = added_by(without_weights(cfg.model), adapter)[0]
    assert counted == sum(tensor.numel() for tensor in files.values())


def test_frozen_parts_get_no_gradient(made: Callable[[str], Path], folder: Path) -> None:
    train = TrainPart(modules=["language"])
    stage = SFTStage(**COMMON | {"learning_rate": 5e-3, "steps": 2, "eval_steps": 2}, train=train)
    model = made("llava")
    out = run(configured(stage, model, folder, "frozen", shown_rows()))
    before = load_file(model / "model.safetensors")
    after = load_file(out / "model" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not [name for name in moved if "vision" in name or "projector" in name]
