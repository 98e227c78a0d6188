"""A trial's setting as options of an experiment: what its command line said, without what only
said where and how it ran.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.run import RunConfig
from rlhf.cli import writing
from rlhf.cli.presets import CONF_DIR, choices

_EXPERIMENT, _SEARCH_PATH = "experiment", "hydra.searchpath"
_STAGES = "experiment/stages"
# Options of how a search ran, not of what its trials were.
_HOW = ("run.", "tracking.", "launch.", "hydra.")
_HOW_GROUPS = ("stage", "tracking", "launch", "hydra")


@dataclass(slots=True)
class Setting:
    """A trial's options in the parts of an experiment."""

    groups: dict[str, Any] = field(default_factory=dict)  # for all stages: values and presets
    stage: dict[str, Any] = field(default_factory=dict)  # for the searched stage alone
    base: str | None = None  # the experiment that it builds on
    folders: list[str] = field(default_factory=list)  # with presets of the user's own


def setting_of(overrides: Sequence[str], setting: Mapping[str, Any]) -> Setting:
    """The parts of a trial: `overrides` that all trials share, and its own values."""
    out = Setting()
    pairs = [writing.reading(text) for text in overrides if not text.startswith("-")]
    for key, value in [*pairs, *setting.items()]:
        if key == _EXPERIMENT:
            out.base = value
        elif key == _SEARCH_PATH:
            out.folders = list(value)
        elif key.startswith("stage."):
            out.stage[key] = _merged(out.stage.get(key), value)
        elif key not in _HOW_GROUPS and not key.startswith(_HOW):
            out.groups[key] = _merged(out.groups.get(key), value)
    return out


def _merged(before: Any, value: Any) -> Any:
    """Two values of one option: dictionaries have the items of both."""
    if not isinstance(before, dict) or not isinstance(value, dict):
        return value
    out = dict(before)
    for key, inner in value.items():
        out[key] = _merged(out.get(key), inner)
    return out


def stage_base(setting: Setting, stage: str) -> str | None:
    """What the base sets for `stage` alone, as a preset of experiment/stages; None for nothing."""
    if setting.base is None:
        return None
    name = f"{setting.base}_{stage}"
    folders = [CONF_DIR]
    for place in setting.folders:
        folders.append(Path(place.removeprefix("file://")))
    for folder in folders:
        if (folder / _STAGES / f"{name}.yaml").is_file():
            return name
    return None


def experiment_name(run: str, trial: int | None) -> str:
    """The preset's name: the run's, and the trial's number where it is not the best by itself."""
    plain = re.sub(r"[^\w-]+", "_", run).strip("_") or "search"
    name = f"{plain}_best"
    if trial is not None:
        name = f"{plain}_trial_{trial}"
    if name in choices(_EXPERIMENT):
        return f"{name}_found"
    return name


def command(
    name: str, stage: str, folder: Path, folders: Sequence[str], run: RunConfig
) -> list[str]:
    """The overrides that run the experiment `name` in `folder`/experiment/, with the files of the
    project `run`.
    """
    searched = ",".join([f"file://{folder.resolve()}", *folders])
    overrides = [f"stage={stage}", f"{_SEARCH_PATH}=[{searched}]", f"{_EXPERIMENT}={name}"]
    if run.dir != RunConfig().dir:
        overrides.append(writing.override("run.dir", run.dir))
    overrides.append(writing.override("run.name", run.name))
    return overrides
