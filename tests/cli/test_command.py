"""The command line: the list, the help, what is printed of a configuration, sweeps, errors; and
what none of them may import.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from conf.schema import Config
from conf.stages import FAMILIES, STAGES
from rlhf.__main__ import main
from rlhf.cli import config, options, presets
from rlhf.cli.options import options_of

HEAVY = ("torch", "transformers", "datasets", "deepspeed", "vllm", "trl", "peft", "pandas", "wandb")


def imported(*arguments: str) -> tuple[set[str], str]:
    """Top-level modules that a command line imported, and what it printed."""
    code = (
        "import json, sys\n"
        "from rlhf.__main__ import main\n"
        "main()\n"
        "names = sorted({name.split('.')[0] for name in sys.modules})\n"
        "print(json.dumps(names), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stderr.splitlines()[-1])), done.stdout


def test_the_list_imports_nothing_heavy() -> None:
    modules, out = imported()
    assert out.strip() == presets.list_stages()
    assert not modules & {*HEAVY, "hydra", "omegaconf", "yaml", "antlr4", "numpy"}


@pytest.mark.parametrize("arguments", [("--help",), ("stage=ppo", "--help")])
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    modules, out = imported(*arguments)
    assert "--multirun" in out
    assert not modules & {*HEAVY}


def test_cfg_job_prints_the_resolved_options_and_imports_nothing_heavy() -> None:
    modules, out = imported("stage=ppo", "--cfg", "job", "stage.kl_coef=0.125")
    assert "kl_coef: 0.125" in out and "prompts_per_step:" in out
    assert not modules & {*HEAVY}


def test_without_a_stage_the_stages_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.strip() == presets.list_stages()
    assert main(["model=tiny"]) == 2


def test_the_list_groups_stages_aligns_them_and_says_what_is_particular() -> None:
    lines = presets.list_stages().splitlines()
    for family in FAMILIES:
        assert family in lines
    rows = [line for line in lines if line.startswith(("  stage=", "  experiment="))]
    names = presets.choices("stage") + presets.choices("experiment")
    assert len(rows) == len(names) and set(STAGES) <= set(names)
    width = max(len(row.split()[0]) for row in rows)
    texts = [row[2 + width + 2 :] for row in rows]
    assert all(row[2 + width : 2 + width + 2] == "  " for row in rows)
    assert all(text and text[0] != " " for text in texts)
    assert len(set(texts)) == len(texts)


def test_help_has_every_option_of_the_stage_with_its_sentence() -> None:
    text = " ".join(options.stage_help(config.compose(["stage=ppo"])).split())
    for group in ("stage", "rollout", "reward", "engine"):
        cls = STAGES["ppo"] if group == "stage" else Config.__annotations__[group]
        for option in options_of(cls, f"{group}."):
            if option.key != "stage.name":
                assert f" {option.key}=" in text
                assert option.info.doc in text
    assert "label.budget" not in text
    assert "stage.kl_coef=0.05 (float, at least 0)" in text
    assert "nats per response" in text


def test_help_begins_with_what_the_preset_and_the_command_line_changed() -> None:
    overrides = ["stage=grpo", "rollout.temperature=0.5", "experiment=reviews"]
    text = options.stage_help(config.compose(overrides))
    first, _, rest = text.partition("\n\nstage: ")
    assert "stage.advantage=group" in first and "default gae" in first
    assert "rollout.temperature=0.5" in first and "default 1.0" in first
    assert "run.name=reviews" in first
    assert "stage.advantage=gae" in rest
    assert "stage.gamma" not in first
    assert all(len(line) <= options.WIDTH for line in text.splitlines())


def test_help_of_a_stage_with_a_bad_option_is_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stage=ppo", "stage.gama=1", "--help"]) == 1
    assert "stage.gamma" in capsys.readouterr().err


SWEPT = "stage.kl_coef=0.0625,0.125"


def test_multirun_gives_each_job_its_own_run_directory_and_one_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run_child(command: Sequence[str]) -> int:
        commands.append(list(command))
        return 0

    monkeypatch.setattr("rlhf.process.supervision.run_child", run_child)
    assert main(["-m", "stage=ppo", f"run.dir={tmp_path}", "run.name=sweep", SWEPT]) == 0
    jobs = [config.compose(command[3:]) for command in commands]
    assert [command[1:3] for command in commands] == [["-m", "rlhf"]] * 2
    assert [(job.run.name, job.stage.kl_coef) for job in jobs] == [
        ("sweep-0", 0.0625),
        ("sweep-1", 0.125),
    ]
    assert {(job.run.dir, job.tracking.group) for job in jobs} == {(str(tmp_path), "sweep-sweep")}


@pytest.mark.full  # three processes that import torch: 40 s
def test_multirun_runs_each_job_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n' * 8, encoding="utf-8")
    arguments = [
        "-m",
        "stage=ppo",
        "model=tiny",
        f"run.dir={tmp_path}",
        "run.name=sweep",
        f"data.path={tmp_path}/rows.jsonl",
        "run.dry_run=true",
        SWEPT,
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
    assert done.stderr.startswith("error: stage.gamma=2.0")
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
