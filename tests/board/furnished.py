"""A folder of runs with something on every page of the rooms."""

import json
from pathlib import Path
from typing import Any

from rlhf.labels.ledger import write_export
from tests.acting import turning_policy
from tests.board.making import metric_line
from tests.labels.page_exports import pairs

FOUND = (
    ("python", "ok", "3.11.7", ""),
    ("disk", "fail", "0.4 GiB left for runs", "delete old runs, or choose another run.dir"),
    ("vllm", "warn", "not installed", "rollout=hf works without it"),
    ("gpu", "info", "none: everything runs on the CPU", ""),
)
PAIRS = "prompt,chosen,rejected\nHi,Hello you,Go away\nWhy?,Because.,No.\n"


def furnish(folder: Path) -> Path:
    """`folder`/runs with an upload, an export of labels, two models and the doctor's findings."""
    runs = folder / "runs"
    model = runs / "demo" / "sft" / "model"
    model.parent.mkdir(parents=True)
    turning_policy(model)
    _finish(model.parent, "sft", {"eval_loss": 1.5}, [])
    lines = [metric_line(step, loss=1.5 + 2 / step, grad_norm=1.0) for step in range(1, 31)]
    (model.parent / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    reward = runs / "demo" / "reward" / "model"
    reward.mkdir(parents=True)
    head = {"architectures": ["LlamaForSequenceClassification"]}
    (reward / "config.json").write_text(json.dumps(head))
    parent = {"kind": "policy", "path": str(model), "from": {"run": "../sft", "stage": "sft"}}
    _finish(reward.parent, "reward", {"accuracy": 0.75}, [parent])
    write_export(pairs(3), runs / "people" / "label")
    (runs / "people" / "label" / "config.yaml").touch()
    uploads = runs / ".board" / "uploads"
    uploads.mkdir(parents=True)
    (uploads / "pairs.csv").write_text(PAIRS)
    doctor = runs / ".board" / "doctor"
    doctor.mkdir()
    findings = [
        {"name": name, "state": state, "found": found, "remedy": remedy}
        for name, state, found, remedy in FOUND
    ]
    (doctor / "findings.json").write_text(json.dumps({"findings": findings}))
    return runs


def _finish(
    folder: Path, stage: str, metrics: dict[str, float], parents: list[dict[str, Any]]
) -> None:
    summary = {"stage": stage, "steps": 3, "wall_s": 1.0, "metrics": metrics, "model": "model"}
    (folder / "summary.json").write_text(json.dumps(summary))
    manifest = {"stage": stage, "parents": parents, "data": [], "starts": []}
    (folder / "manifest.json").write_text(json.dumps(manifest))
