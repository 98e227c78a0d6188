"""Runs with small files in place of weights, and versions of them."""

import json
from collections.abc import Mapping
from pathlib import Path

from rlhf.registry.entries import draft_of, run_figures
from rlhf.registry.records import Version, Why
from rlhf.registry.store import Registry

WHY = Why("ann", "a test")


def model(folder: Path, weights: bytes = b"weights") -> Path:
    """A directory that is a model's by its files' names."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def finished(
    folder: Path, metrics: Mapping[str, float], weights: bytes = b"weights", **manifest: object
) -> Path:
    """A finished run's directory with a model; returns the model's."""
    made = model(folder / "model", weights)
    content = {"stage": "dpo", "seed": 3, "parents": [], "data": [], "artifacts": [], **manifest}
    (folder / "manifest.json").write_text(json.dumps(content))
    summary = {"stage": "dpo", "metrics": dict(metrics), "model": "model"}
    (folder / "summary.json").write_text(json.dumps(summary))
    return made


def registered(registry: Registry, path: Path, name: str = "mine") -> Version:
    """A version of the model in `path`, with the figures of its run."""
    draft = draft_of(name, str(path), registry)
    return registry.register(draft, WHY, run_figures(draft))[0]
