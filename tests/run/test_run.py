"""The run directory: refused, resumed, replaced, and what is written into it."""

import dataclasses
import errno
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from conf.choices import LabelMode, TrackingKind
from conf.labelling import LabelConfig
from conf.schema import Config, DataConfig, RunConfig, TrackingConfig
from conf.stages import LabelStage, OnlineStage, SFTStage
from rlhf.process import checkpoints
from rlhf.process.files import sha256
from rlhf.process.randomness import seed_everything
from rlhf.run import manifest
from rlhf.run.context import RunContext
from rlhf.types import UserError
from tests import drawing

ROOT = Path(__file__).resolve().parents[2]


def config(tmp_path: Path, stage: Any = None, **options: Any) -> Config:
    return Config(
        stage=stage or SFTStage(),
        run=RunConfig(dir=str(tmp_path), name="r", **options),
        tracking=TrackingConfig(kind=TrackingKind.none),
    )


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, UserError), (errno.EINTR, OSError)])
def test_a_disk_that_is_full_before_the_manifest_is_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    def refuse(path: Path, content: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(manifest, "write_json", refuse)
    with pytest.raises(
        kind, match="can't be written: .*No space left" if kind is UserError else "Interrupted"
    ):
        RunContext.open(config(tmp_path), ())


def whole_checkpoint(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "state").write_text(path.name, encoding="utf-8")
    checkpoints.seal(path)


def one_run(tmp_path: Path, checkpoint: int | None = None, finish: bool = True) -> RunContext:
    ctx = RunContext.open(config(tmp_path))
    for step in range(1, 6):
        ctx.tracker.log(step, {"loss": 1.0 / step})
        ctx.tracker.samples(step, [{"prompt": "a", "response": "b"}])
    if checkpoint is not None:
        whole_checkpoint(ctx.checkpoint_dir / f"step-{checkpoint}")
    if finish:
        ctx.finish(steps=5, metrics={"loss": 0.2}, model=None)
    else:
        ctx.tracker.finish(exit_code=1)
    return ctx


def test_a_run_leaves_the_files_of_the_contract(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "x"}\n', encoding="utf-8")
    ctx = RunContext.open(
        config(tmp_path, seed=3),
        ["stage=sft", "+x.api_key=abc", "engine.micro_tokens=64", "note=" + "a1" * 20],
    )
    ctx.add_data(data)
    ctx.add_data(data)
    ctx.tracker.log(1, {"loss": 2.0})
    ctx.model_dir.mkdir()
    with drawing.on():
        ctx.finish(
            steps=1,
            metrics={"loss": 2.0, "bad": math.nan, "rate": np.float32(0.5)},
            next_command="python -m rlhf stage=reward",
        )
    directory = tmp_path / "r" / "sft"
    assert directory == ctx.dir
    assert {"config.yaml", "manifest.json", "metrics.jsonl", "summary.json", "plots", "model"} == {
        p.name for p in directory.iterdir()
    }
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    assert list(summary) == ["stage", "steps", "wall_s", "peak_rss_mb", "metrics", "model"]
    assert (summary["stage"], summary["steps"], summary["model"]) == ("sft", 1, "model")
    assert summary["metrics"] == {"loss": 2.0, "bad": None, "rate": 0.5}
    assert summary["peak_rss_mb"] > 10 and summary["wall_s"] >= 0
    stored = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    assert (
        stored["tracking"]["kind"] == "none"
        and stored["stage"]["learning_rate"] == 1e-5
        and stored["data"]["eval_fraction"] == 0.1
    )
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    assert (
        manifest["seed"] == 3
        and manifest["world_size"] == 1
        and manifest["versions"]["torch"] == torch.__version__
    )
    assert manifest["argv"] == ["stage=sft", "+x.api_key=***", "engine.micro_tokens=64", "note=***"]
    assert manifest["data"] == [{"path": str(data), "sha256": sha256(data), "bytes": 14}]
    assert manifest["commit"] is None or len(manifest["commit"]["sha"]) == 40
    said = capsys.readouterr().out
    assert "python -m rlhf stage=reward" in said and "peak memory" in said


def test_parents_are_recorded_with_their_summarys_hash(tmp_path: Path) -> None:
    one_run(tmp_path).model_dir.mkdir()
    summary = tmp_path / "r" / "sft" / "summary.json"
    ctx = RunContext.open(config(tmp_path, OnlineStage()))
    ctx.add_parent("policy", tmp_path / "r" / "sft" / "model")
    ctx.add_parent("reward", "org/name")
    ctx.add_parent("reference", None)
    parents = json.loads((ctx.dir / "manifest.json").read_text(encoding="utf-8"))["parents"]
    assert parents == [
        {
            "kind": "policy",
            "path": str(tmp_path / "r" / "sft" / "model"),
            "summary_sha256": sha256(summary),
            "from": {"run": "../sft", "stage": "sft", "artifacts": []},
        },
        {"kind": "reward", "path": "org/name", "summary_sha256": None},
    ]


def test_an_existing_run_is_refused(tmp_path: Path) -> None:
    one_run(tmp_path)
    before = sorted(p.name for p in (tmp_path / "r" / "sft").iterdir())
    with pytest.raises(UserError, match=r"r/sft exists.*run.resume=true.*run.overwrite=true"):
        RunContext.open(config(tmp_path))
    assert sorted(p.name for p in (tmp_path / "r" / "sft").iterdir()) == before
    # another stage of the same name is another run
    RunContext.open(config(tmp_path, OnlineStage()))


def test_overwrite_replaces_a_run_and_nothing_else(tmp_path: Path) -> None:
    one_run(tmp_path)
    ctx = RunContext.open(config(tmp_path, overwrite=True))
    assert not (ctx.dir / "summary.json").exists() and steps(ctx.dir / "metrics.jsonl") == []
    foreign = tmp_path / "r" / "ppo"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"would delete .*neither manifest.json nor config.yaml"):
        RunContext.open(config(tmp_path, OnlineStage(), overwrite=True))
    assert (foreign / "thesis.txt").exists()


def test_resume_continues_from_the_newest_checkpoint_without_a_step_twice(tmp_path: Path) -> None:
    first = one_run(tmp_path, checkpoint=3, finish=False)
    whole_checkpoint(first.checkpoint_dir / "step-2")
    (first.checkpoint_dir / "step-10.part").mkdir()  # a save that was killed
    ctx = RunContext.open(config(tmp_path, resume=True))
    assert ctx.resume_from == first.checkpoint_dir / "step-3"
    assert not (first.checkpoint_dir / "step-10.part").exists()
    assert steps(ctx.dir / "metrics.jsonl") == [1, 2, 3] and steps(ctx.dir / "samples.jsonl") == [
        1,
        2,
        3,
    ]
    for step in (4, 5, 6):
        ctx.tracker.log(step, {"loss": 0.0})
    ctx.finish(steps=6, metrics={}, model=None)
    assert steps(ctx.dir / "metrics.jsonl") == [1, 2, 3, 4, 5, 6]
    times = [
        json.loads(line)["time_s"]
        for line in (ctx.dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert times == sorted(times)
    starts = json.loads((ctx.dir / "manifest.json").read_text(encoding="utf-8"))["starts"]
    assert [s["resume_from"] for s in starts] == [None, str(ctx.resume_from)]


def test_resume_without_a_checkpoint_starts_anew_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ctx = RunContext.open(config(tmp_path, resume=True))
    assert ctx.resume_from is None and "does not exist yet" in caplog.text
    ctx.tracker.log(1, {"loss": 1.0})
    ctx.tracker.finish(exit_code=1)
    again = RunContext.open(config(tmp_path, resume=True))
    assert again.resume_from is None and "holds no checkpoint" in caplog.text
    assert steps(again.dir / "metrics.jsonl") == []
    again.finish(steps=0, metrics={}, model=None)
    with pytest.raises(UserError, match="finished run without a checkpoint"):
        RunContext.open(config(tmp_path, resume=True))


def test_resume_says_which_options_differ(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one_run(tmp_path, checkpoint=5)
    changed = config(tmp_path, SFTStage(learning_rate=5e-3), resume=True)
    changed.data = DataConfig(max_rows=7)
    RunContext.open(changed)
    said = [r.message for r in caplog.records if "differs" in r.message]
    assert len(said) == 2
    assert (
        "data.max_rows: None -> 7" in said[0] and "stage.learning_rate: 1e-05 -> 0.005" in said[1]
    )


def test_a_finished_summary_is_gone_while_a_resumed_run_goes_on(tmp_path: Path) -> None:
    one_run(tmp_path, checkpoint=5)
    ctx = RunContext.open(config(tmp_path, resume=True))
    assert not (ctx.dir / "summary.json").exists()


def test_finish_refuses_a_model_that_was_not_saved(tmp_path: Path) -> None:
    ctx = RunContext.open(config(tmp_path))
    with pytest.raises(FileNotFoundError, match="was to be this run's model"):
        ctx.finish(steps=1, metrics={})
    assert not (ctx.dir / "summary.json").exists()


def test_closing_closes_the_tracker_whatever_happens(tmp_path: Path) -> None:
    ctx = RunContext.open(config(tmp_path))

    def fail() -> None:
        with ctx.closing():
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    with pytest.raises(ValueError, match="closed file"):
        ctx.tracker.log(1, {"loss": 1.0})


def test_seed_everything_makes_every_generator_repeat_itself() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002 - the global generator is the point

    seed_everything(7)
    first = draw()
    seed_everything(7)
    assert draw() == first
    seed_everything(8)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


RANK_PROGRAM = """
import sys
from conf.choices import LabelMode, TrackingKind
from conf.labelling import LabelConfig
from conf.schema import Config, RunConfig, TrackingConfig
from conf.stages import SFTStage
from rlhf.process import distributed
from rlhf.run.context import RunContext
from rlhf.types import UserError

distributed.initialise()
cfg = Config(
    stage=SFTStage(),
    run=RunConfig(dir=sys.argv[1], name="r"),
    tracking=TrackingConfig(kind=TrackingKind.none),
)
ctx = RunContext.open(cfg)
ctx.tracker.log(1, {"loss": float(distributed.rank())})
ctx.tracker.samples(1, [{"prompt": str(distributed.rank())}])
ctx.finish(steps=1, metrics={"rank": distributed.rank()}, model=None)
distributed.barrier()
try:
    RunContext.open(cfg)
except UserError:
    print(f"rank {distributed.rank()} refused", flush=True)
distributed.shutdown()
"""


@pytest.mark.distributed
def test_only_rank_0_writes_and_every_rank_is_refused(tmp_path: Path) -> None:
    program = tmp_path / "ranks.py"
    program.write_text(RANK_PROGRAM, encoding="utf-8")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(program),
        str(tmp_path),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "rank 0 refused" in done.stdout and "rank 1 refused" in done.stdout
    directory = tmp_path / "r" / "sft"
    assert [
        json.loads(line)["loss"]
        for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ] == [0.0]
    assert json.loads((directory / "summary.json").read_text(encoding="utf-8"))["metrics"] == {
        "rank": 0
    }
    assert json.loads((directory / "manifest.json").read_text(encoding="utf-8"))["world_size"] == 2
    assert done.stdout.count("peak memory") == 1


def importing(tmp_path: Path, **options: Any) -> Config:
    label = LabelConfig(mode=LabelMode["import"])
    return Config(
        stage=LabelStage(),
        run=RunConfig(dir=str(tmp_path), name="r", **options),
        tracking=TrackingConfig(kind=TrackingKind.none),
        label=label,
    )


def test_an_import_of_labels_goes_on_in_its_directory(tmp_path: Path) -> None:
    data = tmp_path / "labels.csv"
    data.write_text("x\n")
    for number in (1, 2):
        ctx = RunContext.open(importing(tmp_path, resume=number == 2), [f"import {number}"])
        assert ctx.dir == tmp_path / "r" / "labels"
        assert ctx.resume_from is None
        (ctx.dir / "labels.jsonl").open("a").write("kept\n")
        ctx.add_data(data)
        ctx.publish(f"v{number}", "preference-data", [ctx.dir / "labels.jsonl"])
        ctx.tracker.log(number, {"label/new": number})
        ctx.finish(steps=number, metrics={}, model=None)
        with (ctx.dir / "metrics.jsonl").open("ab") as out:
            out.write(b'{"step": 9, "la')  # what a kill would leave
    assert (ctx.dir / "labels.jsonl").read_text() == "kept\nkept\n"
    manifest = json.loads((ctx.dir / "manifest.json").read_text())
    assert [start["argv"] for start in manifest["starts"]] == [["import 1"], ["import 2"]]
    assert [artifact["name"] for artifact in manifest["artifacts"]] == ["v1", "v2"], (
        "earlier versions stay on record"
    )
    assert len(manifest["data"]) == 1
    ctx = RunContext.open(importing(tmp_path))
    assert steps(ctx.dir / "metrics.jsonl") == [1, 2]
    assert (ctx.dir / "summary.json").is_file(), (
        "what the last import left stays true until this one is done"
    )
    ctx.tracker.finish()
    with pytest.raises(UserError, match=r"run\.overwrite=true would delete the labels"):
        RunContext.open(importing(tmp_path, overwrite=True))
    assert (ctx.dir / "labels.jsonl").is_file()


def test_an_export_of_labels_is_a_run_like_any_other(tmp_path: Path) -> None:
    cfg = dataclasses.replace(importing(tmp_path), label=LabelConfig())
    RunContext.open(cfg).tracker.finish()
    assert (tmp_path / "r" / "label").is_dir()
    with pytest.raises(UserError, match=r"run\.resume=true"):
        RunContext.open(cfg)
