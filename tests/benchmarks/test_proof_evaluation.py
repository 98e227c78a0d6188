"""The proof of the evaluation fails on each figure that is off; its rows and commands compose."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.proofs import evaluation as proof
from benchmarks.proofs.common import MissingRun
from conf.choices import Judge
from rlhf.cli import config
from tests.benchmarks.test_proofs import change_summary, failed, write_runs

GOOD: dict[str, dict[str, Any]] = {
    "sft": {},
    "reward": {},
    "eval_reward": {"eval/films/accuracy": 0.8, "eval/films/log_loss_tempered": 0.5},
    "eval": {
        "eval/sentiment/before/accuracy_high": 0.6,
        "eval/sentiment/after/accuracy_low": 0.8,
        "eval/sums/before/numeric_high": 0.3,
        "eval/sums/after/numeric_low": 0.4,
        "eval/lexicon_low": 0.1,
        "eval/score_low": 0.2,
        "eval/llm/ranked": 0.0,
        "eval/llm/pairs": 40.0,
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that passes."""
    out = write_runs(tmp_path / "proof-evaluation-0", GOOD)
    for stage in GOOD:
        change_summary(out, stage, "wall_s", 100.0)
    sections = [{"title": str(i)} for i in range(4)]
    (out / "eval" / "report.json").write_text(json.dumps({"sections": sections}), "utf-8")
    for stage in ("eval", "eval_reward"):
        (out / stage / "report.html").write_text('<img src="data:image/png;base64,">', "utf-8")
    return out


def test_a_good_run_passes(folder: Path) -> None:
    assert failed(proof.check_run(folder)) == []
    assert proof.main(["--check-only", "--runs", str(folder.parent)]) == 0


@pytest.mark.parametrize(
    ("stage", "name", "value", "check"),
    [
        ("eval", "eval/sentiment/after/accuracy_low", 0.59, "task sentiment"),
        ("eval", "eval/sums/before/numeric_high", 0.41, "task sums"),
        ("eval", "eval/lexicon_low", -0.1, "lexicon"),
        ("eval", "eval/score_low", -0.1, "score"),
        ("eval", "eval/llm/ranked", 1.0, "it ranks"),
        ("eval", "eval/llm/pairs", 39.0, "pairs"),
        ("eval_reward", "eval/films/accuracy", 0.69, "accuracy"),
        ("eval_reward", "eval/films/log_loss_tempered", 0.7, "log loss"),
        ("eval", "wall_s", 421.0, "wall time"),
    ],
)
def test_fails_on_each_figure(
    folder: Path, stage: str, name: str, value: float, check: str
) -> None:
    change_summary(folder, stage, name, value)
    (wrong,) = failed(proof.check_run(folder))
    assert check in wrong


def test_fails_on_a_page_that_asks_a_host_and_on_a_missing_report(folder: Path) -> None:
    (folder / "eval" / "report.html").write_text('<img src="https://x/y.png">', "utf-8")
    assert failed(proof.check_run(folder)) == ["requests in the pages"]
    (folder / "eval" / "report.json").unlink()
    with pytest.raises(MissingRun, match=r"report\.json"):
        proof.check_run(folder)


def test_the_commands_compose() -> None:
    made = proof.commands(Path("runs/proof-evaluation-0"), 0, ["tracking=none"])
    assert tuple(made) == proof.STAGES
    composed = {stage: config.compose([f"stage={stage}", *made[stage]]) for stage in made}
    assert composed["eval"].stage.judges == [Judge.lexicon, Judge.llm]
    assert sorted(composed["eval"].tasks) == ["sentiment", "sums"]
    known, asked = proof.sums(random.Random(0))
    assert len(asked) == proof.TASK_ROWS and not set(known) & set(asked)
