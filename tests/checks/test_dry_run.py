"""run.dry_run: the launch command, the arithmetic, the first rows as tokens and the memory plan,
from a directory without weights.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from conf.choices import EngineKind, RolloutBackend, TrackingKind
from conf.schema import (
    Config,
    DataConfig,
    EngineConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TrackingConfig,
)
from conf.stages import DataStage, OnlineStage, SFTStage
from policy.engines import torch as policy_engine
from rlhf.__main__ import execute
from rlhf.checks.arithmetic import offline_arithmetic, online_arithmetic
from rlhf.checks.launch import plan_batches
from rlhf.cli import config
from rlhf.run.console import console
from rlhf.run.context import RunContext
from rlhf.stages import dry_run
from rlhf.stages import online as online_stage
from rlhf.stages import rows as stage_rows
from rlhf.types import UserError
from tests import toys
from tests.checks.test_conflicts import model_directory
from tests.offline import trl_tools
from tests.online import test_online

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def grpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A model's directory with a configuration and a tokenizer, but no weights; to load some would
    fail in any case.
    """

    def refused(*args: Any, **options: Any) -> None:
        pytest.fail("a dry run loads weights")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refused)
    monkeypatch.setattr(safetensors.torch, "load_file", refused)
    monkeypatch.setattr(torch, "load", refused)
    monkeypatch.setenv("COLUMNS", "200")
    console.cache_clear()
    model_directory(tmp_path / "policy")
    rows = [{"prompt": f"the film {i}", "chosen": "good", "rejected": "film"} for i in range(40)]
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    return Config(
        stage=replace(
            config.stage_preset("grpo"), prompts_per_step=8, samples_per_prompt=8, steps=100
        ),
        run=RunConfig(dir=str(tmp_path / "runs"), name="r", dry_run=True),
        model=ModelConfig(path=str(tmp_path / "policy")),
        reward=RewardConfig(function="tests.toys:short_is_good"),
        rollout=RolloutConfig(backend=RolloutBackend.hf, max_response_length=toys.RESPONSE_LENGTH),
        data=DataConfig(path=str(tmp_path / "p.jsonl"), max_prompt_length=toys.PROMPT_LENGTH),
        tracking=TrackingConfig(kind=TrackingKind.none),
    )


def shown(cfg: Config, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    execute(cfg, argv)
    return capsys.readouterr().out


def test_an_online_stage_shows_all_and_loads_and_writes_nothing(
    grpo: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(p.name for p in tmp_path.rglob("*"))
    assert not any(name.endswith((".safetensors", ".bin")) for name in before)
    out = shown(
        grpo,
        capsys,
        "stage=grpo",
        "run.dry_run=true",
        "data.path=a b.jsonl",
        "tracking.api_key=abcdef123",
    )
    assert "name: grpo" in out  # the resolved configuration
    assert "launch: python -m rlhf stage=grpo 'data.path=a b.jsonl' 'tracking.api_key=***'\n" in out
    assert (
        "8 prompts x 8 samples = 64, all on one rank" in out
        and "100 (stage.steps), 100 optimizer steps, 6400 responses" in out
    )
    assert len(re.findall(r"p\.jsonl, row \d+", out)) == 2 and "the film" in out
    assert "memory plan" in out and "reference" in out and "usable on each rank: fits" in out
    assert out.rstrip().endswith("no weights were loaded.")
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("preset", ["dpo", "reward", "kto", "sft"])
def test_offline_stages(
    preset: str, grpo: Config, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if preset == "sft":
        rows = [{"prompt": f"the film {i} ", "completion": "good"} for i in range(40)]
        (tmp_path / "p.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    stage = replace(config.stage_preset(preset), batch_size=8)
    out = shown(replace(grpo, stage=stage, reward=RewardConfig()), capsys)
    assert "8 rows x 1 micro-batches x 1 rank = 8 (stage.batch_size)" in out
    assert "memory plan" in out and ".jsonl, row " in out and "of a response" in out
    if preset == "sft":
        engine = EngineConfig(kind=EngineKind.deepspeed, zero_stage=2, gpus=8, sequence_parallel=4)
        out = shown(replace(grpo, stage=stage, reward=RewardConfig(), engine=engine), capsys)
        assert "4 rows x 1 micro-batches x 2 x 4 ranks that share rows = 8" in out


def test_several_devices_are_launched_by_torchrun_and_share_the_work(
    grpo: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = replace(
        grpo,
        engine=EngineConfig(kind=EngineKind.deepspeed, zero_stage=2, gpus=8, gpu_memory_gib=24.0),
    )
    out = shown(cfg, capsys, "stage=grpo", "engine=zero2", "engine.gpus=8")
    assert (
        "launch: torchrun --standalone --nproc_per_node 8 -m rlhf stage=grpo engine=zero2 "
        "engine.gpus=8\n" in out
    )
    assert (
        "8 prompts x 8 samples = 64, 8 on each of 8 ranks" in out
        and "GiB per device" in out
        and "22.8 usable on each device: fits" in out
    )


def test_ranks_that_share_rows_are_told_of_and_refused_by_name(
    grpo: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = EngineConfig(
        kind=EngineKind.deepspeed, zero_stage=2, gpus=8, gpu_memory_gib=24.0, sequence_parallel=2
    )
    cfg = replace(grpo, engine=engine)
    out = shown(cfg, capsys)
    assert "shared by 2 ranks (engine.sequence_parallel)" in out
    assert "8 on each of 8 ranks" in out  # responses are each rank's own
    with pytest.raises(UserError, match=r"engine\.sequence_parallel=3.*engine\.gpus=8"):
        shown(replace(cfg, engine=replace(engine, sequence_parallel=3)), capsys)
    stage = replace(config.stage_preset("dpo"), batch_size=8)
    with pytest.raises(UserError, match=r"engine\.sequence_parallel=2.*stage=dpo"):
        shown(replace(cfg, stage=stage, reward=RewardConfig()), capsys)


def test_rows_that_do_not_fit_end_a_dry_run_without_a_file(grpo: Config, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"prompt": f"the film {i}"}) + "\n" for i in range(80))
    # beyond the rows that preflight looks at
    (tmp_path / "p.jsonl").write_text(rows + '{"promt": "y"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="1 of 81 rows don't fit"):
        execute(grpo, [])
    assert not (tmp_path / "runs").exists()


def test_stages_that_do_not_train_only_compose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run.show(Config(stage=DataStage()), [])
    out = capsys.readouterr().out
    # the group of that name stands alone on its line
    assert "launch: " not in out and "dry run: stage=data composes" in out


def test_online_arithmetic(grpo: Config) -> None:
    stage = OnlineStage(
        steps=10, prompts_per_step=16, samples_per_prompt=4, epochs=2, minibatches=2
    )
    cfg = replace(grpo, stage=stage, engine=EngineConfig(micro_tokens=1000))
    longest = cfg.data.max_prompt_length + cfg.rollout.max_response_length
    found = online_arithmetic(cfg.stage, cfg.engine.micro_tokens, longest, ranks=4, prompts=80)
    assert found["responses of a step"] == "16 prompts x 4 samples = 64, 16 on each of 4 ranks"
    assert found["optimizer steps of a step"] == "2 epochs x 2 minibatches = 4"
    assert found["rows of an optimizer step"].endswith("= 8 on each")
    # 8 rows by threes
    assert found["micro-batches"].startswith(
        "at most 3 of 3 rows on each rank: 1000 tokens (engine.micro_tokens) / 320"
    )
    assert found["steps"] == "10 (stage.steps), 40 optimizer steps, 640 responses"
    assert found["data"] == "160 prompts drawn from 80: 2 passes"


@pytest.mark.parametrize(("rows", "steps", "expected"), [(100, None, 6), (100, 5, 5), (3, None, 2)])
def test_offline_arithmetic_is_the_trainers(rows: int, steps: int | None, expected: int) -> None:
    stage: Any = SFTStage(batch_size=32, epochs=2.0, steps=steps)
    found = offline_arithmetic(
        stage, plan_batches(32, EngineConfig(micro_batch_size=4), 2), rows, rows
    )
    assert found["rows of a step"] == "4 rows x 4 micro-batches x 2 ranks = 32 (stage.batch_size)"
    assert found["steps"].startswith(f"{expected} (")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("preset", ["ppo", "grpo"])
def test_two_ranks_print_once(preset: str, grpo: Config, tmp_path: Path) -> None:
    """The command line under torchrun with ZeRO-3: one rank prints, both look."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "rlhf",
    ]
    options = [
        f"stage={preset}",
        "engine=zero3",
        "rollout=hf",
        "tracking=none",
        "run.dry_run=true",
        f"run.dir={tmp_path / 'runs'}",
    ]
    options += [
        f"model.path={grpo.model.path}",
        f"data.path={grpo.data.path}",
        "reward.function=tests.toys:short_is_good",
        "stage.prompts_per_step=8",
    ]
    options += ["stage.critic_init=policy"] if preset == "ppo" else []
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "160",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    done = subprocess.run(
        [*launcher, *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for once in (
        "launch: torchrun --standalone --nproc_per_node 2 -m rlhf",
        "memory plan",
        f"dry run: stage={preset} composes",
    ):
        assert done.stdout.count(once) == 1, once
    assert len(re.findall(r"\.jsonl, row \d+", done.stdout)) == 2
    assert (
        "4 on each of 2 ranks" in done.stdout
        if preset == "ppo"
        else "32 on each of 2 ranks" in done.stdout
    )
    assert not (tmp_path / "runs").exists()


# ---- the figures against runs ----


def steps_shown(cfg: Config, capsys: pytest.CaptureFixture[str]) -> int:
    """The number of steps that a dry run of `cfg` prints."""
    out = shown(replace(cfg, run=replace(cfg.run, dry_run=True)), capsys)
    return int(re.search(r"steps\s*│\s*(\d+) \(", out)[1])  # type: ignore[index]


LIMITS = {"sft": 32, "packed": 32}
ROWS: dict[str, Any] = {
    "sft": trl_tools.sft_rows,
    "packed": trl_tools.sft_rows,
    "reward": trl_tools.pair_rows,
    "dpo": trl_tools.pair_rows,
    "kto": trl_tools.pair_rows,
}


@pytest.mark.parametrize(
    "name",
    [
        "packed",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sft", "reward", "dpo", "kto")),
    ],
)
def test_offline_steps_are_the_trainers_own(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One pass over rows of which some are too long: what is printed before is what the trainer has
    counted after.
    """
    monkeypatch.setenv("COLUMNS", "200")
    console.cache_clear()
    preset = config.stage_preset("sft" if name == "packed" else name)
    stage = replace(
        preset,
        epochs=1.0,
        steps=None,
        batch_size=4,
        eval_steps=100,
        max_length=LIMITS.get(name, 10),
    )
    if name == "packed":
        stage = replace(stage, packing=True)
    cfg = trl_tools.config(stage, tmp_path, name, ROWS[name]())
    expected = steps_shown(cfg, capsys)
    module = {"packed": "sft", "dpo": "preference", "kto": "preference"}.get(name, name)
    ctx = RunContext.open(cfg)
    importlib.import_module(f"rlhf.stages.{module}").run(ctx, stage_rows)
    done = max(line["step"] for line in trl_tools.metric_lines(ctx.dir))
    assert done == expected == json.loads((ctx.dir / "summary.json").read_text())["steps"]
    read = len(ROWS[name]()) * 4 // 5 * (2 if name == "kto" else 1)
    # rows were left out, or packed, so that the file's rows alone would have given another number
    assert name == "sft" or expected != read // 4


def test_online_updates_are_those_that_were_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    console.cache_clear()
    made = [
        "stage.samples_per_prompt=2",
        "stage.minibatches=2",
        "stage.epochs=3",
        "stage.steps=2",
        "rollout.max_response_length=2",
    ]
    overrides = [
        "stage=ppo",
        *test_online.TINY,
        *made,
        "engine.micro_tokens=70",
        "stage.prompts_per_step=4",
        "stage.critic_init=policy",
    ]
    rows = toys.write_jsonl(tmp_path / "prompts.jsonl", toys.prompt_rows())
    given = [
        f"run.dir={tmp_path}",
        f"data.path={rows}",
        "reward.function=tests.toys:even_first_token",
        "rollout=hf",
        "tracking=none",
    ]
    cfg = config.compose([*overrides, *given])
    out = shown(replace(cfg, run=replace(cfg.run, dry_run=True)), capsys)
    counted = []
    step = policy_engine.TorchEngine.step

    def counting(self: policy_engine.TorchEngine) -> float:
        counted.append(type(self.module).__name__)
        return step(self)

    monkeypatch.setattr(policy_engine.TorchEngine, "step", counting)
    online_stage.run(RunContext.open(cfg, ()), stage_rows)
    lines = trl_tools.metric_lines(tmp_path / "default" / "ppo")
    updates = sum(line["policy/updates"] for line in lines)
    assert f"3 epochs x 2 minibatches = {counted.count('PolicyModule') // 2}" in out
    assert (
        f"2 (stage.steps), {updates:.0f} optimizer steps, 16 responses" in out
        and updates == counted.count("PolicyModule") == 12
    )
    assert counted.count("CriticModule") == 12
    assert sum(line["rollout/trained_responses"] for line in lines) == 16
