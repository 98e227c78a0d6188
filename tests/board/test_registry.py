"""Models of runs as the models page shows them."""

import json
from pathlib import Path
from typing import Any

from rlhf.board.registry import models, policies
from tests.board.rooms import board


def made(
    runs: Path, run: str, stage: str, files: dict[str, Any], manifest: dict[str, Any] | None = None
) -> Path:
    """A finished stage's directory with a model of these files."""
    folder = runs / run / stage
    model = folder / "model"
    model.mkdir(parents=True)
    for name, content in files.items():
        (model / name).write_text(json.dumps(content))
    metrics = {"eval_loss": 1.25, "tokens": 7, "name": "x"}
    summary = {"stage": stage, "model": "model", "metrics": metrics}
    (folder / "summary.json").write_text(json.dumps(summary))
    content = {"stage": stage, "parents": [], "data": []} | (manifest or {})
    (folder / "manifest.json").write_text(json.dumps(content))
    return model


def test_models_with_their_kind_parents_and_figures(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    sft = made(runs, "a", "sft", {"config.json": {"architectures": ["LlamaForCausalLM"]}})
    reward = {"config.json": {"architectures": ["LlamaForSequenceClassification"]}}
    made(runs, "a", "reward", reward)
    parents = [
        {"kind": "policy", "path": str(sft), "from": {"run": "../sft", "stage": "sft"}},
        {"kind": "reward", "path": "/elsewhere/model"},
        "odd",
    ]
    adapter = {"adapter_config.json": {"base_model_name_or_path": str(sft)}}
    made(runs, "a", "ppo", adapter, {"parents": parents})
    (runs / "b" / "sft").mkdir(parents=True)
    (runs / "b" / "sft" / "summary.json").write_text("{torn")
    (runs / "a" / "data").mkdir()
    (runs / "a" / "data" / "summary.json").write_text('{"stage": "data", "model": null}')
    found = {model.name: model for model in models(runs)}
    assert found.keys() == {"a/sft", "a/reward", "a/ppo"}
    assert found["a/reward"].is_reward and not found["a/sft"].is_reward
    assert found["a/ppo"].is_adapter and found["a/ppo"].base == str(sft)
    assert [(p.kind, p.run, p.stage) for p in found["a/ppo"].parents] == [
        ("policy", "a", "sft"),
        ("reward", None, None),
    ]
    assert found["a/sft"].figures == {"eval_loss": 1.25}
    assert {model.name for model in policies(runs)} == {"a/sft", "a/ppo"}


def test_what_an_evaluation_said(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    model = made(runs, "a", "sft", {"config.json": {}})
    folder = runs / "a" / "eval"
    folder.mkdir()
    metrics = {"eval/lexicon_after": 0.5, "eval/lexicon_before": 0.25, "eval/kl": 1.0}
    summary = {"stage": "eval", "model": None, "metrics": metrics}
    (folder / "summary.json").write_text(json.dumps(summary))
    parents = [{"kind": "before", "path": "/x"}, {"kind": "after", "path": str(model)}]
    manifest = {"stage": "eval", "parents": parents, "data": []}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    [found] = models(runs)
    assert [(line.run, line.stage, line.figures) for line in found.judged] == [
        ("a", "eval", {"lexicon": 0.5})
    ]


def test_the_page_links_to_what_can_be_done(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    path = made(runs, "a", "sft", {"config.json": {}})
    reward = {"config.json": {"architectures": ["LlamaForSequenceClassification"]}}
    made(runs, "a", "reward", reward)
    with board(tmp_path) as client:
        page = client.get("/models").text
    quoted = str(path).replace("/", "%2F")
    assert f"/new/export?model.path={quoted}&amp;run.name=a" in page
    assert f"/chat?model={quoted}" in page and "/runs/a/sft" in page
    assert f"/new/ppo?reward.path={quoted.replace('sft', 'reward')}" in page
    assert page.count("/new/export?") == 1  # a reward model writes no text
