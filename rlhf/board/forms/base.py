"""What the presets alone give: a form shows it, and only what differs from it becomes an override.

Hydra's state is global, so one lock is around every composition of the board.
"""

import functools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from conf.schema import GROUPS, Config
from rlhf.board.forms.fields import NONE, Form
from rlhf.board.forms.values import plain
from rlhf.cli import config
from rlhf.cli.presets import CONF_DIR
from rlhf.cli.writing import override
from rlhf.types import UserError

EXPERIMENT = "experiment"
_RATES = ("stage.learning_rate", "stage.critic_learning_rate")
_LOCK = threading.Lock()


def compose(overrides: Sequence[str]) -> Config:
    """`rlhf.cli.config.compose`, one at a time. Raises UserError."""
    with _LOCK:
        return config.compose(overrides)


@dataclass(frozen=True)
class Presets:
    """The preset of each group, and those that the stage and the experiment give by themselves."""

    chosen: Mapping[str, str]
    given: Mapping[str, str]

    @property
    def overrides(self) -> list[str]:
        """Those that a command line has to name."""
        return [
            f"{group}={name}" for group, name in self.chosen.items() if name != self.given[group]
        ]


def given_presets(stage: str, experiment: str) -> dict[str, str]:
    """The presets of conf/config.yaml, and those that an experiment puts in their place."""
    given = dict(_defaults(CONF_DIR / "config.yaml"))
    given[EXPERIMENT] = NONE
    if experiment != NONE:
        folder = CONF_DIR / EXPERIMENT
        # the outermost file of an experiment wins, and Hydra reads its own before its stage's
        given |= _overridden(folder / "stages" / f"{experiment}_{stage}.yaml")
        given |= _overridden(folder / f"{experiment}.yaml")
    return given


@functools.cache
def _defaults(path: Path) -> Mapping[str, str]:
    return {group: name for group, name in _entries(path).items() if group in GROUPS}


@functools.cache
def _overridden(path: Path) -> Mapping[str, str]:
    if not path.is_file():
        return {}
    entries = _entries(path)
    return {
        key.removeprefix("override /"): name
        for key, name in entries.items()
        if key.startswith("override /") and key.removeprefix("override /") in GROUPS
    }


def _entries(path: Path) -> dict[str, str]:
    """The pairs of a file's defaults list."""
    defaults = yaml.safe_load(path.read_text(encoding="utf-8")).get("defaults", [])
    pairs: dict[str, str] = {}
    for entry in defaults:
        if isinstance(entry, dict):
            pairs.update((str(key), str(value)) for key, value in entry.items())
    return pairs


def choose(form: Form, sent: Mapping[str, str], were: Mapping[str, str]) -> tuple[Presets, Presets]:
    """The presets that the page was made with, and those that are chosen now. sent: what the
    selects hold; were: what they held. A preset that nobody changed is the new experiment's.
    """
    names = [field.key for field in form.presets if field.key != EXPERIMENT]
    known = {field.key: field.choices for field in form.presets}
    before = _one_of(were.get(EXPERIMENT, NONE), known[EXPERIMENT])
    after = _one_of(sent.get(EXPERIMENT, before), known[EXPERIMENT])
    old, new = given_presets(form.stage, before), given_presets(form.stage, after)
    earlier, now = {EXPERIMENT: before}, {EXPERIMENT: after}
    for name in names:
        earlier[name] = _one_of(were.get(name, old[name]), known[name], old[name])
        wished = _one_of(sent.get(name, earlier[name]), known[name], earlier[name])
        unchanged = wished == earlier[name] == old[name]
        now[name] = new[name] if unchanged else wished
    return Presets(earlier, old), Presets(now, new)


def _one_of(name: str, known: Sequence[str], otherwise: str = NONE) -> str:
    return name if name in known else otherwise


@dataclass(frozen=True)
class Base:
    """The configuration that presets give. `values` by option, as JSON has them."""

    cfg: Config | None  # None where something has to be given beside them
    values: Mapping[str, Any]


def base_of(form: Form, presets: Presets, runs: Path) -> Base:
    """What they give. Raises UserError for presets that don't go together."""
    return _base(form, tuple(presets.overrides), str(runs))


@functools.lru_cache(maxsize=64)
def _base(form: Form, overrides: tuple[str, ...], runs: str) -> Base:
    given = [f"stage={form.stage}", *overrides, run_dir(Path(runs))]
    rates = [option.key for option in form.options if option.key in _RATES]
    try:
        cfg, unset = compose(given), []
    except UserError as error:
        if "none is published" not in str(error):
            raise
        # the rate has to be given, which the form will say
        cfg, unset = compose([*given, f"{rates[0]}=1e-3"]), rates[:1]
    values = {field.key: plain(value_at(cfg, field.key)) for field in form.options}
    values |= dict.fromkeys(unset)
    return Base(None if unset else cfg, values)


def run_dir(runs: Path) -> str:
    """The override that says where runs are."""
    return override("run.dir", str(runs))


def value_at(cfg: Any, key: str) -> Any:
    """The value of a dotted option."""
    value = cfg
    for name in key.split("."):
        value = getattr(value, name)
    return value
