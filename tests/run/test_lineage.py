"""Where a run comes from: recorded in manifests as it is read, walked back to the prompts, and what
changed since is said.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conf.choices import DataKind, LabelMode, TrackingKind, WandbMode
from conf.labelling import LabelConfig
from conf.schema import Config, DataConfig, RunConfig, TrackingConfig
from conf.stages import DataStage, LabelStage, OnlineStage, RewardStage, SFTStage
from rlhf.process.files import sha256
from rlhf.run import lineage
from rlhf.run.context import RunContext
from rlhf.stages import data, reward
from rlhf.stages import rows as stage_rows
from rlhf.types import UserError
from tests.offline import trl_tools

Row = dict[str, Any]


def config(tmp_path: Path, stage: Any, name: str = "x", **groups: Any) -> Config:
    run = RunConfig(dir=str(tmp_path / "runs"), name=name, overwrite=groups.pop("overwrite", False))
    return Config(
        stage=stage,
        run=run,
        tracking=groups.pop("tracking", None) or TrackingConfig(kind=TrackingKind.none),
        **groups,
    )


def manifest(directory: Path) -> Row:
    content: Row = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    return content


def prepared(tmp_path: Path) -> Path:
    """stage=data on prompts."""
    rows = trl_tools.write_rows(
        tmp_path / "prompts.jsonl", [{"prompt": f"the film {i}"} for i in range(8)]
    )
    ctx = RunContext.open(
        config(tmp_path, DataStage(), data=DataConfig(path=str(rows), kind=DataKind.prompt))
    )
    data.run(ctx)
    return ctx.dir


def policy(tmp_path: Path, rows: Path) -> Path:
    """A run that leaves a model, without training one."""
    ctx = RunContext.open(config(tmp_path, SFTStage()))
    ctx.add_data(rows)
    ctx.model_dir.mkdir()
    (ctx.model_dir / "model.safetensors").write_bytes(b"weights")
    (ctx.model_dir / "config.json").write_text("{}", encoding="utf-8")
    ctx.finish(steps=1, metrics={})
    return ctx.dir


def exported(tmp_path: Path, model: Path, rows: Path) -> Path:
    ctx = RunContext.open(config(tmp_path, LabelStage()))
    ctx.add_parent("policy", model)
    ctx.add_data(rows)
    out = ctx.dir / "tasks.jsonl"
    out.write_text('{"id": "1"}\n', encoding="utf-8")
    ctx.publish("x-export", "label-export", [out], {"tasks": 1})
    ctx.finish(steps=1, metrics={}, model=None)
    return ctx.dir


def labelled(tmp_path: Path, export: Path, rows: list[Row]) -> Path:
    """Two versions of labels; labels/train.jsonl is a link to the newer one."""
    ctx = RunContext.open(
        config(tmp_path, LabelStage(), label=LabelConfig(mode=LabelMode["import"]))
    )
    ctx.add_parent("export", export)
    for number in (1, 2):
        folder = ctx.dir / "versions" / str(number)
        folder.mkdir(parents=True)
        trl_tools.write_rows(folder / "train.jsonl", rows[: 20 * number])
        ctx.publish("x-labels", "preference-data", [folder / "train.jsonl"], {"version": number})
    (ctx.dir / "train.jsonl").symlink_to(Path("versions") / "2" / "train.jsonl")
    ctx.finish(steps=1, metrics={}, model=None)
    return ctx.dir


def trained(tmp_path: Path, labels: Path) -> Path:
    stage = RewardStage(steps=2, batch_size=4, eval_steps=2, max_length=40, bootstrap=10)
    model = trl_tools.config(stage, tmp_path, "unused", []).model
    ctx = RunContext.open(
        config(
            tmp_path,
            stage,
            data=DataConfig(path=str(labels / "train.jsonl"), eval_fraction=0.2),
            model=model,
        )
    )
    reward.run(ctx, stage_rows)
    return ctx.dir


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """prompts -> policy -> export -> labels -> reward model."""
    root = tmp_path_factory.mktemp("chain")
    prompts = prepared(root)
    sft = policy(root, prompts / "train.jsonl")
    export = exported(root, sft / "model", prompts / "train.jsonl")
    labels = labelled(root, export, trl_tools.pair_rows(40))
    return {
        "root": root,
        "data": prompts,
        "sft": sft,
        "label": export,
        "labels": labels,
        "reward": trained(root, labels),
    }


def walk(node: lineage.Node) -> list[str]:
    return [node.stage or "file", *(stage for parent in node.parents for stage in walk(parent))]


def test_the_chain_is_walked_from_the_reward_model_to_the_prompts(chain: dict[str, Path]) -> None:
    node = lineage.lineage(chain["reward"] / "model")
    assert walk(node) == ["reward", "label", "label", "sft", "data", "file", "data"], (
        "the data of the export is that of the policy: named, not walked"
    )
    (labels,) = node.parents
    (export,) = labels.parents
    sft, again = export.parents
    (prompts,) = sft.parents
    digest = lineage.artifact_digest(manifest(chain["labels"])["artifacts"][1])
    assert labels.artifacts == (f"x-labels@{digest}",) and labels.via == (
        f"data {chain['labels'] / 'train.jsonl'}",
    ), "the version that the link names"
    assert export.artifacts[0].startswith("x-export@") and export.via == (
        f"export {chain['label']}",
    )
    assert sft.artifacts[0].startswith("x-sft@") and prompts.artifacts[0].startswith("x-data@")
    assert again.notes == ("as above",) and again.parents == () and again.path == prompts.path
    assert prompts.parents[0].path == str(chain["root"] / "prompts.jsonl")
    assert all(not one.notes for one in (node, labels, export, sft, prompts, prompts.parents[0])), (
        "nothing changed"
    )


def test_manifests_say_what_was_read_and_what_was_published(chain: dict[str, Path]) -> None:
    (entry,) = manifest(chain["reward"])["data"]
    assert entry["sha256"] == sha256(chain["labels"] / "versions" / "2" / "train.jsonl")
    assert (entry["from"]["run"], entry["from"]["stage"]) == ("../labels", "label") and len(
        entry["from"]["artifacts"]
    ) == 1
    (model,) = manifest(chain["reward"])["artifacts"]
    assert (model["name"], model["kind"], model["metadata"]) == (
        "x-reward",
        "model",
        {"stage": "reward", "steps": 2},
    )
    hashes = {file["path"]: file["sha256"] for file in model["files"]}
    assert (
        hashes["model/model.safetensors"] == sha256(chain["reward"] / "model" / "model.safetensors")
        and "model/reward_model.json" in hashes
    )
    (dataset,) = manifest(chain["data"])["artifacts"]
    assert (dataset["name"], dataset["kind"], dataset["metadata"]["rows"]["train"]) == (
        "x-data",
        "dataset",
        8,
    )
    assert [file["path"] for file in dataset["files"]] == ["train.jsonl"]


def test_the_command_prints_the_tree(
    chain: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert lineage.main([str(chain["reward"])]) == 0
    shown = capsys.readouterr().out
    places = [
        shown.index(name)
        for name in ("reward", "x-labels@", "x-export@", "x-sft@", "x-data@", "prompts.jsonl")
    ]
    assert places == sorted(places) and "as above" in shown and "!" not in shown
    assert lineage.main([str(chain["reward"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parents"][0]["stage"] == "label"
    assert (
        lineage.main([str(chain["root"])]) == 1
        and "expected a run directory" in capsys.readouterr().err
    )


def test_runs_may_move_together_and_changes_are_said(
    chain: dict[str, Path], tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(chain["root"] / "runs", moved, symlinks=True)
    assert walk(lineage.lineage(moved / "x" / "reward"))[:5] == [
        "reward",
        "label",
        "label",
        "sft",
        "data",
    ]
    assert str(moved) in lineage.lineage(moved / "x" / "reward").parents[0].path
    content = manifest(moved / "x" / "labels")
    content["artifacts"][1]["files"][0]["sha256"] = "0" * 64
    (moved / "x" / "labels" / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
    assert lineage.lineage(moved / "x" / "reward").parents[0].notes == (
        "x-labels was replaced since",
    )


def test_what_is_gone_or_changed_is_said(tmp_path: Path) -> None:
    rows = trl_tools.write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    ctx = RunContext.open(config(tmp_path, SFTStage()))
    ctx.add_data(rows)
    ctx.add_parent("policy", "org/name")
    assert [node.notes for node in lineage.lineage(ctx.dir).parents] == [(), ()]
    rows.write_text('{"text": "b"}\n', encoding="utf-8")
    assert lineage.lineage(ctx.dir).parents[1].notes == ("rows.jsonl was changed since",)
    rows.unlink()
    assert lineage.lineage(ctx.dir).parents[1].notes == ("rows.jsonl is gone",)
    with pytest.raises(UserError, match=r"expected a run directory"):
        lineage.lineage(tmp_path)


def test_a_published_file_that_was_edited_is_no_longer_that_artifact(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = prepared(tmp_path) / "train.jsonl"
    place.write_text(place.read_text(encoding="utf-8") + '{"prompt": "mine"}\n', encoding="utf-8")
    ctx = RunContext.open(config(tmp_path, SFTStage()))
    ctx.add_data(place)
    entry = manifest(ctx.dir)["data"][0]["from"]
    assert (
        entry["artifacts"] == []
        and entry["changed"]
        and "was changed since the run in" in caplog.text
    )
    assert lineage.lineage(ctx.dir).parents[0].notes == ("train.jsonl was no longer as published",)


def test_a_run_is_not_its_own_parent_and_files_from_elsewhere_have_none(tmp_path: Path) -> None:
    ctx = RunContext.open(config(tmp_path, SFTStage()))
    inside = ctx.dir / "made.jsonl"
    inside.write_text("{}\n", encoding="utf-8")
    ctx.add_data(inside)
    outside = trl_tools.write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    (tmp_path / "manifest.json").write_text('{"name": "some other program"}', encoding="utf-8")
    ctx.add_data(outside)
    assert ["from" in entry for entry in manifest(ctx.dir)["data"]] == [False, False]


def test_names_fit_and_secrets_stay_out(tmp_path: Path) -> None:
    ctx = RunContext.open(config(tmp_path, OnlineStage(), name="exp 1/x"))
    file = ctx.dir / "a.txt"
    file.write_text("a", encoding="utf-8")
    for _ in range(2):
        ctx.publish(
            "exp 1/x-labels",
            "labels",
            [file],
            {"url": "http://h/?t=hf_" + "a" * 24, "api_key": "k", "nested": {"password": "p"}},
        )
    (entry,) = manifest(ctx.dir)["artifacts"]
    assert entry["name"] == "exp-1-x-labels" and entry["metadata"] == {
        "url": "http://h/?t=***",
        "api_key": "***",
        "nested": {"password": "***"},
    }
    file.write_text("b", encoding="utf-8")
    ctx.publish("exp 1/x-labels", "labels", [file])
    assert len({one["digest"] for one in manifest(ctx.dir)["artifacts"]}) == 2, (
        "a version for each content"
    )


class FakeRun:
    """What a context asks of a W&B run that is online."""

    project, entity = "rlhf", "lab"

    def __init__(self, run_id: str) -> None:
        self.id, self.logged, self.used = run_id, [], []
        self.summary: Row = {}

    def log_artifact(self, artifact: Any, aliases: list[str]) -> None:
        self.logged.append(
            (artifact.name, artifact.type, aliases, sorted(artifact.manifest.entries))
        )

    def use_artifact(self, reference: str) -> None:
        self.used.append(reference)

    def log(self, values: Row, step: int | None = None) -> None: ...

    def finish(self, exit_code: int) -> None: ...


@pytest.mark.parametrize("log_model", [True, False])
def test_online_artifacts_are_logged_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_model: bool
) -> None:
    import wandb

    runs: list[FakeRun] = []

    def init(**options: Any) -> FakeRun:
        runs.append(FakeRun(options["id"]))
        return runs[-1]

    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setattr(wandb, "init", init)
    online = TrackingConfig(kind=TrackingKind.wandb, mode=WandbMode.online, log_model=log_model)
    first = RunContext.open(config(tmp_path, SFTStage(), tracking=online))
    (first.model_dir / "sub").mkdir(parents=True)
    (first.model_dir / "sub" / "w.bin").write_bytes(b"w")
    first.finish(steps=1, metrics={})
    (model,) = manifest(first.dir)["artifacts"]
    assert manifest(first.dir)["wandb"] == {
        "project": "rlhf",
        "entity": "lab",
        "run_id": runs[0].id,
        "mode": "online",
    }
    assert runs[0].logged == (
        [("x-sft", "model", ["latest", model["digest"]], ["sub/w.bin"])] if log_model else []
    )
    second = RunContext.open(config(tmp_path, OnlineStage(), tracking=online))
    for _ in range(2):
        second.add_parent("policy", first.model_dir)
    second.tracker.finish()
    (entry,) = manifest(second.dir)["parents"]
    assert (
        entry["from"]["wandb"]["run_id"] == runs[0].id
        and entry["from"]["artifacts"][0]["digest"] == model["digest"]
    )
    assert runs[1].used == [f"lab/rlhf/x-sft:{model['digest']}"]
