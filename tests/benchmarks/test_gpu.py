"""benchmarks/gpu.sh: figures by hand, a part that fails, no time left; and all of it, tiny."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import device, models, trials
from benchmarks.gpu.trials import Outcome, Trial
from benchmarks.shared import ROOT
from rlhf.cli import config

GRPO = Trial("grpo", "tiny", "vllm")
NOTES = {"parameters": 1000, "plan_gib": 2.0, "allocated_gib": 1.5}


def line(update: float, tokens: float = 60.0, gap: float = 1e-4) -> dict[str, float]:
    return {
        "time/step_s": 10.0,
        "time/rollout_s": 2.0,
        "time/update_s": update,
        "time/sync_s": 0.5,
        "rollout/response_tokens": tokens,
        "rollout/tokens_per_s": tokens / 2.0,
        "rollout/logprob_gap": gap,
        "rollout/probe_gap": 1e-7,
    }


def test_figures_by_hand() -> None:
    rows = [line(9.0, gap=1.0), line(9.0), {"judge/wins": 1.0}, line(4.0), line(1.0, gap=2e-4)]
    found = trials.figures_of(rows, NOTES, GRPO, 10.0, {"sheet": None, "matmul": 1e6})
    # 60 response tokens and 4 prompts of 10 tokens; steps of 4 and 1 s
    assert found["update_tokens_per_s"] == (100 / 4 + 100 / 1) / 2
    assert found["generation_tokens_per_s"] == 30.0 and found["step_s"] == 10.0
    assert found["mfu_matmul"] == pytest.approx(6 * 1000 * (25 + 100) / 2 / 1e6)
    assert found["mfu_sheet"] is None and found["gap"] == 2e-4
    assert (found["allocated_gib"], found["reserved_gib"]) == (1.5, None)
    ppo = trials.figures_of(rows, NOTES, Trial("ppo", "tiny", "vllm"), 10.0, {"matmul": 1e6})
    assert ppo["mfu_matmul"] == pytest.approx(2 * (found["mfu_matmul"] or 0.0)), "a critic"
    with pytest.raises(ValueError, match="2 steps"):
        trials.figures_of(rows[:2], NOTES, GRPO, 10.0, {})
    stale = {name: value for name, value in line(4.0).items() if "logprob_gap" not in name}
    assert trials.gap_of(stale) == 1e-7, "older weights wrote all tokens"
    assert trials.gap_problem(found) is None
    assert "nan" in str(trials.gap_problem({"gap": float("nan")}))


@pytest.mark.parametrize("trial", trials.TRIALS, ids=lambda trial: trial.name)
def test_each_trial_composes_to_what_its_name_says(trial: Trial, tmp_path: Path) -> None:
    given = trials.options(trial, tmp_path, tmp_path / "p.jsonl", tmp_path, cuda=True)
    cfg = config.compose(given)
    backend = trial.rollout if trial.rollout in ("vllm", "hf") else "server"
    assert (cfg.stage.name, cfg.rollout.backend.value) == (trial.stage, backend)
    assert cfg.model.dtype.value == "bfloat16"
    assert cfg.stage.ahead == int(trial.rollout == "ahead")
    assert cfg.stage.steps == trials.FULL["steps"] and cfg.rollout.max_response_length == 256


def test_trials_are_chosen_by_words_and_each_kind_once_when_tiny() -> None:
    assert trials.chosen([], small=False) == list(trials.TRIALS)
    small = [trial.name for trial in trials.chosen([], small=True)]
    assert small == list(dict.fromkeys(small)) and "ppo-tiny-server" in small
    assert {"grpo-tiny-vllm", "grpo-tiny-server", "grpo-tiny-ahead", "ppo-tiny-vllm"} <= set(small)
    assert [t.name for t in trials.chosen(["0.5b"], small=False)] == ["grpo-0.5b-vllm"]


def test_the_sizes_are_what_their_names_say() -> None:
    tokenizer = SimpleNamespace(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    bounds = {"135m": (130e6, 140e6), "0.5b": (0.45e9, 0.55e9), "1.5b": (1.5e9, 1.6e9)}
    for size, (least, most) in bounds.items():
        with torch.device("meta"):
            model = LlamaForCausalLM(models.config_of(size, tokenizer))
        assert least < sum(p.numel() for p in model.parameters()) < most


def test_known_devices() -> None:
    assert device.sheet_tflops("NVIDIA H200") == 989.0
    assert device.sheet_tflops("NVIDIA L40S") == 362.0
    assert device.sheet_tflops("NVIDIA L4") == 121.0
    assert device.sheet_tflops("CPU") is None
    assert device.proportional_mib(os.getpid()) > 1.0


def test_a_call_that_outlasts_the_time_leaves_nothing_behind(tmp_path: Path) -> None:
    runner = gpu.Runner(tmp_path, 0.0)
    mark = str(tmp_path / "in")  # by which the processes are known
    sleeper = f"import time; {mark!r}; time.sleep(60)"
    starter = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {sleeper!r}])"
    began = time.monotonic()
    problem = runner.call([sys.executable, "-S", "-c", starter], tmp_path / "log")
    assert "out of time" in problem and time.monotonic() - began < 30
    time.sleep(0.2)
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if _reads(p, mark)]
    assert left == []


def _reads(path: Path, word: str) -> bool:
    try:
        return word.encode() in path.read_bytes()
    except OSError:
        return False


@pytest.fixture
def no_runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A device that is a CPU, and trials that do what this says of them."""
    said: dict[str, Any] = {}

    def look(self: gpu.Runner) -> str:
        self.device = {"cuda": False, "name": "CPU", "matmul_tflops": 0.1}
        return ""

    def run(self: gpu.Runner, trial: Trial) -> Outcome:
        return Outcome(trial, 1.0, said.get(trial.name, []), {"step_s": 1.0, "gap": 1e-6})

    monkeypatch.setattr(gpu.Runner, "look_at_device", look)
    monkeypatch.setattr(gpu.Runner, "run", run)
    return said


def test_a_trial_that_fails_leaves_the_others_and_the_exit_code_says_so(
    tmp_path: Path,
    no_runs: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TINY", "1")
    assert gpu.main(["--out", str(tmp_path)]) == 0
    capsys.readouterr()
    no_runs["grpo-tiny-vllm"] = ["exit code 1: broken"]
    assert gpu.main(["--out", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    held = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert json.loads(next(text for text in lines if text.startswith("{"))) == held
    assert len(held["trials"]) == len(trials.chosen([], small=True))
    assert [one["name"] for one in held["trials"] if one["problems"]] == ["grpo-tiny-vllm"]
    assert any(text.startswith("| grpo-tiny-vllm (failed) |") for text in lines)
    assert any(text.startswith("| ppo-tiny-server | 1.00 |") for text in lines)
    assert gpu.main(["--out", str(tmp_path), "--only", "nothing"]) == 1


def test_without_a_device_only_tiny_models_run(
    tmp_path: Path,
    no_runs: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("TINY", raising=False)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert "TINY=1" in capsys.readouterr().err


def test_a_trial_without_time_is_not_tried(tmp_path: Path) -> None:
    outcome = gpu.Runner(tmp_path, gpu.LEAST_S - 1).run(GRPO)
    assert "not tried" in outcome.problems[0] and not outcome.figures
    assert gpu.row(outcome)[:2] == ["grpo-tiny-vllm", "failed"]


@pytest.mark.full
@pytest.mark.vllm
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["grpo-tiny-vllm", "ppo-tiny-server", "grpo-tiny-ahead"])
def test_the_script_runs_tiny_on_the_cpu(tmp_path: Path, name: str) -> None:
    env = {**os.environ, "TINY": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--only", name, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    (trial,) = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["trials"]
    figures = trial["figures"]
    assert figures["generation_tokens_per_s"] > 0 and 0 < figures["mfu_matmul"] < 1
    assert figures["gap"] < 1e-3 and figures["used_gib"] > 0.1 and figures["plan_gib"] > 0.1
    assert f"| {name} |" in done.stdout
