"""stage=search from the command line's options to an experiment."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from conf.methods import Direction, ObjectiveConfig
from conf.stages import STAGES
from rlhf.cli import config
from rlhf.cli.options import valid_keys
from rlhf.run.context import RunContext
from rlhf.search.commands import Commands
from rlhf.search.results import TABLE_FILE, TRIALS_FILE
from rlhf.stages import search
from rlhf.types import UserError
from tests.offline import trl_tools
from tests.search.quick import QuickCommands

ROOT = Path(__file__).resolve().parents[2]
SPACE = "stage.space={learning_rate:{low:0.01,high:0.9},batch_size:{choices:[2,4]}}"
STAND_IN = [
    "stage=search",
    "stage.of=sft",
    SPACE,
    "stage.objectives.value.direction=min",
    "stage.objectives.value.stage=sft",
    "stage.trials=3",
    "tracking=none",
    "model=tiny",
]


class Renamed(QuickCommands):
    """Stand-ins for a stage=sft: their x is its learning rate."""

    def __init__(self, stage: Any, run: Any, folder: Path, argv: Sequence[str], group: str) -> None:
        super().__init__(folder)
        self.real = Commands(stage, run, folder, argv, group)
        self.check, self.own = self.real.check, self.real.own

    def stages(self, number: int, setting: Any) -> list[Any]:
        made = super().stages(number, {"stage.x": setting["stage.learning_rate"]})
        object.__setattr__(made[0], "stage", "sft")
        return made


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *extra: str) -> Path:
    monkeypatch.setattr(search, "Commands", Renamed)
    given = [*STAND_IN, f"run.dir={folder}", "run.name=mine", *extra]
    cfg = config.compose(given)
    search.check(cfg)
    ctx = RunContext.open(cfg, given)
    search.run(ctx)
    return ctx.dir


def test_a_search_leaves_its_trials_and_an_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(tmp_path, monkeypatch)
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / TRIALS_FILE).read_text().splitlines()]
    best = min(rows, key=lambda row: row["values"]["value"])
    metrics = summary["metrics"]
    assert metrics["best/value"] == best["values"]["value"]
    assert metrics["best/trial"] == best["number"] and metrics["trials/complete"] == 3
    assert metrics["steps"] == 9
    cfg = config.compose(
        ["stage=sft", f"hydra.searchpath=[file://{folder}]", "experiment=mine_best"]
    )
    assert cfg.stage.learning_rate == best["setting"]["stage.learning_rate"]
    assert cfg.stage.batch_size == best["setting"]["stage.batch_size"]
    assert cfg.model.kind.value == "tiny"
    assert {path.name for path in (folder / "plots").glob("*.png")} == {
        "history_value.png",
        "importance_value.png",
    }
    assert "experiment=mine_best" in (folder / TABLE_FILE).read_text()
    lines = trl_tools.metric_lines(folder)
    assert [line["trial/number"] for line in lines] == [0, 1, 2]
    # more trials of a finished search
    folder = run(tmp_path, monkeypatch, "run.resume=true", "stage.trials=5")
    more = [json.loads(line) for line in (folder / TRIALS_FILE).read_text().splitlines()]
    assert more[:3] == rows and len(more) == 5
    assert [line["trial/number"] for line in trl_tools.metric_lines(folder)] == [0, 1, 2, 3, 4]


def test_two_searches_in_one_place_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    folder = tmp_path / "mine" / "search"
    folder.mkdir(parents=True)
    with (folder / "search.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process searches there"):
            run(tmp_path, monkeypatch, "run.resume=true")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.of=sfd", r"stage\.of=sfd: no such stage\. Nearest: sft"),
        ("stage.of=serve", r"stage\.of=serve: its runs have no metrics"),
        ("stage.then=chat", r"stage\.then=chat: its runs have no metrics"),
        ("stage.space.learning_rat.low=1", r"no option stage\.learning_rat\."),
        ("stage.sampler=grid", r"learning_rate has no end of values"),
        ("stage.cores=[a]", r"stage\.cores='a'"),
    ],
)
def test_what_can_be_known_before(override: str, message: str) -> None:
    cfg = config.compose([*STAND_IN[:3], "stage.objectives.value.metric=value", override])
    with pytest.raises(UserError, match=message):
        search.check(cfg)


def test_objectives_are_needed_and_of_a_stage_that_runs() -> None:
    with pytest.raises(UserError, match=r"stage\.objectives is empty"):
        search.check(config.compose(STAND_IN[:3]))
    with pytest.raises(UserError, match=r"objectives\.value\.stage='eval'.*one of sft"):
        config.compose([*STAND_IN, "stage.objectives.value.stage=eval"])
    with pytest.raises(UserError, match=r"stage\.prune\.kind='median'.*several objectives"):
        config.compose([*STAND_IN, "stage.objectives.b.metric=b", "stage.prune.kind=median"])
    with pytest.raises(UserError, match=r"stage\.devices=\['0'\].*stage\.workers=2"):
        config.compose([*STAND_IN, "stage.workers=2", "stage.devices=['0']"])
    goal = search._goals(
        STAGES["search"](then="eval", objectives={"a": ObjectiveConfig(direction=Direction.max)})
    )[0]
    assert (goal.name, goal.metric, goal.stage) == ("a", "a", "eval")


def test_no_option_of_a_stage_is_named_as_a_group() -> None:
    """stage.options and stage.space tell them apart by the first part of a key."""
    groups = {key for key in valid_keys([]) if "." not in key}
    for name in search.SEARCHED:
        own = {key.split(".")[1] for key in valid_keys([name]) if key.startswith("stage.")}
        assert not own & groups, name


# ---- with a real stage ----


def arguments(folder: Path) -> list[str]:
    rows = trl_tools.sft_rows(64)
    trl_tools.write_rows(folder / "train.jsonl", rows[:48])
    trl_tools.write_rows(folder / "held.jsonl", rows[48:])
    tiny = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 2}
    options = {"steps": 30, "batch_size": 8, "eval_steps": 5, "max_length": 32, "warmup_ratio": 0}
    return [
        sys.executable,
        "-m",
        "rlhf",
        "stage=search",
        "stage.of=sft",
        "model=tiny",
        "model.tiny.max_positions=64",
        *(f"model.tiny.{key}={value}" for key, value in tiny.items()),
        *(f"stage.options.{key}={value}" for key, value in options.items()),
        f"data.path={folder}/train.jsonl",
        f"data.eval_path={folder}/held.jsonl",
        f"run.dir={folder}/runs",
        "tracking=none",
        "stage.space={learning_rate:{low:1e-4,high:1e-1,log:true}}",
        "stage.objectives.eval_loss.direction=min",
        "stage.trials=3",
    ]


def trials_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "runs" / "default" / "search" / TRIALS_FILE).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row.pop("seconds")
    return rows


@pytest.mark.slow
def test_a_killed_search_of_sft_goes_on(tmp_path: Path) -> None:
    """kill -9 while a trial trains: it saves, goes on, and all is as without the kill."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(arguments(tmp_path / "a"), env=environment, check=True, cwd=ROOT)
    killed = subprocess.Popen(arguments(tmp_path / "b"), env=environment, cwd=ROOT)
    trial = tmp_path / "b" / "runs" / "default" / "search" / "trials" / "0001" / "sft"
    while not list(trial.glob("checkpoints/checkpoint-*")):
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    again = [*arguments(tmp_path / "b"), "run.resume=true"]
    subprocess.run(again, env=environment, check=True, cwd=ROOT)
    starts = json.loads((trial / "manifest.json").read_text())["starts"]
    assert len(starts) == 2 and starts[1]["resume_from"]
    assert trials_of(tmp_path / "b") == trials_of(tmp_path / "a")
