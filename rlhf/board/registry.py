"""The models that runs left, read from their directories: what each is, what it was made of, and
what judges said.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf.board.paths import run_and_stage, run_directories
from rlhf.board.units import folder_bytes
from rlhf.models.directories import ADAPTER_CONFIG
from rlhf.run.directory import SUMMARY_FILE
from rlhf.run.manifest import read_manifest
from rlhf.run.models import is_classifier

_TELLING = ("accuracy", "loss", "score", "margin")  # in names of figures that tell of a model
_AFTER = re.compile(r"eval/(?P<name>.+)_after")  # figures of stage=eval: the model in question
_MOST_FIGURES = 6


@dataclass(frozen=True, slots=True)
class Parent:
    """What a model was made from."""

    kind: str  # policy, reward ...
    path: str
    run: str | None = None  # with stage: where it lies among the runs
    stage: str | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """What an evaluation said of a model."""

    run: str
    stage: str
    figures: dict[str, float]


@dataclass(frozen=True, slots=True)
class Made:
    """A model of a finished stage."""

    run: str
    stage: str
    path: Path
    is_reward: bool
    is_adapter: bool
    base: str | None  # of an adapter
    size: int  # bytes
    time: float  # of the run's end, seconds since 1970
    parents: tuple[Parent, ...] = ()
    figures: dict[str, float] = field(default_factory=dict)
    judged: tuple[Judged, ...] = ()

    @property
    def name(self) -> str:
        """run/stage"""
        return f"{self.run}/{self.stage}"


def models(runs: Path) -> list[Made]:
    """Every model of a finished stage below `runs`, the newest first."""
    judged = _evaluations(runs)
    found = []
    for run, stage, folder in run_directories(runs):
        made = _made(run, stage, folder, runs)
        if made is not None:
            lines = judged.get(made.path.resolve(), ())
            found.append(replace(made, judged=tuple(lines)))
    return sorted(found, key=lambda made: made.time, reverse=True)


def policies(runs: Path) -> list[Made]:
    """Those that write text."""
    return [made for made in models(runs) if not made.is_reward]


def _made(run: str, stage: str, stage_folder: Path, runs: Path) -> Made | None:
    """The model of a run; None where it left none, or can't be read."""
    summary = stage_folder / SUMMARY_FILE
    content = _json(summary)
    name = content.get("model")
    if not isinstance(name, str) or not (stage_folder / name).is_dir():
        return None
    path = stage_folder / name
    adapter = _json(path / ADAPTER_CONFIG)
    base = adapter.get("base_model_name_or_path")
    return Made(
        run=run,
        stage=stage,
        path=path,
        is_reward=is_classifier(path),
        is_adapter=bool(adapter),
        base=base if isinstance(base, str) else None,
        size=folder_bytes(path),
        time=summary.stat().st_mtime,
        parents=tuple(_parents(stage_folder, runs)),
        figures=_figures(content.get("metrics")),
    )


def _parents(folder: Path, runs: Path) -> Iterator[Parent]:
    manifest = read_manifest(folder) or {}
    for entry in manifest.get("parents", []):
        if not isinstance(entry, dict):
            continue
        kind, path = str(entry.get("kind", "")), str(entry.get("path", ""))
        origin = entry.get("from")
        if isinstance(origin, dict) and isinstance(origin.get("run"), str):
            made = run_and_stage(folder / origin["run"], runs)
            if made is not None:
                yield Parent(kind, path, *made)
                continue
        yield Parent(kind, path)


def _figures(metrics: Any) -> dict[str, float]:
    """The few figures that tell how good a model is."""
    if not isinstance(metrics, dict):
        return {}
    telling = {
        key: float(value)
        for key, value in metrics.items()
        if isinstance(value, (int, float)) and any(word in key for word in _TELLING)
    }
    return dict(list(telling.items())[:_MOST_FIGURES])


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _evaluations(runs: Path) -> dict[Path, list[Judged]]:
    """What each stage=eval said, by the directory of the model that it had as `after`."""
    out: dict[Path, list[Judged]] = {}
    for run, stage, folder in run_directories(runs):
        content = _json(folder / SUMMARY_FILE)
        metrics = content.get("metrics")
        if content.get("stage") != "eval" or not isinstance(metrics, dict):
            continue
        matches = ((_AFTER.fullmatch(key), value) for key, value in metrics.items())
        figures = {
            match["name"]: float(value)
            for match, value in matches
            if match is not None and isinstance(value, (int, float))
        }
        line = Judged(run, stage, figures)
        for parent in _parents(folder, runs):
            if parent.kind == "after":
                out.setdefault(Path(parent.path).resolve(), []).append(line)
    return out
