"""Names from requests never lead out of run.dir or the folder of uploads."""

from pathlib import Path

import pytest

from rlhf.board.app import Place
from rlhf.board.paths import NotHere, plain_name, run_folder, stage_file, stage_folder, upload


@pytest.fixture
def place(tmp_path: Path) -> Place:
    runs, uploads = tmp_path / "runs", tmp_path / "uploads"
    stage = runs / "film <b> 电影" / "sft"
    stage.mkdir(parents=True)
    (stage / "metrics.jsonl").write_text("{}\n")
    uploads.mkdir()
    (uploads / "rows.csv").write_text("a,b\n")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_text("secret")
    return Place(runs, uploads, 1 << 20, False)


def test_what_is_there_is_given(place: Place) -> None:
    run = "film <b> 电影"
    assert run_folder(place, run) == place.runs / run
    assert stage_folder(place, run, "sft") == place.runs / run / "sft"
    assert stage_file(place, run, "sft", "metrics.jsonl").name == "metrics.jsonl"
    assert upload(place, "rows.csv") == place.uploads / "rows.csv"


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../outside", "a/b", "a\\b", ".board", "/etc", "a\0b", "x" * 256, "\ud800"],
)
def test_names_that_lead_elsewhere_are_refused(place: Place, name: str) -> None:
    with pytest.raises(NotHere):
        plain_name(name)
    with pytest.raises(NotHere):
        run_folder(place, name)
    with pytest.raises(NotHere):
        upload(place, name)


def test_what_is_missing_or_of_another_kind_is_refused(place: Place) -> None:
    run = "film <b> 电影"
    for stage in ("ppo", "sft2"):
        with pytest.raises(NotHere):
            stage_folder(place, run, stage)
    with pytest.raises(NotHere):
        stage_file(place, run, "sft", "summary.json")
    (place.runs / "file").write_text("no folder")
    with pytest.raises(NotHere):
        run_folder(place, "file")


def test_links_out_are_refused_and_links_inside_are_followed(place: Place, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (place.runs / "out").symlink_to(outside)
    (place.runs / "film <b> 电影" / "out").symlink_to(outside)
    (place.runs / "film <b> 电影" / "sft" / "secret.txt").symlink_to(outside / "secret.txt")
    (place.uploads / "secret.txt").symlink_to(outside / "secret.txt")
    (place.runs / "circle").symlink_to(place.runs / "circle")
    (place.runs / ".board").mkdir()
    (place.runs / "hidden").symlink_to(place.runs / ".board")
    for run in ("out", "circle", "hidden"):
        with pytest.raises(NotHere):
            run_folder(place, run)
    with pytest.raises(NotHere):
        stage_folder(place, "film <b> 电影", "out")
    with pytest.raises(NotHere):
        stage_file(place, "film <b> 电影", "sft", "secret.txt")
    with pytest.raises(NotHere):
        upload(place, "secret.txt")
    (place.runs / "again").symlink_to(place.runs / "film <b> 电影")
    assert run_folder(place, "again").is_dir()
