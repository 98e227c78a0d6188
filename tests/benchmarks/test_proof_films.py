"""The proof of the demo fails on each figure that is off, and reads answers' likelihood right."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.proofs import films as proof
from benchmarks.proofs.common import MissingRun
from rlhf.cli import config
from tests.benchmarks.test_proofs import change_step, change_summary, failed, write_runs

GOOD: dict[str, dict[str, Any]] = {
    "chain": {},
    "sft": {},
    "reward": {"eval/accuracy": 0.9},
    "grpo": {},
    "eval": {
        "eval/score_shift_sd": 1.4,
        "eval/lexicon_low": 0.02,
        "eval/classifier_low": 0.01,
        "eval/function_delta": 0.0,
        "eval/kl_per_token": 0.4,
        "eval/distinct_2_ratio": 0.9,
    },
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that passes, whose answers the untouched model finds a little less likely."""
    monkeypatch.setattr(proof, "english", lambda folder: (-2.0, -2.2))
    return write_runs(tmp_path / "proof-films-0", GOOD)


def test_a_good_run_passes(folder: Path) -> None:
    assert failed(proof.check_run(folder)) == []
    assert proof.main(["--check-only", "--seeds", "0", "--runs", str(folder.parent)]) == 0


@pytest.mark.parametrize(
    ("stage", "name", "value", "check"),
    [
        ("reward", "eval/accuracy", 0.79, "accuracy on held-out pairs"),
        ("eval", "eval/score_shift_sd", 0.49, "held-out score up"),
        ("eval", "eval/lexicon_low", 0.0, "lexicon judge"),
        ("eval", "eval/classifier_low", -0.01, "classifier judge"),
        ("eval", "eval/function_delta", -0.11, "name what was asked"),
        ("eval", "eval/kl_per_token", 1.01, "KL"),
        ("eval", "eval/distinct_2_ratio", 0.69, "distinct-2"),
        ("grpo", "peak_rss_mb", 8192.0, "peak memory"),
        ("chain", "wall_s", 901.0, "wall time"),
    ],
)
def test_fails_on_each_figure(
    folder: Path, stage: str, name: str, value: float, check: str
) -> None:
    change_summary(folder, stage, name, value)
    (wrong,) = failed(proof.check_run(folder))
    assert check in wrong


def test_fails_on_a_gap_and_on_unlikely_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_step(folder, 3, "rollout/logprob_gap", 1e-3, "grpo")
    monkeypatch.setattr(proof, "english", lambda folder: (-2.0, -2.31))
    wrong = failed(proof.check_run(folder))
    assert len(wrong) == 2 and any("untouched model" in name for name in wrong)


def test_answers_without_samples_are_no_run(tmp_path: Path) -> None:
    with pytest.raises(MissingRun, match=r"samples\.jsonl: no such file"):
        proof.english(tmp_path)


def test_mean_logprob_counts_the_answers_tokens_alone() -> None:
    """A model whose logits say that a token is followed by itself with probability 3/4 of 2."""

    class Repeats(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> Any:
            likely = torch.nn.functional.one_hot(input_ids, 2).float()
            return SimpleNamespace(logits=likely * math.log(3.0))

    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [int(letter) for letter in text]}

    texts = [("0", "00"), ("1010", "1"), ("0", "")]
    expected = (2 * math.log(3 / 4) + math.log(1 / 4)) / 3
    assert proof.mean_logprob(Repeats(), tokenizer, texts) == pytest.approx(expected)
    assert math.isnan(proof.mean_logprob(Repeats(), tokenizer, [("0", "")]))


def test_the_experiment_is_what_the_proof_runs() -> None:
    chain = config.compose(["stage=chain", f"experiment={proof.EXPERIMENT}"])
    assert tuple(chain.stage.stages) == proof.STAGES
    evaluation = config.compose(["stage=eval", f"experiment={proof.EXPERIMENT}"])
    assert evaluation.stage.after == "runs/films/grpo/model"


def test_english_reads_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"prompt": "p", "response_before": "old", "response": "new"}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "samples.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(proof, "load_tokenizer", lambda source: None)
    monkeypatch.setattr(proof, "load_causal_lm", lambda source, tokenizer: torch.nn.Identity())
    asked = []
    monkeypatch.setattr(
        proof,
        "mean_logprob",
        lambda model, tokenizer, texts: float(len(asked.extend(texts) or asked)),
    )
    assert proof.english(tmp_path) == (1.0, 2.0) and asked == [("p", "old"), ("p", "new")]
