"""model.revision: a hub's model at a branch or a commit, out of the hub's cache."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.__main__ import main
from rlhf.models.directories import pinned
from rlhf.types import UserError

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two commits of owner/model, as the hub's library lays it out."""
    import huggingface_hub.constants

    model = tmp_path / "models--owner--model"
    for branch, commit in COMMITS.items():
        snapshot = model / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps({"branch": branch}))
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / branch).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return model / "snapshots"


def test_a_branch_or_a_commit_is_its_directory(cache: Path) -> None:
    for branch, commit in COMMITS.items():
        for revision in (branch, commit):
            assert Path(pinned("owner/model", revision)) == cache / commit


def test_what_is_not_there_and_a_directory_are_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.revision=v2"):
        pinned("owner/model", "v2")
    with pytest.raises(UserError, match=r"no hub's name"):
        pinned(str(tmp_path), "v1")


def test_a_command_goes_on_with_the_directory(
    cache: Path, tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_model(), cache / COMMITS["v1"], dirs_exist_ok=True)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 20, encoding="utf-8")
    given = ["stage=sft", "run.dry_run=true", f"run.dir={tmp_path}", f"data.path={rows}"]
    given += ["model.path=owner/model", "model.revision=v1", "tracking=none"]
    assert main([*given, "stage.steps=1", "stage.batch_size=2", "stage.max_length=32"]) == 0
    shown = capsys.readouterr().out
    assert f"path: {cache / COMMITS['v1']}" in shown and "revision: null" in shown
