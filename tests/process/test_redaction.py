"""Secrets of the environment and of the command line reach nothing that is written: a run's files,
W&B's, logs, messages, tracebacks.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conf.choices import TrackingKind
from conf.schema import Config, DataConfig, RunConfig, TrackingConfig
from conf.stages import DoctorStage, SFTStage
from rlhf import __main__ as command_line
from rlhf.cli import command
from rlhf.process import redaction
from rlhf.run.context import RunContext
from rlhf.stages import data as data_stage
from rlhf.stages import doctor
from rlhf.stages.examination.findings import Finding, State
from rlhf.types import UserError

PLANTED = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "planted-hf-token",
    "LABEL_STUDIO_API_KEY": "planted-label-studio-key",
    "OPENAI_API_KEY": "planted-openai-key",
    "DB_PASSWORD": "planted-db-password",
}
TYPED = ["hf_" + "typed" * 5, "sk-" + "typed" * 5, "typed-user-password", "typed-option-key"]
SECRETS = [*PLANTED.values(), *TYPED]


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("api_key", "abc", "***"),
        ("wandb.api-key", "abc", "***"),
        ("auth_token", "abc", "***"),
        ("micro_tokens", "64", "64"),
        ("tokens", "a", "a"),
        ("x", "hf_" + "a" * 24, "***"),
        ("x", "see " + "0f" * 20 + " there", "see *** there"),
        ("password", None, None),
        ("x", ["https://me:word@host/a", {"secret": 3}], ["https://***@host/a", {"secret": "***"}]),
        ("token_env", "LABEL_STUDIO_API_KEY", "LABEL_STUDIO_API_KEY"),
    ],
)
def test_redact(name: str, value: Any, shown: Any) -> None:
    assert redaction.redact(name, value) == shown


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("commit " + "0f" * 20, "commit " + "0f" * 20),
        ("+tracking.api_key=abc is unknown", "+tracking.api_key=*** is unknown"),
        (
            "label.token_env=MY_TOKEN, engine.micro_tokens=64",
            "label.token_env=MY_TOKEN, engine.micro_tokens=64",
        ),
        ("Authorization: Bearer abcdefgh.ijkl", "Authorization: Bearer ***"),
        ("see https://host/a@b and me@host", "see https://host/a@b and me@host"),
        ("a planted-secret, a short one", "a ***, a short one"),
    ],
)
def test_text(monkeypatch: pytest.MonkeyPatch, message: str, shown: str) -> None:
    monkeypatch.setenv("MY_SECRET", "planted-secret")
    monkeypatch.setenv("MY_KEY", "short")
    monkeypatch.setenv("MONKEY", "commit label.token_env see")
    monkeypatch.setenv("KEY_FILE", str(Path(__file__)))
    assert redaction.text(message) == shown
    assert redaction.text(str(Path(__file__))) == str(Path(__file__)), (
        "a path that exists is no secret"
    )


@dataclass(frozen=True)
class Form:
    """A secret as people meet it: a text that holds it, and the part that must not be shown."""

    text: str
    secret: str


LONG = "Zx9" * 13  # 39 characters
FORMS = {
    "Hugging Face": Form(f"login hf_{LONG}", f"hf_{LONG}"),
    "W&B": Form(f"login wandb_v1_{LONG}", f"wandb_v1_{LONG}"),
    "GitHub": Form(f"clone ghp_{LONG}", f"ghp_{LONG}"),
    "GitHub, fine-grained": Form(f"clone github_pat_11A_{LONG}", f"github_pat_11A_{LONG}"),
    "GitLab": Form(f"clone glpat-{LONG}", f"glpat-{LONG}"),
    "OpenAI": Form(f"ask sk-proj-{LONG}", f"sk-proj-{LONG}"),
    "header": Form("Authorization: Bearer abcd.efgh-1234", "abcd.efgh-1234"),
    "assignment": Form("api_key=plain7word", "plain7word"),
    "address": Form("https://ann:pass7word@host/x", "ann:pass7word"),
    "environment": Form("it said planted-form-value", "planted-form-value"),
}
# A commit looks like one of W&B's older keys, so messages keep it.
HEXADECIMAL = Form("login " + "0f1e2d3c4b" * 4, "0f1e2d3c4b" * 4)
FILES = {**FORMS, "W&B, older": HEXADECIMAL}


@pytest.fixture
def in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_FORM_TOKEN", FORMS["environment"].secret)


@pytest.mark.usefixtures("in_environment")
@pytest.mark.parametrize("form", FILES.values(), ids=FILES)
def test_the_text_for_a_bug_report(
    form: Form, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = str(Path.home())
    findings = [Finding("a", State.fail, f"{form.text} in {home}/x", f"see {form.text}")]
    monkeypatch.setattr(doctor, "examine", lambda cfg: findings)
    with pytest.raises(UserError) as error:
        doctor.run(SimpleNamespace(cfg=Config(stage=DoctorStage())))
    shown, pasted = capsys.readouterr().out.split("bug report")
    assert form.secret not in pasted and "***" in pasted
    assert f"{home}/x" not in pasted and "~/x" in pasted
    if form is not HEXADECIMAL:
        assert form.secret not in shown + str(error.value)


@pytest.mark.usefixtures("in_environment")
@pytest.mark.parametrize("form", FILES.values(), ids=FILES)
def test_the_files_of_a_run(form: Form, tmp_path: Path) -> None:
    cfg = Config(
        stage=SFTStage(),
        run=RunConfig(dir=str(tmp_path)),
        tracking=TrackingConfig(kind=TrackingKind.tensorboard, tags=[form.text], group=form.text),
    )
    ctx = RunContext.open(cfg, [f"tracking.group={form.text}", form.text])
    ctx.record("server", {"answer": form.text, "all": [form.text]})
    ctx.tracker.log(1, {"loss": 1.0})
    ctx.tracker.table("labels", [{"who": form.text}], 1)
    ctx.tracker.finish()
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"config.yaml", "manifest.json", "metrics.jsonl"} <= {path.name for path in written}
    assert [path for path, content in written.items() if form.secret.encode() in content] == []


@pytest.mark.usefixtures("in_environment")
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_what_is_logged_and_what_an_error_says(
    form: Form,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    log = logging.getLogger("somebody.else")
    with redaction.redacted_logs():
        log.warning("it answered %s", form.text)
        try:
            raise ValueError(form.text)
        except ValueError as error:
            log.exception("it failed")
            redaction.excepthook(type(error), error, error.__traceback__)
    command._fail(UserError(form.text))
    shown = capsys.readouterr()
    files = (tmp_path / "error.json").read_text(encoding="utf-8")
    for text in (caplog.text, shown.out, shown.err, files):
        assert form.secret not in text
    assert "***" in caplog.text and "***" in shown.err and "***" in files


def test_a_report_keeps_whole_path_components() -> None:
    text = "/srv/ann/x /srv/anna/x /home/bob/y"
    assert redaction.report(text, home="/srv/ann") == "~/x /srv/anna/x ~/y"


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The command line of a small run with secrets all over it, each of which would be in some
    file.
    """
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(sys, "argv", ["rlhf"])
    rows = [{"prompt": f"p{i}", "completion": f"answer {i}"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    tags = (
        "["
        + ",".join([*TYPED[:2], '"${oc.env:OPENAI_API_KEY}"', '"${oc.env:WANDB_API_KEY}"'])
        + "]"
    )
    yield [
        "stage=data",
        f"data.path={tmp_path / 'rows.jsonl'}",
        f"run.dir={tmp_path / 'runs'}",
        "run.name=r",
        "tracking=wandb",
        "tracking.mode=offline",
        f"tracking.group=https://me:{TYPED[2]}@host/group",
        "tracking.project=${oc.env:HF_TOKEN}",
        f"tracking.tags={tags}",
    ]
    import wandb

    wandb.teardown()  # its process would keep the planted key for the tests that follow


def leaked(folder: Path, *shown: str) -> list[str]:
    """Where a planted text stands: files by name, and what was shown."""
    contents = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()} | {
        f"shown {i}": s.encode() for i, s in enumerate(shown)
    }
    return [
        f"{place}: {secret}"
        for place, content in contents.items()
        for secret in SECRETS
        if secret.encode() in content
    ]


def test_a_run_writes_no_secret(
    tmp_path: Path,
    planted: list[str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inner = data_stage.ingest.kind_of

    def telling(data: DataConfig) -> Any:
        """A library that logs what it should not."""
        log = logging.getLogger("somebody.else")
        log.warning(
            "asked %s with %s",
            f"https://me:{TYPED[2]}@host",
            {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"},
        )
        try:
            raise ValueError(f"refused: {os.environ['LABEL_STUDIO_API_KEY']}")
        except ValueError:
            log.exception("it failed with %s", os.environ["DB_PASSWORD"])
        return inner(data)

    monkeypatch.setattr(data_stage.ingest, "kind_of", telling)
    assert command_line.main(planted) == 0
    shown = capfd.readouterr()
    run = tmp_path / "runs" / "r" / "data"
    assert list((run / "wandb").rglob("*.wandb")) and (run / "summary.json").is_file()
    assert (
        "asked https://***@host" in shown.err
        and "ValueError: refused: ***" in shown.err
        and "it failed with ***" in shown.err
    )
    assert leaked(tmp_path / "runs", shown.out, shown.err) == []
    config = (run / "config.yaml").read_text(encoding="utf-8")
    assert "https://***@host/group" in config and config.count("'***'") >= 5
    assert any(
        "***" in argument
        for argument in json.loads((run / "manifest.json").read_text(encoding="utf-8"))["argv"]
    )


def test_what_a_stage_records_in_the_manifest_holds_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_PASSWORD", PLANTED["DB_PASSWORD"])
    cfg = Config(
        stage=SFTStage(),
        run=RunConfig(dir=str(tmp_path)),
        tracking=TrackingConfig(kind=TrackingKind.none),
    )
    ctx = RunContext.open(cfg, [f"note={PLANTED['DB_PASSWORD']}"])
    ctx.record(
        "server",
        {
            "url": f"http://me:{TYPED[2]}@host",
            "token": TYPED[3],
            "project": 7,
            "name": PLANTED["DB_PASSWORD"],
        },
    )
    ctx.tracker.finish()
    assert json.loads((ctx.dir / "manifest.json").read_text(encoding="utf-8"))["server"] == {
        "url": "http://***@host",
        "token": "***",
        "project": 7,
        "name": "***",
    }
    assert leaked(tmp_path) == []


@pytest.mark.parametrize("error", [UserError, RuntimeError])
def test_a_run_that_fails_tells_no_secret(
    tmp_path: Path,
    planted: list[str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: type[Exception],
) -> None:
    said = (
        f"can't reach https://me:{TYPED[2]}@host with token={TYPED[3]} and "
        f"{PLANTED['OPENAI_API_KEY']}"
    )

    def fails(data: DataConfig) -> Any:
        raise error(said)

    monkeypatch.setattr(data_stage.ingest, "kind_of", fails)
    if error is UserError:
        assert command_line.main(planted) == 1
    else:
        with pytest.raises(RuntimeError) as raised:
            command_line.main(planted)
        # what `python -m rlhf` ends with
        redaction.excepthook(raised.type, raised.value, raised.tb)
    shown = capfd.readouterr()
    assert "can't reach https://***@host with token=*** and ***" in shown.err
    assert "can't reach https://***@host" in (tmp_path / "error.json").read_text(encoding="utf-8")

    assert leaked(tmp_path, shown.out, shown.err) == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (f"+tracking.api_key={TYPED[3]}", "tracking.api_key"),
        (f"tracking.mode={TYPED[0]}", "tracking.mode"),
        (f"label.token_env={TYPED[3]}", "label.token_env is no environment variable's name"),
        (f"label.url=http://me:{TYPED[2]}@host", "label.url holds a user"),
        (
            f"+reward.terms.far={{kind: remote, url: 'http://host', token_env: {TYPED[3]}}}",
            "token_env is no environment variable's name",
        ),
        (f"+reward.terms.far={{kind: remote, url: 'http://me:{TYPED[2]}@host'}}", "holds a user"),
    ],
)
def test_an_option_that_holds_a_secret_is_refused_without_telling_it(
    tmp_path: Path, planted: list[str], capfd: pytest.CaptureFixture[str], override: str, said: str
) -> None:
    given = [*planted, override]
    if override.startswith("label."):
        given = [
            *planted,
            "stage=label",
            "label.push=true",
            "label.url=http://host",
            "label.policies={a: owner/name}",
            override,
        ]
    elif "terms" in override:
        given = [*planted, "stage=grpo", "model=tiny", override]
    assert command_line.main(given) == 1
    shown = capfd.readouterr()
    assert said in shown.err
    assert leaked(tmp_path, shown.out, shown.err) == []


def test_the_file_that_hydra_writes_of_a_sweep_is_cleaned(tmp_path: Path) -> None:
    place = tmp_path / "multirun.yaml"
    place.write_text(
        f"overrides:\n- +x.api_key={TYPED[3]}\n- tracking.group=https://me:{TYPED[2]}@host\n",
        encoding="utf-8",
    )
    command.clean_sweep_file(place)
    assert (
        place.read_text(encoding="utf-8")
        == "overrides:\n- +x.api_key=***\n- tracking.group=https://***@host\n"
    )
