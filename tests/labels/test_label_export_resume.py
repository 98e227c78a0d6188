"""label.mode=export stopped and gone on with: nothing is lost, written twice, pushed twice or
changed under people's hands.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from conf.choices import Dtype
from conf.labelling import LabelConfig
from rlhf.data.loading import DataRequest
from rlhf.labels import server
from rlhf.labels.export_figures import import_command
from rlhf.labels.kept_answers import answers_key, read_kept
from rlhf.labels.ledger import read_export
from rlhf.labels.records import Export
from rlhf.stages.labelling import answers as label_answers
from rlhf.stages.labelling import exporting as label_export
from rlhf.types import UserError
from tests.labels.label_steps import Tiny, configured, content, run_export, two

pytestmark = pytest.mark.usefixtures("one_thread")


# --- stopping and going on
# ------------------------------------------------------------------------------------------


class Loud:
    """A server that fails as often as it is told to, and remembers what it got."""

    def __init__(self, failures: int) -> None:
        self.failures, self.got = failures, list[tuple[str, str, str]]()

    def push(self, export: Export, *, url: str, token: str) -> int:
        if self.failures:
            self.failures -= 1
            raise UserError(f"{url} can't be reached.")
        self.got.append((export.id, url, token))
        return 40 + len(self.got)


def test_a_failed_push_loses_nothing(
    tmp_path: Path, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    loud = Loud(failures=1)
    monkeypatch.setattr(server, "push", loud.push)
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "secret-token")
    chosen = [
        f"model.path={tiny_model()}",
        "label.push=true",
        "label.url=http://localhost:8080",
        "label.budget=4",
    ]
    with pytest.raises(UserError, match=r"can't be reached. Nothing is lost: .* run.resume=true"):
        run_export(tmp_path, *chosen)
    place = tmp_path / "default/label"
    first = read_export(place)
    assert (
        (place / "out/label_tasks.jsonl").exists()
        and not (place / "summary.json").exists()
        and not (place / "server.json").exists()
    )
    monkeypatch.setattr(label_answers, "_generate", lambda *_: pytest.fail("it generated again"))
    (place / "out/label_tasks.jsonl").write_text("labels by now\n", encoding="utf-8")
    _, again = run_export(tmp_path, *chosen, "run.resume=true", "label.targets=[jsonl,csv]")
    assert again == first and loud.got == [(first.id, "http://localhost:8080", "secret-token")]
    assert json.loads((place / "server.json").read_text(encoding="utf-8")) == {
        "url": "http://localhost:8080",
        "project": 41,
    }
    assert (place / "out/label_tasks.jsonl").read_text(encoding="utf-8") == "labels by now\n" and (
        place / "out/label_sheet.csv"
    ).exists()
    manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
    assert (
        manifest["server"]["project"] == 41
        and len(manifest["parents"]) == 1
        and len(manifest["starts"]) == 2
    )
    assert (
        json.loads((place / "summary.json").read_text(encoding="utf-8"))["metrics"]["label/main"]
        == 4
    )
    run_export(tmp_path, *chosen, "run.resume=true")
    assert len(loud.got) == 1, "the tasks were pushed twice"
    with pytest.raises(
        UserError,
        match=r"is project 41 of http://localhost:8080 already.*http://elsewhere",
    ):
        run_export(tmp_path, *chosen, "run.resume=true", "label.url=http://elsewhere")
    assert all(
        "secret-token" not in path.read_bytes().decode("utf-8", "replace")
        for path in place.rglob("*")
        if path.is_file()
    )


def test_what_people_may_be_labelling_is_not_changed(tmp_path: Path, tiny_model: Tiny) -> None:
    chosen = [f"model.path={tiny_model()}", "label.budget=3"]
    place, first = run_export(tmp_path, *chosen)
    summary = (place / "summary.json").read_bytes()
    with pytest.raises(
        UserError,
        match=r"made with other options \(label.budget: 3 -> 4; label.title: 'default' -> "
        r"'Which\?'\)",
    ):
        run_export(
            tmp_path,
            f"model.path={tiny_model()}",
            "label.budget=4",
            "label.title='Which?'",
            "run.resume=true",
        )
    assert (place / "summary.json").read_bytes() == summary and read_export(place) == first
    with pytest.raises(UserError, match=r"exists. Continue it with run.resume=true"):
        run_export(tmp_path, *chosen)
    run_export(tmp_path, f"model.path={tiny_model()}", "label.budget=4", "run.overwrite=true")
    assert len(read_export(place).tasks) == 4


def test_answers_of_a_stopped_export_are_not_written_again(
    tmp_path: Path, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = label_answers._generate
    written: list[str] = []

    def generate(*arguments: Any) -> Any:
        if len(written) == 1:
            written.append("killed")
            raise KeyboardInterrupt
        written.append(Path(arguments[0].model.path).name)
        return real(*arguments)

    monkeypatch.setattr(label_answers, "_generate", generate)
    with pytest.raises(KeyboardInterrupt):
        run_export(tmp_path, *two(tiny_model))
    _, export = run_export(tmp_path, *two(tiny_model), "run.resume=true")
    assert written == [tiny_model().name, "killed", tiny_model(tied=False).name]
    _, straight = run_export(tmp_path, *two(tiny_model), "run.name=straight")
    assert content(export) == content(straight)


def test_kept_answers_of_other_options_are_not_taken(tmp_path: Path, tiny_model: Tiny) -> None:
    place, _ = run_export(tmp_path, f"model.path={tiny_model()}")
    cfg = configured(tmp_path, f"model.path={tiny_model()}")
    file = place / "answers/1.jsonl"
    paths, request = {"policy": str(tiny_model())}, DataRequest.of(cfg)
    [policy] = label_answers.read_policies(paths, cfg.model, request, None)
    model, dtype, prompts = str(tiny_model()), cfg.model.dtype, policy.prompts
    keys = []
    for change in ([], ["rollout.temperature=0.5"], ["rollout.max_response_length=5"]):
        rollout = configured(tmp_path, f"model.path={tiny_model()}", *change).rollout
        keys.append(answers_key(model, dtype, rollout, prompts, 4, 7))
    keys += [
        answers_key(str(tiny_model(tied=False)), dtype, cfg.rollout, prompts, 4, 7),
        answers_key(model, Dtype.float16, cfg.rollout, prompts, 4, 7),
        answers_key(model, dtype, cfg.rollout, prompts[1:], 4, 7),
        answers_key(model, dtype, cfg.rollout, prompts, 3, 7),
        answers_key(model, dtype, cfg.rollout, prompts, 4, 8),
    ]
    assert len(set(keys)) == len(keys)
    right = json.loads(file.read_text(encoding="utf-8").splitlines()[0])["key"]
    kept = read_kept(file, right, prompts, 4)
    assert kept is not None and len(kept) == 24 and read_kept(file, "another", prompts, 4) is None


def test_every_option_is_part_of_an_export_or_may_change() -> None:
    """A new option of the label group has to be put on one side."""
    later = {
        "mode",
        "targets",
        "push",
        "pull",
        "url",
        "project",
        "token_env",
        "export",
        "files",
        "aggregate",
        "min_labels",
        "min_confidence",
    }
    later |= {"annotator", "min_gold_accuracy", "strength", "eval_fraction"}
    assert {f.name for f in dataclasses.fields(LabelConfig)} == later | {
        *label_export._QUESTION_OPTIONS,
        *label_export._TASK_OPTIONS,
    }


def test_the_next_command_brings_the_labels_back(tmp_path: Path) -> None:
    from_file = import_command("two words", str(tmp_path), "http://x", None)
    assert from_file == (
        f"python -m rlhf stage=label label.mode=import 'run.name=two words' run.dir={tmp_path} "
        "label.files=[FILE]"
    )
    from_server = import_command("two words", str(tmp_path), "http://x", 7)
    assert from_server.endswith("label.pull=true label.url=http://x")
