"""Every preset composes; unknown keys, bad values and missing stages are refused with the
remedy.
"""

import itertools
import subprocess
import sys

import pytest

from conf.choices import EngineKind
from conf.stages import STAGES
from rlhf.__main__ import list_stages, main
from rlhf.cli import config
from rlhf.types import UserError

_OPTIONAL_GROUPS = [g for g in config.GROUPS if g not in ("stage", "experiment")]
_PRESETS = [(group, name) for group in _OPTIONAL_GROUPS for name in config.choices(group)]


@pytest.mark.parametrize("stage", config.choices("stage"))
def test_every_stage_composes_to_its_own_schema(stage: str) -> None:
    cfg = config.compose([f"stage={stage}"])
    assert type(cfg.stage) is STAGES[config.stage_schema(stage)]
    assert cfg.stage.name == stage


@pytest.mark.parametrize(("group", "name"), _PRESETS)
def test_every_preset_of_every_group_composes(group: str, name: str) -> None:
    cfg = config.compose(["stage=ppo", f"{group}={name}"])
    kinds = {
        "model": cfg.model.kind,
        "adapter": cfg.adapter.kind,
        "tracking": cfg.tracking.kind,
        "rollout": cfg.rollout.backend,
    }
    if group in kinds:
        assert kinds[group].value == name
    if group == "engine":
        assert name == (
            "torch" if cfg.engine.kind is EngineKind.torch else f"zero{cfg.engine.zero_stage}"
        )


@pytest.mark.parametrize(
    ("experiment", "stage"),
    itertools.product(config.choices("experiment"), config.choices("stage")),
)
def test_every_experiment_composes_with_every_stage(experiment: str, stage: str) -> None:
    cfg = config.compose([f"experiment={experiment}", f"stage={stage}"])
    assert cfg.run.name == experiment


def test_experiment_settings_belong_to_one_stage_and_yield_to_the_command_line() -> None:
    assert (
        config.compose(["stage=sft", "experiment=reviews"]).data.path
        == "runs/reviews/recipe/sft.jsonl"
    )
    assert (
        config.compose(["stage=ppo", "experiment=reviews"]).data.path
        == "runs/reviews/recipe/prompts.jsonl"
    )
    assert (
        config.compose(["stage=ppo", "experiment=reviews", "run.name=x"]).model.path
        == "runs/x/sft/model"
    )
    assert (
        config.compose(["stage=ppo", "experiment=reviews", "data.path=mine.jsonl"]).data.path
        == "mine.jsonl"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["stage=ppo", "stage.kl_coeff=1"],
            "stage.kl_coeff: no such option of stage=ppo. Nearest: stage.kl_coef.",
        ),
        (["stage=ppo", "+stage.kl_coeff=1"], "Nearest: stage.kl_coef."),
        (["stage=ppo", "++modle.path=x"], "Nearest: model.path."),
        (["stage=sft", "stage.kl_coef=1"], "stage.kl_coef: no such option of stage=sft."),
        (["stage=pp"], "no such stage"),
        (["stage=ppo", "engine=zero4"], "Nearest: engine=zero3."),
        (["stage=ppo", "engien=zero3"], "Nearest: engine."),
        (["stage=ppo", "~model"], "can't be deleted"),
        (["stage=ppo", "stage.steps=many"], "could not be converted to Integer"),
        (["stage=ppo", "stage.kl_controller=adaptiv"], "adaptive"),
    ],
)
def test_bad_overrides_name_the_key_and_the_nearest_valid_one(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError) as error:
        config.compose(overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("stage.gamma=1.5", "stage.gamma"),
        ("stage.steps=0", "stage.steps"),
        ("stage.kl_coef=-0.1", "stage.kl_coef"),
        ("stage.minibatches=3", "stage.minibatches"),
        ("rollout.temperature=0", "rollout.temperature"),
        ("rollout.top_p=0", "rollout.top_p"),
        ("adapter.rank=0", "adapter.rank"),
        ("engine.offload=cpu", "engine.offload"),
        ("run.name=../up", "run.name"),
        ("run.name=/tmp/x", "run.name"),
        ("run.name=.", "run.name"),
        ("model.gguf_file=../x.gguf", "model.gguf_file"),
        ("data.eval_fraction=1", "data.eval_fraction"),
    ],
)
def test_ranges_are_checked_when_the_config_becomes_dataclasses(override: str, key: str) -> None:
    with pytest.raises(UserError, match=f"{key}=.*out of range"):
        config.compose(["stage=ppo", override])


def test_without_a_stage_the_stages_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert out.strip() == list_stages()
    assert all(f"stage={name}" in out for name in STAGES)
    assert main(["model=tiny"]) == 2


def test_cfg_job_prints_the_resolved_options() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", "stage=ppo", "--cfg", "job", "stage.kl_coef=0.125"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "kl_coef: 0.125" in done.stdout and "prompts_per_step: 64" in done.stdout


def test_multirun_runs_each_job_in_its_own_run_directory(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n' * 8, encoding="utf-8")
    arguments = [
        "-m",
        "stage=ppo",
        "model=tiny",
        f"run.dir={tmp_path}",
        "run.name=sweep",
        f"data.path={tmp_path}/rows.jsonl",
        "run.dry_run=true",
    ]
    arguments += [
        "stage.kl_coef=0.0625,0.125",
        "reward.function=operator:truth",
        "stage.critic_init=policy",
        "rollout=hf",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "name: sweep-0" in done.stdout and "name: sweep-1" in done.stdout
    assert "kl_coef: 0.0625" in done.stdout and "kl_coef: 0.125" in done.stdout
    assert done.stdout.count("group: sweep-sweep") == 2


def test_an_error_on_the_command_line_is_one_line_without_a_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", "stage=ppo", "stage.gamma=2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert (
        done.stderr.strip().startswith("error: stage.gamma=2.0 is out of range")
        and "Traceback" not in done.stderr
    )
