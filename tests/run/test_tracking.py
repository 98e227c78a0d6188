"""metrics.jsonl, samples.jsonl, W&B offline, TensorBoard, and what the console shows."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.choices import TrackingKind, WandbMode
from conf.schema import Config, RunConfig, TrackingConfig
from conf.stages import OnlineStage
from rlhf.run import console
from rlhf.run.tracking import files
from rlhf.run.tracking import wandb as wandb_backend
from rlhf.run.tracking.tracker import Tracker, check
from rlhf.types import UserError


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The user's own W&B login and mode play no part."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))


def config(kind: TrackingKind = TrackingKind.none, **options: Any) -> Config:
    return Config(
        stage=OnlineStage(),
        run=RunConfig(name="proj"),
        tracking=TrackingConfig(kind=kind, **options),
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_per_step_is_on_disk_at_once(tmp_path: Path) -> None:
    tracker = Tracker(config(), tmp_path, "ppo")
    tracker.log(1, {"loss": 0.5, "count": 3})
    tracker.log(2, {"loss": torch.tensor(0.25)})  # type: ignore[dict-item]
    rows = lines(tmp_path / "metrics.jsonl")
    assert [list(r) for r in rows] == [
        ["step", "time_s", "loss", "count"],
        ["step", "time_s", "loss"],
    ]
    assert [r["loss"] for r in rows] == [0.5, 0.25]


def test_figures_of_the_same_step_join_its_line(tmp_path: Path) -> None:
    tracker = Tracker(config(), tmp_path, "sft")
    tracker.log(1, {"loss": 1.0})
    tracker.log(2, {"loss": 0.5, "x": math.nan})
    tracker.log(2, {"eval_loss": 0.7, "x": 1.0})
    tracker.log(3, {"loss": 0.4})
    rows = lines(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert (
        rows[1]["loss"] == 0.5
        and rows[1]["eval_loss"] == 0.7
        and rows[1]["x"] == 1.0
        and "nonfinite" not in rows[1]
    )


def test_non_finite_values_are_null_and_named(tmp_path: Path) -> None:
    tracker = Tracker(config(), tmp_path, "ppo")
    tracker.log(1, {"a": math.nan, "b": math.inf, "c": 1.0})
    tracker.samples(1, [{"prompt": "p", "score": math.nan}])
    row = lines(tmp_path / "metrics.jsonl")[0]
    assert (row["a"], row["b"], row["c"], row["nonfinite"]) == (None, None, 1.0, ["a", "b"])
    assert lines(tmp_path / "samples.jsonl") == [
        {"step": 1, "prompt": "p", "score": None, "nonfinite": ["score"]}
    ]


def test_what_is_no_metric_is_refused(tmp_path: Path) -> None:
    tracker = Tracker(config(), tmp_path, "ppo")
    tracker.log(5, {"loss": 1.0})
    with pytest.raises(ValueError, match="metric loss of step 6 is 'high': expected a number"):
        tracker.log(6, {"loss": "high"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="step 4 was logged after step 5"):
        tracker.log(4, {"loss": 1.0})


def test_a_torn_last_line_is_no_obstacle_to_a_resume(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "time_s": 5.0, "a": 1}\n{"step": 2, "time_s": 9.0, "a"', encoding="utf-8"
    )
    assert files.truncate(tmp_path / "metrics.jsonl", 2) == 0
    tracker = Tracker(config(), tmp_path, "ppo", resume=True)
    tracker.log(2, {"a": 2.0})
    rows = lines(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2] and rows[1]["time_s"] >= 5.0


def test_a_disabled_tracker_writes_nothing(tmp_path: Path) -> None:
    tracker = Tracker(config(TrackingKind.wandb), tmp_path / "none", "ppo", enabled=False)
    tracker.log(1, {"loss": 1.0})
    tracker.samples(1, [{"prompt": "p"}])
    tracker.finish()
    assert not (tmp_path / "none").exists() and tracker.sync_command is None


def test_wandb_offline_records_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import wandb

    seen: dict[str, Any] = {}
    start = wandb.init

    def init(**options: Any) -> Any:
        seen.update(options)
        return start(**options)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setitem(sys.modules, "openai", sys)  # as in a process where vLLM runs
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights.bin").write_bytes(b"x" * 64)
    cfg = config(TrackingKind.wandb, tags=["t"], samples_every=2)
    cfg.reward.function = "hf_" + "a" * 30  # the form of a secret, wherever it stands
    tracker = Tracker(cfg, tmp_path, "ppo")
    tables: list[int] = []
    record = tracker._backend.table  # type: ignore[union-attr]

    def table(name: str, rows: Any, step: int) -> None:
        tables.append(step)
        record(name, rows, step)

    tracker._backend.table = table  # type: ignore[union-attr, method-assign]
    for step in (1, 2, 3):
        tracker.log(step, {"objective/scores": float(step)})
        tracker.samples(step, [{"prompt": "p", "response": "r", "score": 0.5, "kl": 0.1}])
    tracker.artifact("proj-ppo", "model", [model / "weights.bin"], {}, model, "0123456789abcdef")
    tracker.finish({"objective/scores": 3.0})
    # its process writes on for some milliseconds after finish; an ending program waits for it
    # likewise
    wandb.teardown()
    assert tables == [1, 2, 3]  # the first, every second, and at the end the last
    assert (
        seen["mode"] == "offline"
        and seen["group"] == "proj"
        and seen["name"] == "proj/ppo"
        and seen["job_type"] == "ppo"
    )
    assert (
        seen["config"]["reward"]["function"] == "***"
        and seen["config"]["tracking"]["kind"] == "wandb"
    )
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 1 and next(runs[0].glob("*.wandb")).stat().st_size > 1000
    assert tracker.sync_command == f"wandb sync {runs[0]}"
    assert list(runs[0].glob("files/media/table/samples_*.json"))
    copies = [
        p
        for p in (tmp_path / "wandb_data_dir").rglob("*")
        if p.is_file() and p.read_bytes() == b"x" * 64
    ]
    assert copies == [], "the artifact copied the weights"
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
    again = Tracker(cfg, tmp_path, "ppo", resume=True)
    again.finish(exit_code=1)
    assert again.sync_command is not None and again.sync_command.count("offline-run-") == 2
    # offline-run-<second>-<id>, and -1 behind it for another one of the same second
    assert {p.name.split("-")[3] for p in (tmp_path / "wandb").glob("offline-run-*")} == {
        seen["id"]
    }


def test_wandb_is_online_where_a_login_exists(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    auto = TrackingConfig(kind=TrackingKind.wandb)
    assert wandb_backend.wandb_mode(auto) is WandbMode.offline
    with pytest.raises(
        UserError, match=r"tracking.mode=online, but W&B finds no login: run `wandb login`"
    ):
        check(TrackingConfig(kind=TrackingKind.wandb, mode=WandbMode.online))
    (tmp_path / "netrc").write_text(
        "machine api.wandb.ai\n  login user\n  password " + "0123456789" * 4 + "\n",
        encoding="utf-8",
    )
    (tmp_path / "netrc").chmod(0o600)
    assert wandb_backend.wandb_mode(auto) is WandbMode.online
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_backend.wandb_mode(auto) is WandbMode.offline
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(UserError, match="WANDB_MODE=disabled does not go with tracking=wandb"):
        check(auto)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    assert (
        wandb_backend.wandb_mode(TrackingConfig(kind=TrackingKind.wandb, mode=WandbMode.online))
        is WandbMode.online
    )
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(UserError, match="the W&B login is invalid"):
        check(auto)


def test_wandb_that_cannot_start_is_never_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    start, modes = wandb.init, []

    def init(**options: Any) -> Any:
        modes.append(options["mode"])
        if options["mode"] == "online":
            raise wandb.errors.CommError("no network")
        return start(**options)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    with pytest.raises(UserError, match=r"tracking=wandb .*no network.*tracking.mode=offline"):
        Tracker(config(TrackingKind.wandb, mode=WandbMode.online), tmp_path / "a", "ppo")
    tracker = Tracker(config(TrackingKind.wandb), tmp_path / "b", "ppo")
    tracker.finish()
    assert modes == ["online", "online", "offline"]
    assert "could not start online (no network)" in caplog.text and tracker.sync_command is not None
    from wandb.sdk.lib import wbauth

    wbauth.unauthenticate_session()  # W&B keeps the key of this test for its process
    wandb.teardown()


def test_tensorboard_holds_scalars_samples_and_images(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from tests.drawing import plot_run

    tracker = Tracker(config(TrackingKind.tensorboard), tmp_path, "ppo")
    for step in (1, 2):
        tracker.log(step, {"objective/kl": 0.5 * step})
    tracker.samples(2, [{"prompt": "p", "response": "r"}])
    tracker.images(plot_run(tmp_path))
    tracker.finish(summary={"objective/kl": 1.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("objective/kl")] == [(1, 0.5), (2, 1.0)]
    assert (
        events.Tags()["images"] == ["plots/kl"]
        and "samples/text_summary" in events.Tags()["tensors"]
    )


def test_the_console_writes_plain_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console.console.cache_clear()
    with console.progress(3, "ppo") as bar:
        for step in (1, 2, 3):
            bar.update(step, {"loss/policy": -0.01, "objective/scores": 1.5, "objective/kl": 0.25})
    console.samples_table(
        [{"prompt": "a [b] c", "response": "x" * 900, "score": 1.23456, "step": 3}]
    )
    console.closing_panel(
        "ppo: done",
        {"score": 1.5},
        {"run": Path("runs/r/ppo")},
        "python -m rlhf stage=eval",
        ["a note"],
    )
    out = capsys.readouterr().out
    console.console.cache_clear()
    assert "\x1b" not in out and "\r" not in out
    assert (
        "ppo 1/3  loss -0.01  score 1.5  KL 0.25" in out
        and "ppo 3/3" in out
        and "ppo 2/3" not in out
    )
    assert "a [b] c" in out and "1.235" in out and out.count("x") < 500
    assert "runs/r/ppo" in out and "python -m rlhf stage=eval" in out and "a note" in out


def test_other_ranks_are_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with console.progress(1, "ppo") as bar:
        bar.update(1, {"loss": 1.0})
    console.samples_table([{"prompt": "a"}])
    console.closing_panel("ppo")
    assert capsys.readouterr().out == ""


class FakeRun:
    """What tracking asks of a W&B run."""

    project, entity, id = "rlhf", "lab", "abcd1234"

    def __init__(self) -> None:
        self.summary: dict[str, Any] = {}
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.artifacts: list[tuple[Any, list[str]]] = []
        self.used: list[str] = []
        self.unknown: set[str] = set()

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((values, step))

    def log_artifact(self, artifact: Any, aliases: list[str]) -> None:
        self.artifacts.append((artifact, aliases))

    def use_artifact(self, reference: str) -> None:
        import wandb

        if reference in self.unknown:
            raise wandb.errors.CommError("no such artifact")
        self.used.append(reference)

    def finish(self, exit_code: int) -> None:
        """Nothing to close."""


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Tracker, FakeRun]:
    """A tracker that believes to be online."""
    import wandb

    run = FakeRun()
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    return Tracker(
        config(TrackingKind.wandb, mode=WandbMode.online), tmp_path / "run", "reward"
    ), run


def test_artifacts_are_logged_by_name_and_content(
    online: tuple[Tracker, FakeRun], tmp_path: Path
) -> None:
    tracker, run = online
    files = [tmp_path / "run" / "out" / "a.txt", tmp_path / "run" / "b.txt"]
    files[0].parent.mkdir()
    for path in files:
        path.write_text(path.name, encoding="utf-8")
    tracker.artifact("x-export", "label-export", files, {"tasks": 3}, tmp_path / "run", "0f" * 8)
    (artifact, aliases), *rest = run.artifacts
    assert not rest and (artifact.name, artifact.type, aliases) == (
        "x-export",
        "label-export",
        ["latest", "0f" * 8],
    )
    assert artifact.metadata == {"tasks": 3} and set(artifact.manifest.entries) == {
        "out/a.txt",
        "b.txt",
    }
    assert tracker.identity == {
        "project": "rlhf",
        "entity": "lab",
        "run_id": "abcd1234",
        "mode": "online",
    }


def test_another_runs_artifact_is_used_once_and_an_unknown_one_is_no_error(
    online: tuple[Tracker, FakeRun], caplog: pytest.LogCaptureFixture
) -> None:
    tracker, run = online
    theirs = {"project": "p", "entity": "e", "run_id": "1", "mode": "offline"}
    for _ in range(2):
        tracker.use("x-labels", "0f" * 8, theirs)
    tracker.use("x-data", "1e" * 8, theirs | {"entity": None})
    assert run.used == [f"e/p/x-labels:{'0f' * 8}", f"p/x-data:{'1e' * 8}"] and not caplog.text
    run.unknown.add("e/p/gone:00")
    tracker.use("gone", "00", theirs)
    assert "e/p/gone:00 (no such artifact)" in caplog.text and "manifest.json" in caplog.text


def test_offline_nothing_is_looked_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """W&B itself raises there."""
    tracker = Tracker(config(TrackingKind.wandb), tmp_path, "reward")
    with pytest.raises(TypeError, match="offline"):
        tracker._backend._run.use_artifact("e/p/x:latest")  # type: ignore[union-attr]
    tracker.use("x", "00", {"project": "p", "entity": "e", "run_id": "1", "mode": "offline"})
    identity = tracker.identity
    tracker.finish()
    assert (
        not [r for r in caplog.records if r.name.startswith("rlhf")]
        and identity is not None
        and identity["mode"] == "offline"
        and identity["project"] == "rlhf"
    )


def test_tables_hold_text_as_text(online: tuple[Tracker, FakeRun]) -> None:
    tracker, run = online
    rows = [
        {"prompt": "<b>hi</b>", "chosen": "a", "by": {"x": 1}, "n": 1},
        {"prompt": "hf_" + "a" * 24, "chosen": 2, "margin": math.nan, "n": 0.5},
    ]
    tracker.table("labels", rows, 7)
    tracker.table("labels", [], 8)
    (values, step), *rest = run.logged
    table = values["labels"]
    assert step == 7 and not rest and table.columns == ["prompt", "chosen", "by", "n", "margin"]
    assert table.data == [["<b>hi</b>", "a", '{"x": 1}', 1, None], ["***", "2", None, 0.5, None]]


def test_a_table_without_a_tracker_is_nothing(tmp_path: Path) -> None:
    tracker = Tracker(config(), tmp_path, "label")
    before = sorted(tmp_path.iterdir())
    tracker.table("labels", [{"a": 1}], 1)
    tracker.artifact("x", "labels", [], {}, tmp_path, "00")
    tracker.use("x", "00", {})
    assert sorted(tmp_path.iterdir()) == before and tracker.identity is None


def test_tensorboard_shows_markup_as_it_stands(tmp_path: Path) -> None:
    import numpy as np
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.text.text_plugin import text_array_to_html

    tracker = Tracker(config(TrackingKind.tensorboard), tmp_path, "label")
    tracker.table(
        "labels", [{"prompt": "a\n<script>x</script>\n# b ![i](http://x/y)", "chosen": "`c`"}], 3
    )
    tracker.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("labels/text_summary")
    shown = text_array_to_html(np.array(event.tensor_proto.string_val), enable_markdown=True)
    assert (
        event.step == 3
        and "&lt;script&gt;x&lt;/script&gt;" in shown
        and "<script" not in shown
        and "<h1" not in shown
        and "<img" not in shown
    )


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("x-labels", "x-labels"),
        ("exp 1/x: \u00e4-labels", "exp-1-x-labels"),
        ("///", "artifact"),
        ("hf_" + "a" * 24, "artifact"),
        ("a.b_c", "a.b_c"),
    ],
)
def test_artifact_names_fit(name: str, fits: str) -> None:
    from wandb.sdk.artifacts._validators import validate_artifact_name

    assert validate_artifact_name(files.artifact_name(name)) == fits


def test_long_artifact_names_stay_apart() -> None:
    one, other = files.artifact_name("x" * 200), files.artifact_name("x" * 199 + "y")
    assert len(one) == len(other) == 128 and one != other


def test_durations() -> None:
    assert [console.duration(s) for s in (0, 59.6, 61, 3723)] == ["0:00", "1:00", "1:01", "1:02:03"]
