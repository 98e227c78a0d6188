"""Annotation, label noise and augmentation as steps of a pipeline: counted, refused in the wrong
place, resumed, and in stage=data.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from conf.choices import TrackingKind
from conf.schema import Config, DataConfig, RunConfig, TrackingConfig
from conf.stages import DataStage, RewardStage
from rlhf.data.formats import Use
from rlhf.data.prepare.pipeline import run
from rlhf.data.prepare.plan import plan
from rlhf.run.context import RunContext
from rlhf.stages import data, reward
from rlhf.stages import rows as stage_rows
from rlhf.types import UserError
from tests import steps
from tests.offline import trl_tools

Row = dict[str, Any]


def judged_pairs(count: int) -> list[Row]:
    """Three annotators a pair; of every fourth pair two of them prefer the other side."""
    out = []
    for i in range(count):
        for j, name in enumerate("abc"):
            sides = ("automobile", "train") if (i % 4 or j == 0) else ("train", "automobile")
            words = " ".join(chr(97 + (i * k) % 26) * 3 for k in range(2, 9))
            out.append(
                {
                    "prompt": f"{words}: which great film has one?",
                    "chosen": sides[0],
                    "rejected": sides[1],
                    "annotator": name,
                }
            )
    return out


@pytest.fixture
def pipeline(tmp_path: Path) -> list[Row]:
    (tmp_path / "terms.yaml").write_text("car: [automobile]\n", encoding="utf-8")
    (tmp_path / "synonyms.yaml").write_text(
        "- [film, movie]\n- [great, superb]\n", encoding="utf-8"
    )
    return [
        {"step": "terms", "dictionary": str(tmp_path / "terms.yaml")},
        {"step": "review", "agreed": 0.9},
        {"step": "aggregate", "method": "majority", "min_labels": 2},
        {"step": "split", "fraction": 0.2},
        {
            "step": "augment",
            "synonyms": str(tmp_path / "synonyms.yaml"),
            "operations": ["synonym", "swap"],
            "copies": 2,
        },
    ]


def test_a_whole_pipeline(pipeline: list[Row], tmp_path: Path) -> None:
    rows = judged_pairs(20)
    done = run(
        steps.items(rows), pipeline, kind=Use.preference, folder=tmp_path / "run", identity="x"
    )
    reports = {report.step: report for report in done.steps}
    assert reports["terms"].figures["terms"]["car"] == {
        "exchanges": 60,
        "rows": 60,
        "words": {"automobile": 60},
    }
    assert reports["review"].figures["queued"] == 5 and (tmp_path / "run" / "review.csv").is_file()
    assert (reports["aggregate"].rows_in, reports["aggregate"].rows_out) == (60, 20)
    assert reports["aggregate"].figures["agreement"]["observed"]["value"] == pytest.approx(
        (15 + 5 / 3) / 20
    )
    by_row = {item.number: item for item in done.items if "augmented" not in item.columns}
    assert len(by_row) == 20
    assert all(
        (item.columns["chosen"] == "train") == (number % 12 == 1) for number, item in by_row.items()
    )
    new = [item for item in done.items if "augmented" in item.columns]
    assert len(new) == reports["augment"].rows_out - 20 > 16 and {item.split for item in new} == {
        "train"
    }
    assert all(
        set(item.columns) >= {"chosen", "rejected", "confidence", "augmented_from"} for item in new
    )
    left_out = [json.loads(line) for line in done.rejected.read_text(encoding="utf-8").splitlines()]
    assert (
        len(left_out) == 40
        and {row["step"] for row in left_out} == {"aggregate"}
        and left_out[0]["content"]["annotator"]
    )
    again = run(
        steps.items(rows), pipeline, kind=Use.preference, folder=tmp_path / "run", identity="x"
    )
    assert again.items == done.items and all(report.reused for report in again.steps)


def test_a_changed_dictionary_runs_the_steps_again(pipeline: list[Row], tmp_path: Path) -> None:
    rows = judged_pairs(4)
    run(steps.items(rows), pipeline[:1], kind=Use.preference, folder=tmp_path / "run", identity="x")
    (tmp_path / "terms.yaml").write_text("vehicle: [automobile]\n", encoding="utf-8")
    again = run(
        steps.items(rows), pipeline[:1], kind=Use.preference, folder=tmp_path / "run", identity="x"
    )
    assert {item.columns["chosen"] for item in again.items} == {"vehicle", "train"}


@pytest.mark.parametrize(
    ("entry", "kind", "message"),
    [
        (
            {"step": "augment", "operations": ["swap"]},
            "prompt",
            r"data.pipeline\[0\] \(augment\): runs after the split only",
        ),
        ({"step": "back_translate", "translator": "a:b"}, "prompt", r"runs after the split only"),
        ({"step": "terms"}, "sft", r"\(terms\): .*dictionary"),
        (
            {"step": "terms", "dictionary": "none.yaml"},
            "sft",
            r"\(terms\): dictionary=none.yaml: no such file",
        ),
        ({"step": "aggregate", "method": "mean"}, "sft", r"\(aggregate\): .*mean"),
        (
            {"step": "aggregate", "min_labels": 0},
            "sft",
            r"\(aggregate\): min_labels=0 is out of range: expected at least 1",
        ),
        (
            {"step": "aggregate", "anotator": "x"},
            "sft",
            r"no such option 'anotator'. Nearest: annotator",
        ),
        ({"step": "review", "queue": "../x"}, "sft", r"\(review\): queue='../x' is out of range"),
        ({"step": "review", "decisions": "none.csv"}, "sft", r"decisions=none.csv: no such file"),
        (
            {"step": "label_noise"},
            "sft",
            r"takes rows of kind preference, unpaired; these are of kind sft",
        ),
        (
            {"step": "label_noise", "reward_model": "none"},
            "preference",
            r"reward_model=none: no such file or directory",
        ),
    ],
)
def test_what_is_refused_before_a_row_is_read(
    entry: Row, kind: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        plan([entry], kind=Use(kind))


def config(folder: Path, path: Path, pipeline: list[Any]) -> Config:
    return Config(
        stage=DataStage(),
        run=RunConfig(dir=str(folder / "runs"), name="prepared"),
        data=DataConfig(path=str(path), pipeline=pipeline),
        tracking=TrackingConfig(kind=TrackingKind.none),
    )


def test_the_stage_finds_noise_with_the_runs_own_reward_model_and_the_weights_train(
    tmp_path: Path,
) -> None:
    """A reward model out of one file weighs the rows of another, whose weights the next reward
    model then uses.
    """
    small = {
        "batch_size": 8,
        "eval_steps": 8,
        "max_length": 40,
        "learning_rate": 5e-3,
        "warmup_ratio": 0.0,
        "bootstrap": 10,
    }
    first = RunContext.open(
        trl_tools.config(RewardStage(steps=16, **small), tmp_path, "first", trl_tools.pair_rows(80))
    )
    reward.run(first, stage_rows)
    rows = trl_tools.pair_rows(176)[80:]
    wrong = {i for i in range(len(rows)) if i % 8 == 0}
    for i in wrong:
        rows[i]["chosen"], rows[i]["rejected"] = rows[i]["rejected"], rows[i]["chosen"]
    path = trl_tools.write_rows(tmp_path / "noisy.jsonl", rows)
    step = {"step": "label_noise", "reward_model": str(first.model_dir)}
    ctx = RunContext.open(config(tmp_path, path, [{**step, "action": "weight"}]))
    data.run(ctx)
    written = [
        json.loads(line)
        for line in (ctx.dir / "train.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(written) == len(rows)
    heavy = [row["weight"] for i, row in enumerate(written) if i not in wrong]
    light = [row["weight"] for i, row in enumerate(written) if i in wrong]
    assert sum(light) / len(light) < 0.3 and sum(heavy) / len(heavy) > 0.7
    second = trl_tools.config(
        RewardStage(steps=8, **small),
        tmp_path,
        "second",
        [],
        data=DataConfig(path=str(ctx.dir / "train.jsonl")),
    )
    context = RunContext.open(second)
    reward.run(context, stage_rows)
    assert json.loads((context.dir / "summary.json").read_text())["metrics"]["eval_loss"] < 0.6
    seen = config(
        tmp_path,
        Path(str(trl_tools.write_rows(tmp_path / "seen.jsonl", trl_tools.pair_rows(80)))),
        [step],
    )
    seen.run = RunConfig(dir=str(tmp_path / "runs"), name="seen")
    with pytest.raises(UserError, match="was trained on"):
        data.run(RunContext.open(seen))
