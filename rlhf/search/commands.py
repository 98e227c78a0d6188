"""What a trial runs: the commands of its stages.

A trial is a run of its own, in ``trials/<number>`` of the search's directory. What it reads is the
project's: a path that a preset builds from ``run.dir`` and ``run.name`` keeps naming the directory
that the stages of the project share. The stage after the searched one reads that trial's output in
place of the project's.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.methods import SearchStage
from conf.run import RunConfig
from conf.schema import GROUPS
from rlhf.cli import config, writing
from rlhf.run.directory import run_directory
from rlhf.search.space import Parameter, complete

TRIALS = "trials"
_OURS = ("stage", "run.name", "run.dir", "run.resume", "run.overwrite", "run.dry_run")
_TRIAL = "a-trial"  # stands for a trial's name while commands are made
_RECIPE = "data.recipe"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRun:
    """A stage of a trial."""

    stage: str
    directory: Path  # its run directory
    command: tuple[str, ...]


class Commands:
    """The commands of a search's trials."""

    def __init__(
        self,
        stage: SearchStage,
        run: RunConfig,
        folder: Path,
        argv: Sequence[str],
        group: str,
    ) -> None:
        """`folder`: the search's run directory; `argv`: its command line, whose other options the
        trials get too; `group`: tracking.group of the trials.
        """
        self.stage, self.run = stage, run
        self.trials = folder / TRIALS
        self.group = group
        self.shared = [override for override in argv if not _is_ours(override)]
        self._paths: dict[tuple[str, ...], list[str]] = {}

    def check(self, parameters: Sequence[Parameter]) -> None:
        """All stages compose, and every choice of a group is a preset. Raises UserError."""
        for parameter in parameters:
            if parameter.key in GROUPS:
                for choice in parameter.choices:
                    config.check_overrides([*self._own(), writing.override(parameter.key, choice)])
        self.stages(0, {})

    def stages(self, number: int, setting: Mapping[str, Any]) -> list[StageRun]:
        """What trial `number` runs with the values of `setting`, one after the other. Raises
        UserError where they don't go together.
        """
        base = self._own()
        values = []
        for key, value in setting.items():
            override = writing.override(key, value)
            if key in GROUPS:
                base.append(override)
            else:
                values.append(override)
        out = [self._stage(number, base, [*base, *values], "")]
        if self.stage.then is not None:
            own = _overrides(self.stage.then_options)
            after = [f"stage={self.stage.then}", *self.shared, *own]
            out.append(self._stage(number, after, after, self.stage.of))
        return out

    def own(self) -> list[str]:
        """The overrides of the searched stage that all trials share."""
        return [*self.shared, *_overrides(self.stage.options)]

    def _own(self) -> list[str]:
        return [f"stage={self.stage.of}", *self.own()]

    def _stage(
        self, number: int, base: Sequence[str], overrides: Sequence[str], built_on: str
    ) -> StageRun:
        """`base`: what the paths follow from; `built_on`: the stage whose output it reads, empty
        for none.
        """
        paths = self._paths_of(base, built_on)
        name = f"{number:04d}"
        arguments = list(overrides)
        arguments += [text.replace(_TRIAL, name) for text in paths]
        arguments += self._living(name)
        composed = config.compose(arguments)
        command = (sys.executable, "-m", "rlhf", *arguments)
        return StageRun(
            stage=composed.stage.name, directory=run_directory(composed), command=command
        )

    def _living(self, name: str) -> list[str]:
        return [
            writing.override("run.dir", str(self.trials)),
            f'run.name="{name}"',
            writing.override("tracking.group", self.group),
        ]

    def _paths_of(self, base: Sequence[str], built_on: str) -> list[str]:
        """Overrides for the options whose values would otherwise follow the trial's run.dir and
        run.name.
        """
        key = (built_on, *base)
        if key not in self._paths:
            self._paths[key] = self._made_paths(base, built_on)
        return self._paths[key]

    def _made_paths(self, base: Sequence[str], built_on: str) -> list[str]:
        project = [
            writing.override("run.dir", self.run.dir),
            writing.override("run.name", self.run.name),
        ]
        wanted = _flat(config.compose([*base, *project]))
        got = _flat(config.compose([*base, *self._living(_TRIAL)]))
        wanted[_RECIPE] = "none"  # made by the search, once for all trials
        moved = ""
        if built_on:
            moved = f"{self.run.dir}/{self.run.name}/{built_on}"
        here = f"{self.trials}/{_TRIAL}/{built_on}"
        out = []
        for name, value in wanted.items():
            if name.startswith(("run.", "tracking.")):
                continue
            meant = _moved(value, moved, here)
            if meant != got.get(name):
                out.append(writing.override(name, meant))
        return out


def _is_ours(override: str) -> bool:
    """Whether an override is the search's own: not for its trials."""
    key = override.lstrip("+").partition("=")[0]
    return key in _OURS or key.startswith("stage.") or key == "tracking.group"


def _overrides(options: Mapping[str, Any]) -> list[str]:
    """Options of a stage as overrides; a whole group by a dictionary, a preset by its name."""
    out = []
    for name, value in options.items():
        key = complete(name)
        if "." not in key and isinstance(value, dict) and value:
            for option, held in value.items():
                out.append(writing.override(f"{key}.{option}", held))
        else:
            out.append(writing.override(key, value))
    return out


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The options of a configuration by dotted key, enumerations as texts."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(inner):
            out |= _flat(inner, f"{key}.")
        else:
            out[key] = _plain(inner)
    return out


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out = {}
        for field in dataclasses.fields(value):
            out[field.name] = _plain(getattr(value, field.name))
        return out
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return getattr(value, "value", value)


def _moved(value: Any, before: str, after: str) -> Any:
    """A value with the directory `after` in place of `before` in its paths."""
    if not before:
        return value
    if isinstance(value, dict):
        return {key: _moved(inner, before, after) for key, inner in value.items()}
    if isinstance(value, list):
        return [_moved(inner, before, after) for inner in value]
    if isinstance(value, str) and (value == before or value.startswith(f"{before}/")):
        return f"{after}{value.removeprefix(before)}"
    return value
