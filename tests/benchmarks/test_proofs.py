"""The proofs read run directories and fail on every single figure that is off."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.proofs import ahead as proof_ahead
from benchmarks.proofs import arithmetic as proof_arithmetic
from benchmarks.proofs import common as proofs
from benchmarks.proofs import reviews as proof_reviews
from benchmarks.proofs import smollm2 as proof_smollm2
from benchmarks.proofs.common import Check, MissingRun
from rlhf.cli import config

GOOD_STEP: dict[str, float] = {
    "objective/scores": 1.0,
    "rollout/logprob_gap": 2e-6,
    "rollout/probe_gap": 2e-6,
    "time/rollout_s": 1.0,
    "time/update_s": 2.0,
    "time/sync_s": 0.05,
    "time/step_s": 3.1,
}
GOOD: dict[str, dict[str, Any]] = {
    "chain": {},
    "sft": {},
    "reward": {"eval/accuracy": 0.8, "eval/length_baseline": 0.51},
    "ppo": {},
    "eval": {
        "eval/score_shift_sd": 1.4,
        "eval/score_low": 0.5,
        "eval/lexicon_low": 0.02,
        "eval/classifier_low": 0.01,
        "eval/function_low": 0.1,
        "eval/kl_per_token": 0.4,
        "eval/distinct_2_ratio": 0.9,
    },
}


GOOD_ARITHMETIC: dict[str, dict[str, Any]] = {
    "chain": {},
    "sft": {},
    "grpo": {},
    "eval": {"eval/function_before": 0.5, "eval/function_after": 0.9, "eval/function_delta": 0.4},
}
ONLINE = ("ppo", "grpo")


def write_runs(folder: Path, good: dict[str, dict[str, Any]] = GOOD) -> Path:
    """The run directories of a chain that passes: both proofs of PPO, or with GOOD_ARITHMETIC that
    of GRPO.
    """
    for stage, metrics in good.items():
        (folder / stage).mkdir(parents=True)
        summary = {
            "stage": stage,
            "steps": 10,
            "wall_s": 500.0 if stage == "chain" else 200.0,
            "peak_rss_mb": 2000.0,
            "metrics": metrics,
        }
        (folder / stage / "summary.json").write_text(json.dumps(summary))
        steps = (
            [{"step": i + 1, **GOOD_STEP, "objective/scores": float(i)} for i in range(10)]
            if stage in ONLINE
            else [{"step": 1}]
        )
        (folder / stage / "metrics.jsonl").write_text(
            "".join(json.dumps(step) + "\n" for step in steps)
        )
    return folder


def change_summary(folder: Path, stage: str, name: str, value: object) -> None:
    path = folder / stage / "summary.json"
    summary = json.loads(path.read_text())
    (summary if name in summary else summary["metrics"])[name] = value
    path.write_text(json.dumps(summary))


def change_step(folder: Path, step: int, name: str, value: object, stage: str = "ppo") -> None:
    path = folder / stage / "metrics.jsonl"
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    steps[step][name] = value
    path.write_text("".join(json.dumps(line) + "\n" for line in steps))


def failed(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if not check.passed]


def test_a_good_run_passes_both_proofs(tmp_path: Path) -> None:
    for number, proof in (("reviews-4", proof_reviews), ("smollm2-4", proof_smollm2)):
        checks = proof.check_run(write_runs(tmp_path / f"proof-{number}"))
        assert failed(checks) == [] and len(checks) >= 7
    assert proof_reviews.main(["--check-only", "--seeds", "4", "--runs", str(tmp_path)]) == 0
    assert proof_smollm2.main(["--check-only", "--seed", "4", "--runs", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("stage", "name", "value", "check"),
    [
        ("eval", "eval/score_shift_sd", 0.99, "held-out score up"),
        ("eval", "eval/lexicon_low", 0.0, "lexicon judge"),
        ("eval", "eval/classifier_low", -0.01, "classifier judge"),
        ("eval", "eval/kl_per_token", 1.01, "KL"),
        ("eval", "eval/distinct_2_ratio", 0.69, "distinct-2"),
        ("reward", "eval/accuracy", 0.749, "accuracy on held-out pairs"),
        ("reward", "eval/length_baseline", 0.6, "longer side"),
        ("reward", "peak_rss_mb", 6144.0, "peak memory"),
        ("chain", "wall_s", 901.0, "wall time"),
        ("eval", "eval/score_shift_sd", float("nan"), "held-out score up"),
    ],
)
def test_reviews_fails_on_each_figure(
    tmp_path: Path, stage: str, name: str, value: float, check: str
) -> None:
    folder = write_runs(tmp_path / "proof-reviews-0")
    change_summary(folder, stage, name, value)
    wrong = failed(proof_reviews.check_run(folder))
    assert len(wrong) == 1 and check in wrong[0]
    assert proof_reviews.main(["--check-only", "--seeds", "0", "--runs", str(tmp_path)]) == 1


@pytest.mark.parametrize(
    ("name", "value", "check"),
    [
        ("rollout/logprob_gap", 1e-4, "logprob_gap"),
        ("time/rollout_s", 0.5, "time/\\*_s"),
        ("time/step_s", 4.0, "time/\\*_s"),
    ],
)
def test_reviews_looks_at_every_step(tmp_path: Path, name: str, value: float, check: str) -> None:
    folder = write_runs(tmp_path)
    change_step(folder, 7, name, value)
    wrong = failed(proof_reviews.check_run(folder))
    assert len(wrong) == 1 and check.replace("\\", "") in wrong[0]


def test_reviews_fails_on_slow_syncs(tmp_path: Path) -> None:
    folder = write_runs(tmp_path)
    for step in range(10):
        change_step(folder, step, "time/sync_s", 0.5)
    assert failed(proof_reviews.check_run(folder)) == ["sync's share of the steps' time"]


@pytest.mark.parametrize(
    ("stage", "name", "value", "check"),
    [
        ("ppo", "steps", 9, "PPO steps"),
        ("reward", "eval/accuracy", 0.7, "accuracy"),
        ("eval", "eval/function_low", 0.0, "verifiable"),
        ("eval", "eval/score_low", 0.0, "held-out score"),
    ],
)
def test_smollm2_fails_on_each_figure(
    tmp_path: Path, stage: str, name: str, value: float, check: str
) -> None:
    folder = write_runs(tmp_path)
    change_summary(folder, stage, name, value)
    wrong = failed(proof_smollm2.check_run(folder))
    assert len(wrong) == 1 and check in wrong[0]


def test_smollm2_fails_on_a_gap_or_a_falling_score(tmp_path: Path) -> None:
    folder = write_runs(tmp_path)
    change_step(folder, 3, "rollout/logprob_gap", 1.1e-3)
    change_step(folder, 9, "rollout/probe_gap", 2e-3)
    change_step(folder, 9, "objective/scores", -100.0)
    assert len(failed(proof_smollm2.check_run(folder))) == 3


def test_a_good_run_passes_the_arithmetic_proof(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_runs(tmp_path / "proof-arithmetic-4", GOOD_ARITHMETIC)
    assert failed(proof_arithmetic.check_run(folder)) == []
    assert proof_arithmetic.main(["--check-only", "--seeds", "4", "--runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "0.5" in shown and "0.9" in shown, "before and after are shown"
    assert (
        proof_arithmetic.main(["--check-only", "--seeds", "4", "5", "--runs", str(tmp_path)]) == 1
    ), "every seed has to pass"


@pytest.mark.parametrize(
    ("stage", "name", "value", "check"),
    [
        ("eval", "eval/function_delta", 0.199, "its rise"),
        ("eval", "eval/function_delta", float("nan"), "its rise"),
        ("eval", "eval/function_before", 0.81, "before GRPO"),
        ("eval", "eval/function_after", 0.19, "after GRPO"),
        ("grpo", "wall_s", 600.5, "wall time of GRPO"),
        ("chain", "wall_s", 600.5, "wall time of the chain"),
    ],
)
def test_arithmetic_fails_on_each_figure(
    tmp_path: Path, stage: str, name: str, value: float, check: str
) -> None:
    folder = write_runs(tmp_path / "proof-arithmetic-0", GOOD_ARITHMETIC)
    change_summary(folder, stage, name, value)
    wrong = failed(proof_arithmetic.check_run(folder))
    assert len(wrong) == 1 and check in wrong[0]
    assert proof_arithmetic.main(["--check-only", "--seeds", "0", "--runs", str(tmp_path)]) == 1


def test_arithmetic_looks_at_the_gap_of_every_step(tmp_path: Path) -> None:
    folder = write_runs(tmp_path, GOOD_ARITHMETIC)
    change_step(folder, 6, "rollout/logprob_gap", 1.1e-3, "grpo")
    assert failed(proof_arithmetic.check_run(folder)) == [
        "largest rollout/logprob_gap of all steps, nats"
    ]


def test_what_is_missing_is_named_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_runs(tmp_path / "proof-reviews-0")
    change_summary(folder, "eval", "eval/kl_per_token", None)
    with pytest.raises(MissingRun, match="has no figure eval/kl_per_token"):
        proof_reviews.check_run(folder)
    change_summary(folder, "eval", "eval/kl_per_token", 0.5)
    change_step(folder, 4, "rollout/logprob_gap", None)
    with pytest.raises(MissingRun, match="has no rollout/logprob_gap at step 5"):
        proof_reviews.check_run(folder)
    (folder / "ppo" / "summary.json").unlink()
    assert proof_reviews.main(["--check-only", "--seeds", "0", "--runs", str(tmp_path)]) == 1
    assert "ppo/summary.json: no such file" in capsys.readouterr().err


def test_proof_runs_the_chain_as_a_user_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def chain(command: list[str], **_: Any) -> Any:
        commands.append(command[1:])
        write_runs(
            tmp_path / command[command.index("experiment=reviews") + 2].removeprefix("run.name=")
        )
        return type("Done", (), {"returncode": 0 if "run.seed=1" in command else 3})

    monkeypatch.setattr("subprocess.run", chain)
    assert proof_reviews.main(["--seeds", "1", "--runs", str(tmp_path), "tracking=none"]) == 0
    expected = [
        "-m",
        "rlhf",
        "stage=chain",
        "experiment=reviews",
        "run.seed=1",
        "run.name=proof-reviews-1",
        f"run.dir={tmp_path}",
    ]
    assert commands == [[*expected, "run.overwrite=true", "tracking=none"]]
    assert proof_reviews.main(["--seeds", "2", "--runs", str(tmp_path)]) == 1, (
        "a chain that fails fails the proof, whatever it left behind"
    )


def test_no_checks_are_no_proof() -> None:
    assert proofs.report("nothing", [], Console(quiet=True)) is False
    assert Check("x", 1.0, low=1.0).passed and not Check("x", 1.0, low=1.0, strict=True).passed


OWN = ("stage.steps=3", "rollout=hf")
GOOD_AHEAD_STEP = {
    "objective/scores": 0.8,
    "ahead/staleness_max": 1.0,
    "ahead/ess": 0.9,
    "time/step_s": 1.0,
}


def write_ahead(folder: Path, seed: int) -> None:
    """The runs of a seed that passes."""
    for ahead in proof_ahead.AHEAD:
        place = write_runs(folder / f"proof-ahead-arithmetic-{seed}-{ahead}", GOOD_ARITHMETIC)
        for step in range(10):
            for name, value in GOOD_AHEAD_STEP.items():
                if ahead or not name.startswith("ahead/"):
                    change_step(place, step, name, value, "grpo")


def test_the_proof_of_stale_responses_fails_on_each_figure_that_is_off(tmp_path: Path) -> None:
    arguments = ["--check-only", "--seeds", "4", "--runs", str(tmp_path), "--tasks", "arithmetic"]
    assert proof_ahead.main(arguments) == 1, "nothing has run"
    write_ahead(tmp_path, 4)
    task = proof_ahead.TASKS["arithmetic"]
    plan = proof_ahead.ProofRuns(tmp_path, task, 4)
    found = {ahead: plan.read(ahead) for ahead in proof_ahead.AHEAD}
    assert failed(proof_ahead.check_seed(task, found)) == []
    assert proof_ahead.main(arguments) == 0
    worse = {
        **found,
        2: dataclasses.replace(found[2], figure=found[0].figure - 0.06, staleness=3.0),
    }
    assert failed(proof_ahead.check_seed(task, worse)) == [
        "ahead=2: eval/function_after",
        "ahead=2: largest staleness",
    ]
    assert failed(proof_ahead.check_means(task, [worse])) == ["ahead=2: eval/function_after, mean"]
    never = {**found, 1: dataclasses.replace(found[1], staleness=0.0, score=0.7)}
    assert failed(proof_ahead.check_seed(task, never)) == [
        "ahead=1: mean score",
        "ahead=1: largest staleness",
    ]
    folder = tmp_path / plan.name(1)
    change_summary(folder, "eval", "eval/function_after", 0.8)
    assert proof_ahead.main(arguments) == 1


def test_the_proof_of_stale_responses_asks_the_judges(tmp_path: Path) -> None:
    task = proof_ahead.TASKS["reviews"]
    turns = proof_ahead.Compared(1.2, 0.5, 0.0, 1.0, 1.0, {"lexicon": 0.1, "classifier": 0.1})
    stale = dataclasses.replace(turns, staleness=1.0)
    assert failed(proof_ahead.check_seed(task, {0: turns, 1: stale})) == []
    worse = dataclasses.replace(stale, figure=0.9, judged={"lexicon": 0.1, "classifier": -0.01})
    assert failed(proof_ahead.check_seed(task, {0: turns, 1: worse})) == [
        "ahead=1: classifier, lower bound",
        "ahead=1: eval/score_shift_sd",
    ]


@pytest.mark.parametrize("name", proof_ahead.TASKS)
def test_the_proof_of_stale_responses_trains_from_one_policy(tmp_path: Path, name: str) -> None:
    task = proof_ahead.TASKS[name]
    commands = list(proof_ahead.ProofRuns(tmp_path, task, 4, OWN).commands())
    stages = [command[3] for command in commands]
    base = [f"stage={stage}" for stage in task.base]
    assert stages == [*base, *["stage=grpo", "stage=eval"] * 3]
    model = f"model.path={tmp_path}/proof-ahead-{name}-4/sft/model"
    assert all(model in command for command in commands[len(base) :])
    trained = [command for command in commands if command[3] == "stage=grpo"]
    assert [f"stage.ahead={n}" in command for n, command in enumerate(trained)] == [True] * 3
    for command in trained:
        options = config.compose(command[3:]).stage
        assert (options.steps, options.learning_rate) == (3, proof_ahead.LEARNING_RATE)
    assert all("rollout=hf" in command for command in commands)
    for command in commands:
        config.compose(command[3:])
