"""Run directories without a run, and a browser's part without a browser."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf.board.app import Place, create_app
from rlhf.board.guard import Doors
from rlhf.board.pages import PAGES

HOST = "127.0.0.1:7860"
ORIGIN = {"origin": f"http://{HOST}"}


def metric_line(step: int, **metrics: Any) -> str:
    return json.dumps({"step": step, "time_s": step * 1.5, **metrics})


def stage(
    runs: Path, run: str, name: str, steps: Iterable[int] = range(1, 11), ended: bool = False
) -> Path:
    """A run directory with a line for each step: the loss falls from 2 by 1 / 100 a step."""
    folder = runs / run / name
    folder.mkdir(parents=True)
    lines = [metric_line(step, loss=2 - step / 100, grad_norm=1.0) for step in steps]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / "config.yaml").write_text("run: {}\n")
    start = {"time": "2026-11-30T20:00:00+00:00", "argv": [f"stage={name}", "data.path=rows.jsonl"]}
    manifest = {
        "stage": name,
        "seed": 7,
        "versions": {"python": "3.11", "torch": "2.13.0"},
        "commit": {"sha": "abc123", "dirty": False},
        "parents": [{"kind": "policy", "path": "base/model", "weights": "0123456789abcdef"}],
        "data": [{"path": "rows.jsonl", "sha256": "f" * 64, "bytes": 12}],
        "starts": [{**start, "step": 0}],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if ended:
        (folder / "model").mkdir()
        summary = {"stage": name, "steps": 10, "wall_s": 61.0, "peak_rss_mb": 512.0}
        summary |= {"metrics": {"eval_loss": 1.25, "note": "<i>x</i>"}, "model": "model"}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def client(place: Place) -> Any:
    """A client that the board has let in."""
    from starlette.testclient import TestClient

    doors = Doors(announce=lambda word: None)
    app = create_app(place, doors, [HOST], PAGES)
    made = TestClient(app, base_url=f"http://{HOST}", follow_redirects=False)
    assert made.get(f"/?token={doors.word}").status_code == 303
    return made
