"""stage=registry by its command line: from a run to production, withheld, forced, back, and out."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from conf.schema import Config, ModelConfig, RunConfig
from conf.stages import EvalStage, ServeStage
from rlhf.__main__ import main
from rlhf.registry.store import Registry
from rlhf.stages.registered import resolve
from rlhf.types import UserError
from tests.registry.made import finished


class Line:
    """The command line in a folder of runs."""

    def __init__(self, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.runs, self._capsys = runs, capsys

    def __call__(self, action: str, *given: str, code: int = 0) -> str:
        options = ["stage=registry", f"stage.action={action}", f"run.dir={self.runs}"]
        assert main([*options, "run.name=mine", "stage.who=ann", *given]) == code
        shown = self._capsys.readouterr()
        return shown.out + shown.err

    def register(self, stage: str, metrics: dict[str, float]) -> str:
        """A finished run's model becomes a version."""
        path = finished(self.runs / "mine" / stage, metrics, stage.encode())
        return self("register", f"model.path={path}", "stage.reason=trained")


@pytest.fixture
def line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Line:
    return Line(tmp_path, capsys)


def test_a_model_s_life(line: Line) -> None:
    assert "there is no registry" in line("list", code=1)
    assert "mine@1" in line.register("sft", {"eval/score": 0.5, "safety": 1.0})
    # without model.path the newest policy of the run
    finished(line.runs / "mine" / "dpo", {"eval/score": 0.6, "safety": 0.8}, b"dpo")
    assert "mine@2" in line("register", "stage.reason=better")
    assert "mine@2 already" in line("register", "stage.reason=again")
    assert "holds production" in line("promote", "stage.version=1", "stage.reason=first")

    gate = ["stage.rules=['eval/score >= 0.55']", "+stage.largest_drop.safety=0.1"]
    told = line("promote", "stage.reason=better", *gate, code=1)
    assert "does not get production" in told and "from 1 to 0.8" in told
    assert "stage.force=true" in told
    told = line("promote", "stage.reason=asked for", "stage.force=true", *gate)
    assert "in spite of the gate" in told and "before: version 1" in told
    assert "mine@1 holds production again" in line("rollback", "stage.reason=unsafe")

    listed = line("list")
    assert "mine@1" in listed and "mine@2" in listed and "production" in listed
    shown = line("show", "stage.version=1")
    for word in ("withheld", "promote", "forced", "rollback", "unsafe", "ann", '"seed": 3'):
        assert word in shown
    compared = line("compare", "stage.version=2")
    assert "+0.1" in compared and "-0.2" in compared
    assert "2 versions are as they were" in line("verify")


def test_measured_later(line: Line, tmp_path: Path) -> None:
    line.register("sft", {"loss": 1.0})
    file = tmp_path / "judge.json"
    file.write_text(json.dumps({"metrics": {"eval/win": 0.7}}))
    assert "1 figures of mine@1" in line("measure", f"stage.summaries=[{file}]")
    rule = "stage.rules=['eval/win >= 0.6']"
    assert "holds staging" in line("promote", "stage.alias=staging", "stage.reason=x", rule)
    assert "stage.summaries" in line("measure", code=1)


def test_changed_files_are_neither_promoted_nor_exported(line: Line) -> None:
    line.register("sft", {})
    (line.runs / "mine" / "sft" / "model" / "model.safetensors").write_bytes(b"other")
    for action in ("promote", "export"):
        told = line(action, "stage.reason=x", code=1)
        assert "model.safetensors was changed" in told
    assert "model.safetensors was changed" in line("verify", code=1)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["stage.action=promote"], "stage.reason"),
        (["stage.action=promote", "stage.reason=x", "stage.alias='3'"], "stage.alias"),
        (["stage.model=a@b"], "stage.model"),
        (["stage.action=promote", "stage.reason=x", "stage.rules=[x]"], "stage.rules"),
        (["+stage.largest_drop.x=-1"], "stage.largest_drop.x"),
    ],
)
def test_options_that_are_refused(
    given: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stage=registry", f"run.dir={tmp_path}", *given]) == 1
    assert told in capsys.readouterr().err


def test_any_option_may_name_a_version(line: Line) -> None:
    line.register("sft", {})
    line("promote", "stage.reason=x")
    path = str(line.runs / "mine" / "sft" / "model")
    run = RunConfig(dir=str(line.runs), name="new")
    adapters = {"new": "registry:mine@1"}
    cfg = Config(
        stage=ServeStage(adapters=adapters), model=ModelConfig(path="registry:mine@production")
    )
    resolve(cfg, run)
    assert cfg.model.path == path and cfg.stage.adapters == {"new": path}
    evaluated = Config(stage=EvalStage(before="registry:mine@1"))
    resolve(evaluated, run)
    assert evaluated.stage.before == path
    for wrong in ("registry:mine@2", "registry:other@1", "registry:mine"):
        with pytest.raises(UserError, match=r"model\.path|no version|no model"):
            resolve(Config(stage=ServeStage(), model=ModelConfig(path=wrong)), run)


def test_the_command_line_resolves_before_a_stage_checks(line: Line) -> None:
    """stage=data is given the directory, and fails at what the directory holds."""
    line.register("sft", {})
    options = [f"run.dir={line.runs}", "run.name=x", "tracking=none"]
    assert main(["stage=data", "data.path=registry:mine@1", *options]) == 1
    told = line._capsys.readouterr().err.split("error: ")[1]
    assert "registry:" not in told and str(line.runs / "mine" / "sft" / "model") in told
    assert main(["stage=data", "data.path=registry:mine@2", *options]) == 1
    assert "no version or alias '2'" in line._capsys.readouterr().err


# ---- export ----


def test_mlflow_s_layout(line: Line, tmp_path: Path) -> None:
    path = finished(line.runs / "mine" / "sft", {"eval/x": 0.5})
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    line("register", "stage.reason=x", f"model.path={path}")
    line("export")
    folder = line.runs / "mlflow" / "mine-1"
    described: dict[str, Any] = yaml.safe_load((folder / "MLmodel").read_text())
    flavor = described["flavors"]["transformers"]
    assert flavor["pipeline_model_type"] == "LlamaForCausalLM"
    assert flavor["tokenizer_type"] == "LlamaTokenizer"
    assert described["metadata"]["version"] == "mine@1"
    assert described["metadata"]["figures"] == {"eval/x": 0.5}
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert {
        "MLmodel",
        "requirements.txt",
        "python_env.yaml",
        "model/config.json",
        "model/model.safetensors",
        "components/tokenizer/tokenizer.json",
        "components/tokenizer/tokenizer_config.json",
        "components/tokenizer/config.json",
    } == files
    assert "exists" in line("export", code=1)


def test_an_artifact_of_wandb(line: Line) -> None:
    line.register("sft", {"eval/x": 0.5})
    line("promote", "stage.reason=x")
    tracking = ["tracking=wandb", "tracking.mode=offline"]
    told = line("export", "stage.to=wandb", *tracking)
    assert "registry-mine:version-1" in told and "wandb sync" in told
    assert list((line.runs / "mine" / "registry" / "wandb").glob("offline-run-*/*.wandb"))
    assert "tracking=wandb" in line("export", "stage.to=wandb", "tracking=none", code=1)
    with Registry(line.runs / "registry.sqlite") as registry:
        assert len(registry.versions("mine")) == 1
