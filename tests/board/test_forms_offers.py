"""What a form offers where a file or a model is asked for."""

import os
from pathlib import Path

from rlhf.board.forms.basic import stages
from rlhf.board.forms.fields import form_of
from rlhf.board.forms.offers import OFFERED, offers


def test_uploads_and_what_runs_left_newest_first(tmp_path: Path) -> None:
    runs, uploads = tmp_path / "runs", tmp_path / "uploads"
    for folder in ("a/sft/model", "b/grpo/model", "b/reward/model", "b/sft/checkpoints"):
        (runs / folder).mkdir(parents=True)
        (runs / folder).parent.joinpath("config.yaml").touch()
    uploads.mkdir()
    (runs / "b/data").mkdir()
    for number, path in enumerate([uploads / "x.csv", uploads / "y.csv", runs / "b/data/z.jsonl"]):
        path.write_text("x")
        os.utime(path, (number, number))
    os.utime(runs / "a/sft/model", (5, 5))
    found = offers(runs, uploads)
    assert [Path(path).name for path in found["data"]] == ["y.csv", "x.csv", "z.jsonl"]
    assert found["rewards"] == [str(runs / "b/reward/model")]
    assert found["models"] == [str(runs / "b/grpo/model"), str(runs / "a/sft/model")]
    assert offers(tmp_path / "none", tmp_path / "no") == {"data": [], "models": [], "rewards": []}


def test_every_offer_has_a_field() -> None:
    keys = {each.key for stage in stages() for each in form_of(stage, False)}
    assert set(OFFERED) <= keys
