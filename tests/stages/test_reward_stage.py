"""stage=reward: it learns, its loss is the equation's, its figures are right, and its model works
from its own directory alone.
"""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trl.trainer.reward_trainer import DataCollatorForPreference

from conf.choices import AdapterKind, ModelKind
from conf.schema import AdapterConfig, EngineConfig, ModelConfig, RewardConfig
from conf.stages import RewardStage
from reward.losses import pairwise_loss
from reward.model import last_token_scores, load_reward_model, read_manifest
from reward.scorers.reward_model import RewardModelScorer
from rlhf.data.reading import DataRequest, preference_records
from rlhf.models.encoding import prompt_ids, response_ids
from rlhf.models.loading import load_classifier
from rlhf.offline.judged_pairs import judge
from rlhf.process.randomness import seed_everything
from rlhf.rows.pairs import encode_pairs
from rlhf.run.context import RunContext
from rlhf.stages import reward
from rlhf.stages import rows as stage_rows
from rlhf.types import Prompt, Rollout, UserError
from tests.offline import trl_tools

STAGE: dict[str, Any] = {
    "steps": 12,
    "batch_size": 8,
    "eval_steps": 6,
    "max_length": 40,
    "learning_rate": 5e-3,
    "warmup_ratio": 0.0,
    "bootstrap": 200,
}


def config(
    folder: Path,
    name: str,
    *,
    rows: list[dict[str, Any]] | None = None,
    stage: dict[str, Any] | None = None,
    **groups: Any,
) -> Any:
    return trl_tools.config(
        RewardStage(**(STAGE | (stage or {}))),
        folder,
        name,
        rows or trl_tools.pair_rows(80),
        **groups,
    )


def run(cfg: Any) -> Path:
    ctx = RunContext.open(cfg)
    reward.run(ctx, stage_rows)
    return ctx.dir


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reward")


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    return run(config(folder, "base"))


def held_out(cfg: Any) -> list[dict[str, Any]]:
    return [record.value for record in preference_records(DataRequest.of(cfg))[1]]


def as_rollout(tokenizer: Any, prompt: str, text: str) -> Rollout:
    ids = prompt_ids(tokenizer, prompt)
    answer = response_ids(tokenizer, text)
    return Rollout(
        Prompt(id=prompt, text=prompt, token_ids=tuple(ids), source=prompt),
        text,
        answer,
        [0.0] * len(answer),
        "stop",
        0,
    )


def test_it_learns_and_reports_its_worth(base: Path) -> None:
    metrics = json.loads((base / "summary.json").read_text())["metrics"]
    assert metrics["eval_loss"] < metrics["initial/eval_loss"] - 0.3
    assert metrics["eval/accuracy_low"] <= metrics["eval/accuracy"] <= metrics["eval/accuracy_high"]
    assert (
        metrics["eval/accuracy"] > 0.9
        and metrics["eval/accuracy"] > metrics["eval/length_baseline"] + 0.2
    )
    assert metrics["eval/margin"] > 0.5 and metrics["eval/pairs"] == 16
    assert "accuracy" in trl_tools.metric_lines(base)[1], "TRL's own names"
    assert (base / "plots" / "held_out_pairs.png").stat().st_size > 1000
    samples = [json.loads(line) for line in (base / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 16 and {"score", "side", "response"} <= samples[0].keys()


def test_scorer_gives_the_trainers_scores_from_a_moved_directory(base: Path, folder: Path) -> None:
    """The trainer's own collator and forward, and a scorer that gets the policy's tokens, read the
    same number.
    """
    moved = folder / "moved"
    shutil.move(shutil.copytree(base / "model", folder / "copied"), moved)
    loaded = load_reward_model(moved, torch.float32)
    tokenizer, module = loaded.tokenizer, loaded.module
    rows = held_out(config(folder, "base"))
    pairs = encode_pairs(tokenizer, trl_tools.records(rows), name="x", max_length=40, margin=False)
    batch = DataCollatorForPreference(pad_token_id=module.config.pad_token_id)(list(pairs))
    with torch.no_grad():
        trainer_scores = module(**batch).logits.squeeze(-1).tolist()
    scorer = RewardModelScorer(
        str(moved), RewardConfig(), torch.device("cpu"), policy_tokenizer=tokenizer
    )
    rollouts = [
        as_rollout(tokenizer, row["prompt"], row[side])
        for side in ("chosen", "rejected")
        for row in rows
    ]
    assert scorer.score(rollouts).total == pytest.approx(trainer_scores, abs=1e-6)
    metrics = json.loads((base / "summary.json").read_text())["metrics"]
    assert np.mean(np.array(trainer_scores[:16]) > np.array(trainer_scores[16:])) == pytest.approx(
        metrics["eval/accuracy"]
    )
    manifest = read_manifest(moved)
    assert manifest.score_mean == pytest.approx(np.mean(trainer_scores), abs=1e-5)
    assert manifest.score_std == pytest.approx(np.std(trainer_scores), abs=1e-5)
    assert (manifest.held_out_texts, manifest.max_length, manifest.dtype, manifest.base) == (
        32,
        40,
        "float32",
        "tiny",
    )


@pytest.mark.parametrize(("margin", "centering"), [(False, 0.0), (True, 0.05)])
def test_trl_computes_our_equation(folder: Path, margin: bool, centering: float) -> None:
    """The evaluation before the first step is the loss of the fresh model, which a seed makes
    again.
    """
    stage = {
        "steps": 1,
        "eval_steps": 1,
        "batch_size": 16,
        "margin": margin,
        "centering_coef": centering,
    }
    cfg = config(folder, f"equation_{margin}", stage=stage)
    place = run(cfg)
    tokenizer = load_reward_model(place / "model", torch.float32).tokenizer
    seed_everything(cfg.run.seed)
    model = load_classifier(ModelConfig(kind=ModelKind.tiny, tiny=trl_tools.TINY), tokenizer).eval()
    rows = trl_tools.records(held_out(cfg))
    data = encode_pairs(tokenizer, rows, name="x", max_length=40, margin=margin)
    with torch.no_grad():
        sides = [
            torch.stack(
                [model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in data[f"{side}_ids"]]
            )
            for side in ("chosen", "rejected")
        ]
    expected = pairwise_loss(*sides, torch.tensor(data["margin"]) if margin else None, centering)
    assert trl_tools.metric_lines(place)[0]["eval_loss"] == pytest.approx(float(expected), abs=1e-5)


def test_lora_reward_model_is_whole(folder: Path) -> None:
    place = run(config(folder, "lora", adapter=AdapterConfig(kind=AdapterKind.lora, rank=4)))
    assert (place / "adapter" / "adapter_model.safetensors").exists()
    assert not (place / "model" / "adapter_config.json").exists()
    metrics = json.loads((place / "summary.json").read_text())["metrics"]
    assert metrics["eval/accuracy"] > 0.9
    assert metrics["eval/margin"] == pytest.approx(metrics["eval_margin"], abs=1e-4), (
        "the saved head and adapter are the trained ones"
    )
    shutil.move(place / "model", folder / "lora_moved")
    assert load_reward_model(folder / "lora_moved", torch.float32).manifest.score_std > 0


def test_padding_that_is_end_of_sequence_is_replaced(base: Path, folder: Path) -> None:
    """From a tokenizer that pads with end-of-sequence, training and scoring still read the same
    token.
    """
    start = folder / "pad_is_eos"
    shutil.copytree(base / "model", start)
    settings = json.loads((start / "tokenizer_config.json").read_text())
    settings["pad_token"] = settings["eos_token"]
    (start / "tokenizer_config.json").write_text(json.dumps(settings))
    place = run(
        config(
            folder, "pad", model=ModelConfig(path=str(start)), stage={"steps": 1, "eval_steps": 1}
        )
    )
    loaded = load_reward_model(place / "model", torch.float32)
    assert loaded.module.config.pad_token_id not in (None, loaded.tokenizer.eos_token_id)
    metrics = json.loads((place / "summary.json").read_text())["metrics"]
    assert metrics["eval/accuracy"] == pytest.approx(metrics["eval_accuracy"], abs=1e-6)
    assert metrics["eval/margin"] == pytest.approx(metrics["eval_margin"], abs=1e-4)


def test_margin_option_needs_the_column(folder: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "margin"} for row in trl_tools.pair_rows(20)]
    with pytest.raises(UserError, match=r"stage.margin=true.* no margin"):
        run(config(folder, "no_margin", rows=rows, stage={"margin": True}))


# ---- soft labels ----


def soft_rows(count: int = 120) -> list[dict[str, Any]]:
    """Good words win for certain; of pairs of good words, of which nothing tells which is better,
    one is chosen at random and said to be a tie.
    """
    rows = []
    for i, row in enumerate(trl_tools.pair_rows(count)):
        sides = (row["chosen"], row["chosen"].replace("good", "great") + " end")
        noise = {"chosen": sides[i % 4 == 1], "rejected": sides[i % 4 == 3]} if i % 2 else {}
        rows.append({**row, **noise, "soft_label": 0.5 if i % 2 else 0.9})
    return rows


def test_soft_labels_are_what_the_margins_come_to_say(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ties end near a margin of 0 and the others near log(0.9 / 0.1) = 2.2; without soft labels the
    margins know no bound.
    """
    steps = {"steps": 60, "eval_steps": 20, "soft_label": True}
    cfg = config(folder, "soft", rows=soft_rows(), stage=steps)
    with caplog.at_level("INFO", "rlhf.data"):
        place = run(cfg)
    assert "soft labels from 0.5 to 0.9" in caplog.text
    metrics = json.loads((place / "summary.json").read_text())["metrics"]
    pairs = held_out(cfg)
    soft = np.array([row["soft_label"] for row in pairs])
    loaded = load_reward_model(place / "model", torch.float32)
    tokenizer = loaded.tokenizer
    encoded = encode_pairs(
        tokenizer, trl_tools.records(pairs), name="x", max_length=40, margin=False, soft_label=True
    )
    judged = judge(
        functools.partial(last_token_scores, loaded.module), encoded, 2048, torch.device("cpu")
    )
    margins = judged.chosen - judged.rejected
    assert (
        abs(float(np.mean(margins[soft == 0.5]))) < 0.7
        and 1.4 < float(np.mean(margins[soft == 0.9])) < 3.2
    )
    said = 1 / (1 + np.exp(-margins))
    assert (
        metrics["eval/calibration_error"]
        == pytest.approx(float(np.mean(np.abs(said - soft))), abs=1e-5)
        and metrics["eval/calibration_error"] < 0.15
    )
    assert metrics["eval/ties"] == float(np.sum(soft == 0.5)) > 3 and metrics["eval/pairs"] == len(
        soft
    )
    assert metrics["eval/accuracy"] == np.mean(margins[soft == 0.9] > 0) > 0.9
    assert metrics["eval_accuracy"] == pytest.approx(metrics["eval/accuracy"]), (
        "TRL's figure leaves ties out, too"
    )
    expected = np.mean(-soft * np.log(said) - (1 - soft) * np.log(1 - said))
    assert (
        metrics["eval_loss"] == pytest.approx(expected, abs=1e-4)
        and metrics["eval_loss"] < metrics["initial/eval_loss"] - 0.05
    )


def test_certain_soft_labels_are_the_plain_run_and_micro_batches_change_nothing(
    folder: Path,
) -> None:
    rows = trl_tools.pair_rows(48)
    plain = run(config(folder, "plain", rows=rows, stage={"steps": 3, "eval_steps": 3}))
    certain = run(
        config(
            folder,
            "certain",
            rows=[row | {"soft_label": 1} for row in rows],
            stage={"steps": 3, "eval_steps": 3, "soft_label": True},
        )
    )
    assert trl_tools.losses(certain) == pytest.approx(trl_tools.losses(plain), abs=1e-6)
    one, other = (trl_tools.metric_lines(place) for place in (plain, certain))
    assert [line.get("accuracy") for line in one] == pytest.approx(
        [line.get("accuracy") for line in other]
    )
    mixed = [
        row | {"soft_label": 0.5 + 0.1 * (i % 5), "weight": 1 + i % 3} for i, row in enumerate(rows)
    ]
    stage = {"steps": 3, "eval_steps": 3, "soft_label": True, "centering_coef": 0.1}
    whole = run(config(folder, "whole", rows=mixed, stage=stage))
    for size in ({"micro_batch_size": 2}, {"micro_batch_tokens": 40}):
        engine = EngineConfig(**size)
        split = run(
            config(folder, f"split_{next(iter(size))}", rows=mixed, stage=stage, engine=engine)
        )
        assert trl_tools.losses(split) == pytest.approx(trl_tools.losses(whole), abs=1e-5)
        assert trl_tools.losses(split) != trl_tools.losses(plain)


def test_held_out_ties_only_are_refused_before_training(folder: Path) -> None:
    rows = [row | {"soft_label": 0.5} for row in trl_tools.pair_rows(20)]
    cfg = config(folder, "ties", rows=rows, stage={"soft_label": True})
    with pytest.raises(UserError, match=r"held-out pairs has soft_label 0.5"):
        run(cfg)
    assert not (Path(cfg.run.dir) / "ties" / "reward" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, r"row 1: stage.soft_label=true.*no column 'soft_label'"),
        ("often", r"column 'soft_label'.*probability from 0 to 1.*'often'"),
        (1.5, r"probability from 0 to 1.*1.5"),
    ],
)
def test_soft_labels_are_checked_before_weights_load(
    folder: Path, change: Any, message: str
) -> None:
    rows = [
        row if change is None else row | {"soft_label": change} for row in trl_tools.pair_rows(20)
    ]
    with pytest.raises(UserError, match=message):
        stage_rows.check(config(folder, "unchecked", rows=rows, stage={"soft_label": True}))


def test_margin_and_soft_label_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"stage.soft_label.*false with stage.margin=true"):
        RewardStage(margin=True, soft_label=True)


def test_a_column_that_nobody_reads_is_warned_of(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row | {"soft_label": 0.7} for row in trl_tools.pair_rows(20)]
    train, _ = preference_records(DataRequest.of(config(folder, "unread", rows=rows)))
    assert (
        not any("soft_label" in record.value for record in train)
        and "the column 'soft_label' is not read" in caplog.text
    )
    train, held = preference_records(
        DataRequest.of(config(folder, "read", rows=rows, stage={"soft_label": True}))
    )
    assert {record.value["soft_label"] for record in (*train, *held)} == {0.7}


def test_manifest_is_what_it_says(base: Path) -> None:
    manifest = read_manifest(base / "model")
    assert set(json.loads((base / "model" / "reward_model.json").read_text())) == {
        f.name for f in dataclasses.fields(manifest)
    }
