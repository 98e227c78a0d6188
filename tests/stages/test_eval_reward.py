"""stage=eval_reward: pairs, samples and a curve in one report; what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.judging import EvalRewardStage
from reward.model import load_reward_model, score_ids, text_ids
from rlhf.cli import config
from rlhf.run.context import RunContext
from rlhf.stages import eval_reward as stage
from rlhf.types import UserError
from tests.reward.test_scorer import save_reward_model
from tests.toys import write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two reward models and three files."""
    from tests.reward.test_scorer import tiny_tokenizer

    out = tmp_path_factory.mktemp("eval_reward")
    save_reward_model(out / "one", tiny_tokenizer())
    save_reward_model(out / "two", tiny_tokenizer())
    pairs = []
    for i in range(12):
        row = {"prompt": f"a question {i} ", "chosen": f"good {i}", "rejected": f"bad bad {i * 7}"}
        pairs.append({**row, "subset": ("alpacaeval-easy", "shp", "mine")[i % 3]})
    pairs.append({"prompt": "long " * 60, "chosen": "x", "rejected": "y", "subset": "mine"})
    write_jsonl(out / "pairs.jsonl", pairs)
    samples = []
    for i in range(5):
        for k in range(4):
            score = math.sin(7 * i + 3 * k)
            row = {"prompt": f"question {i}", "response": f"answer {k} {i}", "gold": -score}
            samples.append({**row, "score": score})
    write_jsonl(out / "samples.jsonl", samples)
    curve: list[dict[str, Any]] = [{"step": 0, "loss": 1.0}]
    for i in range(20):
        d = math.sqrt(i / 4)
        judged = d * (1 - 0.5 * math.log(d or 1))
        curve.append({"step": i, "objective/kl": i / 4, "judge/proxy": d, "judge/score": judged})
    curve.append({"step": 20, "objective/kl": -0.01, "judge/proxy": 0.0, "judge/score": 0.0})
    write_jsonl(out / "metrics.jsonl", curve)
    return out


def run(folder: Path, place: Path, *overrides: str) -> tuple[dict[str, float], dict[str, Any]]:
    base = ["stage=eval_reward", "tracking=none", f"run.dir={place}", "stage.bootstrap=40"]
    cfg = config.compose([*base, *overrides])
    assert stage.check(cfg) == []
    stage.run(RunContext.open(cfg, ()))
    out = place / cfg.run.name / "eval_reward"
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return summary["metrics"], {section["title"]: section for section in report["sections"]}


def test_pairs_samples_and_a_curve(folder: Path, tmp_path: Path) -> None:
    found, sections = run(
        folder,
        tmp_path,
        f"stage.models={{one: {folder / 'one'}, two: {folder / 'two'}}}",
        f"stage.pairs={folder / 'pairs.jsonl'}",
        f"stage.samples={folder / 'samples.jsonl'}",
        "stage.judge=gold",
        f"stage.curve={folder / 'metrics.jsonl'}",
    )
    assert list(sections) == [
        "Accuracy of reward models",
        "Calibration",
        "Ensemble",
        "Best of n",
        "Over-optimisation",
    ]
    # the same weights twice
    assert found["eval/one/accuracy"] == found["eval/two/accuracy"]
    assert found["eval/agreement/one/two"] == 1.0 and found["eval/ensemble/spread"] == 0.0
    text = " ".join(sections["Accuracy of reward models"]["text"])
    assert "1 of 13 pairs have a text that is longer" in text
    assert found["eval/length/accuracy"] == 0.0
    assert found["eval/best_of_4/proxy"] > found["eval/best_of_1/proxy"]
    assert found["eval/overoptimisation/judge/score/alpha"] == pytest.approx(1.0, abs=0.02)
    assert found["eval/overoptimisation/judge/score/beta"] == pytest.approx(0.5, abs=0.02)
    law = " ".join(sections["Over-optimisation"]["text"])
    assert "21 points" in law and "1 rows without" in law and "1 points have a KL below 0" in law
    page = tmp_path / "default" / "eval_reward" / "report.html"
    assert page.read_text(encoding="utf-8").count("data:image/png") == 4


def test_scores_are_the_models_own(folder: Path, tmp_path: Path) -> None:
    """The accuracy from scores that this test computes row by row."""
    loaded = load_reward_model(folder / "one", torch.float32)
    right = 0
    rows = (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    for row in map(json.loads, rows):
        ids = []
        for key in ("chosen", "rejected"):
            given = (loaded.tokenizer, loaded.manifest, row["prompt"], row[key])
            ids.append(text_ids(*given, finished=True))
        better, worse = score_ids(loaded.module, ids, 10_000, torch.device("cpu"))
        right += better > worse
    pairs = f"stage.pairs={folder / 'pairs.jsonl'}"
    found, _ = run(folder, tmp_path, f"reward.path={folder / 'one'}", pairs)
    assert found["eval/reward/accuracy"] == pytest.approx(right / 12)


def test_a_column_is_as_good_a_proxy_as_a_model(folder: Path, tmp_path: Path) -> None:
    found, sections = run(
        folder,
        tmp_path,
        f"stage.samples={folder / 'samples.jsonl'}",
        "stage.proxy=score",
        "stage.judge=gold",
    )
    assert found["eval/best_of_1/proxy"] == pytest.approx(-found["eval/best_of_1/judge"])
    assert found["eval/best_of_4/proxy"] == pytest.approx(-found["eval/best_of_4/judge"])
    assert found["eval/best_of_4/proxy"] > found["eval/best_of_2/proxy"]
    assert "gold is highest at n = 1" in sections["Best of n"]["text"][1]


def refused(message: str, *overrides: str) -> None:
    with pytest.raises(UserError, match=message):
        stage.check(config.compose(["stage=eval_reward", *overrides]))


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    pairs, samples = folder / "pairs.jsonl", folder / "samples.jsonl"
    refused(r"needs stage\.pairs, stage\.samples or stage\.curve")
    refused(r"stage\.pairs needs a reward model", f"stage.pairs={pairs}")
    refused(r"stage\.proxy is not set", f"stage.samples={samples}", "stage.judge=gold")
    refused(
        r"samples\.jsonl.*'nothing'",
        f"stage.samples={samples}",
        "stage.proxy=score",
        "stage.judge=nothing",
    )
    refused(
        r"stage\.models\.a=.*is not a model directory",
        f"stage.models={{a: {tmp_path}}}",
        f"stage.pairs={pairs}",
    )
    write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "p", "chosen": "x"}])
    bad = f"stage.pairs={tmp_path / 'bad.jsonl'}"
    refused(r"bad\.jsonl, row 1: .*'rejected'", f"reward.path={folder / 'one'}", bad)
    for options, message in (
        ({"samples": "x"}, r"stage\.judge=None"),
        ({"models": {"a b": "x"}}, "stage.models='a b'"),
        ({"models": {"length": "x"}}, "stage.models='length'"),
        ({"samples": "x", "judge": "a", "proxy": "a"}, r"stage\.judge='a'"),
    ):
        with pytest.raises(ValueError, match=message):
            EvalRewardStage(**options)  # type: ignore[arg-type]
    cfg = config.compose(
        [
            "stage=eval_reward",
            "tracking=none",
            f"run.dir={tmp_path}",
            f"stage.curve={samples}",
        ]
    )
    with pytest.raises(UserError, match=r"stage\.curve=.*no row has objective/kl and judge/proxy"):
        stage.run(RunContext.open(cfg, ()))
