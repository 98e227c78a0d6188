"""What a visitor may not set: code, other machines, secrets, files elsewhere."""

import inspect
import re
from pathlib import Path

import pytest

from conf.preparation import STEPS
from conf.stages import STAGES
from rlhf.board.forms import allowed
from rlhf.board.forms.basic import stages
from rlhf.board.forms.fields import Scalar, Widget, form_of
from rlhf.cli.options import NAME, valid_keys


@pytest.mark.parametrize("schema", ["sft", "ppo", "eval", "label", "data", "export", "serve"])
def test_no_field_runs_code_or_reaches_out(schema: str) -> None:
    keys = {each.key for each in form_of(schema, False)}
    inner = {inner.key for each in form_of(schema, False) for inner in each.inner}
    forbidden = {"url", "token_env", "function", "judge_function", "python", "push", "pull", "env"}
    forbidden |= {"trust_remote_code", "setup", "servers", "entity", "isolation", "script", "host"}
    assert not {key.split(".")[-1] for key in keys} & forbidden
    assert not inner & forbidden
    assert not {key for key in keys if key.startswith("launch")} and "run.dir" not in keys


def test_refused_and_path_options_exist() -> None:
    known = {*valid_keys(list(STAGES))}
    steps = {key for key in allowed.PATHS if key.startswith("data.pipeline.")}
    assert known >= allowed.REFUSED
    assert allowed.PATHS - steps <= known
    assert set(allowed.REFUSED).isdisjoint(allowed.PATHS)


def test_every_option_about_files_is_known_as_a_path() -> None:
    """By its sentence, so that a new one can't name files elsewhere; but for names of other
    things.
    """
    found = set()
    about = re.compile(r"\b(files?|director(y|ies))\b", re.IGNORECASE)
    for stage in stages():
        for field in form_of(stage, False):
            inside = [(f"{field.key}.{NAME}.{each.key}", each) for each in field.inner]
            for key, each in [(field.key, field), *inside]:
                is_text = each.scalar in (Scalar.text, Scalar.anything) and not each.choices
                if each.option is not None and is_text and about.search(each.option.info.doc):
                    found.add(key)
    names = {"data.columns", "model.gguf_file", "run.name", "stage.license", "stage.title"}
    assert found - names <= allowed.PATHS


def test_every_file_of_a_step_is_known_as_a_path() -> None:
    named = set()
    for step in STEPS.values():
        named |= set(re.findall(r'"(\w+)": self\.', inspect.getsource(step.files)))
    assert named == {key.split(".")[-1] for key in allowed.PATHS if "pipeline" in key}
    assert any("translator" in step.__dataclass_fields__ for step in STEPS.values())


def test_kinds_with_code_are_no_choices() -> None:
    by_key = {each.key: each for each in form_of("ppo", False)}
    (kind,) = (inner for inner in by_key["reward.terms"].inner if inner.key == "kind")
    assert "math" in kind.choices and not {"function", "remote"} & set(kind.choices)
    assert "tools" in by_key["environment"].choices
    assert not {"python", "http"} & set(by_key["environment"].choices)
    assert by_key["environment"].widget is Widget.preset


@pytest.mark.parametrize("name", ["run", "my run", "läufe", "a.b", "x=1,2", "a/b"])
def test_names_of_runs(name: str) -> None:
    assert allowed.is_run_name(name)


_NO_FOLDER = ["", ".", "..", ".board", "../x", "/tmp/x", "~x", "a\\b", "a..b", "x" * 101]


@pytest.mark.parametrize("name", [*_NO_FOLDER, "a//b", "a/.b", "a/b/c/d/e"])
def test_names_that_are_no_plain_folder(name: str) -> None:
    assert not allowed.is_run_name(name)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    inside = tmp_path / "uploads"
    inside.mkdir()
    (inside / "rows.jsonl").write_text("{}\n")
    (tmp_path / "secret.jsonl").write_text("{}\n")
    (inside / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (inside / "linked").symlink_to(tmp_path)
    return [inside]


_INSIDE = ["{in}/rows.jsonl", "{in}/rows.jsonl#500", "{in}/rows*.jsonl", "{in}"]


@pytest.mark.parametrize("text", [*_INSIDE, "owner/name", "gpt2"])
def test_files_inside_and_names_of_a_hub(folders: list[Path], text: str) -> None:
    assert allowed.is_within("data.path", text.replace("{in}", str(folders[0])), folders)


@pytest.mark.parametrize(
    "text",
    [
        "/etc/passwd",
        "{in}/../secret.jsonl",
        "{in}/link.jsonl",
        "{in}/link.jsonl#5",
        "{in}/linked/secret.jsonl",
        "{in}/l*.jsonl",
        "{in}/*/../../secret.jsonl",
        "{in}/linked/*.jsonl",
        "/etc/*",
        "~/.ssh/id_rsa",
        "../secret.jsonl",
        "..",
        "{in}/\x00",
    ],
)
def test_files_outside(folders: list[Path], text: str) -> None:
    assert not allowed.is_within("data.path", text.replace("{in}", str(folders[0])), folders)
    for key in (f"reward.terms.{NAME}.paths", "model.path", "label.policies"):
        assert not allowed.is_within(key, text.replace("{in}", str(folders[0])), folders)


def test_texts_that_may_be_files(folders: list[Path]) -> None:
    assert allowed.is_within("label.instructions", "Which answer is better? See /etc.", folders)
    assert not allowed.is_within("label.instructions", "/etc/motd.txt", folders)
    assert not allowed.is_within("label.instructions", "/etc/passwd", folders)  # it exists
    assert allowed.is_within("data.chat_template", "chatml", folders)
    assert not allowed.is_within("data.chat_template", "/etc/x.jinja", folders)
    assert not allowed.is_within("data.chat_template", "/no/such/file", folders)
    assert allowed.is_within("stage.title", "/etc/passwd", folders)  # no file


def test_no_experiment_starts_processes_elsewhere() -> None:
    import yaml

    from rlhf.cli.presets import CONF_DIR

    for path in (CONF_DIR / "experiment").rglob("*.yaml"):
        held = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert "kind" not in held.get("launch", {}), path
        assert "override /launch" not in str(held.get("defaults")), path
