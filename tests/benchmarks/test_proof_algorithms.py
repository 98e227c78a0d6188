"""The proof of the online algorithms: it runs each from the same start, and fails on every single
figure that is off.
"""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.proofs import algorithms as proof_algorithms
from benchmarks.proofs.algorithms import ALGORITHMS, ProofRuns, check_algorithm, compare
from benchmarks.proofs.common import read_run
from rlhf.cli import config
from tests.benchmarks.test_proofs import change_summary, failed

GOOD = {
    "eval/score_shift_sd": 1.4,
    "eval/lexicon_delta": 0.1,
    "eval/lexicon_low": 0.02,
    "eval/lexicon_high": 0.2,
    "eval/classifier_delta": 0.05,
    "eval/classifier_low": 0.01,
    "eval/classifier_high": 0.09,
    "eval/kl_per_token": 0.4,
    "eval/distinct_2_ratio": 0.9,
}


def write_run(folder: Path, metrics: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(
        json.dumps(
            {
                "stage": folder.name,
                "steps": 80,
                "wall_s": 123.4,
                "peak_rss_mb": 1.0,
                "metrics": metrics,
            }
        )
    )
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')


def write_all(runs: Path) -> ProofRuns:
    """The runs of a proof that passes."""
    plan = ProofRuns(runs, 0)
    for algorithm in ALGORITHMS:
        write_run(plan.folder / algorithm, {})
        write_run(plan.evaluation(algorithm), GOOD)
    return plan


def check_only(runs: Path) -> int:
    return proof_algorithms.main(["--check-only", "--runs", str(runs)])


def test_good_runs_pass_and_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = write_all(tmp_path)
    assert [len(check_algorithm(read_run(plan.evaluation(a)))) for a in ALGORITHMS] == [4, 4, 4, 4]
    assert check_only(tmp_path) == 0
    out = capsys.readouterr().out
    assert all(algorithm in out for algorithm in ALGORITHMS)
    assert (
        out.count("+0.100 [+0.020, +0.200]") == 4
        and out.count("+1.40") == 4
        and out.count(" 123 ") == 4
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("name", "value", "check"),
    [
        ("eval/score_shift_sd", 0.99, "held-out score"),
        ("eval/score_shift_sd", float("nan"), "held-out score"),
        ("eval/lexicon_low", 0.0, "lexicon"),
        ("eval/classifier_low", -0.01, "classifier"),
        ("eval/kl_per_token", 1.01, "KL"),
    ],
)
def test_each_figure_of_each_algorithm_can_fail_it(
    tmp_path: Path, algorithm: str, name: str, value: float, check: str
) -> None:
    plan = write_all(tmp_path)
    change_summary(tmp_path / f"proof-algorithms-{algorithm}", "eval", name, value)
    wrong = failed(check_algorithm(read_run(plan.evaluation(algorithm))))
    assert len(wrong) == 1 and check in wrong[0]
    assert check_only(tmp_path) == 1


def test_what_is_missing_is_named_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = write_all(tmp_path)
    (plan.folder / "rloo" / "summary.json").unlink()
    (plan.evaluation("dapo") / "metrics.jsonl").unlink()
    assert check_only(tmp_path) == 1
    said = capsys.readouterr()
    assert "rloo: " in said.err and "rloo/summary.json: no such file" in said.err
    assert (
        "dapo: " in said.err
        and "proof-algorithms-dapo/eval/metrics.jsonl: no such file" in said.err
    )
    console = Console(width=130, record=True, file=io.StringIO())
    compare(plan, ALGORITHMS, console)
    shown = console.export_text()
    assert "rloo" in shown and shown.count("+1.40") == 2


class Commands:
    """Stands in for the processes: notes them, and ends one of them with an error."""

    def __init__(self, fails: str | None = None) -> None:
        self.given: list[list[str]] = []
        self.fails = fails

    def __call__(self, command: list[str], check: bool, **_: Any) -> Any:
        assert command[1:3] == ["-m", "rlhf"] and not check
        self.given.append(command[3:])
        return type(
            "Done",
            (),
            {"returncode": 3 if self.fails in (command[3], f"{command[3]} {command[7]}") else 0},
        )


def test_commands_are_those_of_a_user_and_compose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = write_all(tmp_path)
    commands = Commands()
    monkeypatch.setattr("subprocess.run", commands)
    assert proof_algorithms.main(["--seed", "4", "--runs", str(tmp_path), "tracking=none"]) == 0
    stages = [given[0].removeprefix("stage=") for given in commands.given]
    assert stages == [
        "sft",
        "reward",
        "grpo",
        "eval",
        "rloo",
        "eval",
        "dapo",
        "eval",
        "online_dpo",
        "eval",
    ]
    for given in commands.given:
        cfg = config.compose(given)
        assert cfg.run.seed == 4 and cfg.run.overwrite and cfg.tracking.kind.value == "none"
        trained = (
            cfg.stage.name
            if cfg.stage.name != "eval"
            else cfg.run.name.removeprefix("proof-algorithms-")
        )
        if cfg.stage.name == "eval":
            assert Path(cfg.run.dir) / cfg.run.name / "eval" == plan.evaluation(trained)
            assert (
                cfg.stage.before == cfg.model.path == f"{plan.folder}/sft/model"
                and cfg.stage.after == f"{plan.folder}/{trained}/model"
            )
            assert (
                cfg.stage.judge_path == f"{plan.folder}/recipe/judge.jsonl"
                and cfg.data.eval_path == f"{plan.folder}/recipe/prompts_eval.jsonl"
            )
            assert [judge.value for judge in cfg.stage.judges] == list(proof_algorithms.JUDGES)
        else:
            assert Path(cfg.run.dir) / cfg.run.name / cfg.stage.name == plan.folder / trained
        if cfg.stage.name in ("eval", *ALGORITHMS):
            assert cfg.reward.path == f"{plan.folder}/reward/model"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_experiment_sets_each_algorithm_s_own_data_and_size(algorithm: str) -> None:
    cfg = config.compose([f"stage={algorithm}", "experiment=reviews", "run.name=x"])
    assert (cfg.model.path, cfg.reward.path, cfg.data.path) == (
        "runs/x/sft/model",
        "runs/x/reward/model",
        "runs/x/recipe/prompts.jsonl",
    )
    size = cfg.stage.prompts_per_step * cfg.stage.samples_per_prompt
    assert size == (64 if algorithm == "online_dpo" else 128) and cfg.stage.steps == 80
    assert (
        cfg.rollout.max_response_length
        == config.compose(["stage=eval", "experiment=reviews"]).rollout.max_response_length
    )


def test_a_failed_algorithm_fails_the_proof_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_all(tmp_path)
    for fails, ran in (
        ("stage=rloo", 9),
        ("stage=eval run.name=proof-algorithms-rloo", 10),
        ("stage=sft", 1),
    ):
        commands = Commands(fails)
        monkeypatch.setattr("subprocess.run", commands)
        assert proof_algorithms.main(["--runs", str(tmp_path)]) == 1, (
            "whatever an earlier run left behind"
        )
        assert len(commands.given) == ran
        assert "ended with exit code 3" in capsys.readouterr().err


def test_some_algorithms_use_the_policy_and_reward_model_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all(tmp_path)
    commands = Commands()
    monkeypatch.setattr("subprocess.run", commands)
    assert proof_algorithms.main(["--runs", str(tmp_path), "--algorithms", "dapo"]) == 0
    assert [given[0] for given in commands.given] == ["stage=dapo", "stage=eval"]
