"""A real run as a job: stopped, it saves and ends; resumed from its page, it comes to its end."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.board.app import Place
from tests.board.acting import until
from tests.board.making import ORIGIN, client
from tests.offline import trl_tools

pytestmark = pytest.mark.slow
STEPS = 400


def test_a_run_is_stopped_and_resumed_from_the_page(
    tmp_path: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).resolve().parents[3]
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    trl_tools.write_rows(tmp_path / "sft.jsonl", trl_tools.sft_rows(30))
    place = Place(tmp_path / "my runs", tmp_path / "uploads", 1 << 20, False)
    argv = [
        "stage=sft",
        f'run.dir="{place.runs}"',
        "run.name=film",
        f"model.path={tiny_model()}",
        f"data.path={tmp_path / 'sft.jsonl'}",
        f"stage.steps={STEPS}",
        "stage.batch_size=8",
        "stage.max_length=48",
        "model.dtype=float32",
        "engine.threads=1",
        "tracking=none",
    ]
    job = place.jobs.submit(argv, title="film: sft", run="film", stage="sft")
    browser = client(place)

    def steps() -> int:
        text = browser.get("/runs/film/sft/live").json()["steps"]
        assert place.jobs.job(job.id).is_active, place.jobs.output(job.id, 0)[0].decode()
        return int(text or 0)

    until(lambda: steps() >= 5, 240)
    assert 'class="curve"' in browser.get("/runs/film/sft").text
    assert browser.post(f"/jobs/{job.id}/stop", headers=ORIGIN).status_code == 303
    until(lambda: not place.jobs.job(job.id).is_active, 120)
    stopped = place.jobs.job(job.id)
    assert (stopped.state, stopped.exit_code) == ("stopped", 143)
    folder = place.runs / "film" / "sft"
    assert list((folder / "checkpoints").iterdir()) and not (folder / "summary.json").exists()
    assert "stopped" in browser.get("/runs/film/sft").text

    assert browser.post("/runs/film/sft/resume", headers=ORIGIN).status_code == 303
    again = place.jobs.of_run("film", "sft")
    assert again is not None and again.id != job.id
    until(lambda: not place.jobs.job(again.id).is_active, 400)
    output = place.jobs.output(again.id, -4000)[0].decode()
    assert place.jobs.job(again.id).state == "ended", output
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert browser.get("/runs/film/sft/live").json()["steps"] == str(STEPS)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert len(manifest["starts"]) == 2 and manifest["starts"][1]["step"] > 0
    assert "/new/reward?" in browser.get("/runs/film/sft").text
