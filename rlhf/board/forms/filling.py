"""A form as it came back: values, problems at their fields, the overrides that it stands for."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.schema import Config
from rlhf.board.app import Place
from rlhf.board.forms import allowed, base, rows
from rlhf.board.forms.base import Base, Presets
from rlhf.board.forms.fields import NONE, Field, Form, Widget, form_of
from rlhf.board.forms.rows import ROWS, Row, Sent
from rlhf.board.forms.values import Problem, plain, read, texts, told
from rlhf.board.paths import NotHere, folders_of, run_path
from rlhf.cli.options import NAME
from rlhf.cli.writing import override, same
from rlhf.run.directory import goes_on, run_directory
from rlhf.types import UserError

WERE = "were."  # before a group's name: the preset that the page was made with
_FOUND = "run.name"  # where a run directory that exists is said
TAKEN = "forms.error.taken"


@dataclass
class Filled:
    """A form with what was sent, or with the presets' values where nothing was."""

    form: Form
    presets: Presets
    base: Base | None
    texts: dict[str, list[str]] = field(default_factory=dict)  # of plain fields
    rows: dict[str, list[Row]] = field(default_factory=dict)
    changed: dict[str, Any] = field(default_factory=dict)  # what differs from the presets
    problems: dict[str, Problem] = field(default_factory=dict)  # by the id of an input
    top: list[Problem] = field(default_factory=list)  # those of no field
    unknown: list[str] = field(default_factory=list)  # options that no field of the form is for
    overrides: list[str] = field(default_factory=list)
    cfg: Config | None = None

    @property
    def is_whole(self) -> bool:
        """Whether nothing stands against it."""
        return not self.problems and not self.top

    @property
    def is_taken(self) -> bool:
        """Whether the run's directory exists already."""
        problem = self.problems.get(_FOUND)
        return problem is not None and problem.word == TAKEN


def fill(place: Place, stage: str, sent: Sent) -> Filled:
    """The form of `stage` with what was sent: the fields of a form that came back, or the dotted
    options of a link.
    """
    form = form_of(stage, place.remote_code)
    singles = {name: values[-1] for name, values in sent.items() if values}
    chosen = {each.key: singles[each.key] for each in form.presets if each.key in singles}
    were = {
        name.removeprefix(WERE): value for name, value in singles.items() if name.startswith(WERE)
    }
    old_presets, presets = base.choose(form, chosen, were)
    filled = Filled(form, presets, None)
    _check_presets(filled, chosen)
    try:
        old = base.base_of(form, old_presets, place.runs)
        filled.base = base.base_of(form, presets, place.runs)
    except UserError as error:
        filled.top.append(told(str(error)))
        filled.presets = Presets(base.given_presets(stage, NONE), base.given_presets(stage, NONE))
        old = filled.base = base.base_of(form, filled.presets, place.runs)
    _take(filled, place, old, as_rows(form, sent))
    filled.unknown = _unknown(form, sent)
    if filled.is_whole:
        _compose(filled, place)
    return filled


def _check_presets(filled: Filled, chosen: Mapping[str, str]) -> None:
    for each in filled.form.presets:
        name = chosen.get(each.key)
        if name is not None and name not in each.choices:
            filled.problems[each.key] = Problem("forms.error.choice", {"text": name})


def as_rows(form: Form, sent: Sent) -> Sent:
    """What was sent, with a link's ``reward.terms.brevity.kind=length`` as rows of the form."""
    result = {name: list(values) for name, values in sent.items()}
    for each in form.options:
        if each.widget not in (Widget.table, Widget.items):
            continue
        names: list[str] = []
        for key in sent:
            if not key.startswith(f"{each.key}."):
                continue
            rest = key.removeprefix(f"{each.key}.")
            name, dot, option = rest.partition(".")
            if each.widget is Widget.table:
                name, dot, option = rest, ".", rows.VALUE
            if name not in names:
                names.append(name)
            number = 1000 + names.index(name)
            result[f"{each.key}#{number}"] = [name]
            if dot:
                result[f"{each.key}#{number}.{option}"] = list(sent[key])
            del result[key]
    return result


def _unknown(form: Form, sent: Sent) -> list[str]:
    """What was sent and stands for no field: a link's options that this page doesn't set."""
    plain_keys = {each.key for each in form}
    of_rows = tuple(f"{each.key}{mark}" for each in form if each.widget in ROWS for mark in "#.")
    return [
        name
        for name in sent
        if "." in name and name not in plain_keys and not name.startswith((WERE, *of_rows))
    ]


# ---- values ----


def _take(filled: Filled, place: Place, old: Base, sent: Sent) -> None:
    folders = folders_of(place)

    def look_at(parent: str) -> rows.Look:
        def look(of: Field, value: Any, name: str) -> None:
            key = parent
            if of.key != parent:
                key = f"{parent}.{NAME}.{of.key}"
            check_value(key, value, folders)

        return look

    assert filled.base is not None
    for each in filled.form.options:
        before, now = old.values[each.key], filled.base.values[each.key]
        if each.widget in ROWS:
            _take_rows(filled, each, before, now, sent, look_at(each.key))
            continue
        filled.texts[each.key] = texts(each, now)
        given = sent.get(each.key)
        if given is None:
            continue
        try:
            value = read(each, given)
            if not same(value, before):
                filled.texts[each.key] = list(given)
                check_value(each.key, value, folders)
                if not same(value, now):
                    filled.changed[each.key] = value
        except Problem as problem:
            filled.texts[each.key] = list(given)
            filled.problems[each.key] = problem


def check_value(key: str, value: Any, folders: Sequence[Path]) -> None:
    """Raises Problem for a value that a page may not set. key: with <name> for an item's name."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and not allowed.is_within(key, text, folders):
            raise Problem("forms.error.outside", {"text": text})
        if key == "environment.tools" and text not in allowed.TOOLS:
            raise Problem("forms.error.tool", {"names": ", ".join(allowed.TOOLS)})
        if key == allowed.TRANSLATOR and ":" in str(text):
            raise Problem("forms.error.code")
    if key == "run.name" and not allowed.is_run_name(str(value)):
        raise Problem("forms.error.run_name")


def _take_rows(
    filled: Filled, of: Field, before: Any, now: Any, sent: Sent, look: rows.Look
) -> None:
    given = rows.rows_of(of, now)
    came = rows.sent_rows(of, sent)
    if came is None:
        filled.rows[of.key] = given
        return
    if of.widget is Widget.steps:
        unchanged = rows.alike(rows.rows_of(of, before), came)
        if not unchanged:
            given = came
        filled.rows[of.key] = given
    else:
        filled.rows[of.key] = rows.merged(given, rows.rows_of(of, before), came)
    here = filled.rows[of.key]
    read_rows = {Widget.table: rows.table, Widget.items: rows.items, Widget.steps: rows.steps}
    value = read_rows[of.widget](of, here, look)
    for number, row in enumerate(here):
        for name, problem in row.problems.items():
            filled.problems[f"{of.key}#{number}.{name}".rstrip(".")] = problem
    if of.widget is Widget.items:
        assert isinstance(value, dict)
        _take_items(filled, of, value, now)
    elif not same(value, now):
        filled.changed[of.key] = _without_same(value, now)


def _without_same(value: Any, now: Any) -> Any:
    """A dictionary's items that differ from those that presets give; a list is given whole."""
    if not isinstance(value, dict):
        return value
    return {name: one for name, one in value.items() if name not in now or not same(one, now[name])}


def _take_items(filled: Filled, of: Field, value: Mapping[str, Any], now: Any) -> None:
    usual = {each.key: rows.default_of(each) for each in of.inner}
    for name, options in value.items():
        reference = now.get(name, usual)
        for key, one in options.items():
            if not same(one, reference.get(key)):
                filled.changed[f"{of.key}.{name}.{key}"] = one


# ---- overrides ----


def _compose(filled: Filled, place: Place) -> None:
    """The overrides and what they compose to; what doesn't go together becomes a problem."""
    written = [f"stage={filled.form.stage}", *filled.presets.overrides, base.run_dir(place.runs)]
    for key, value in filled.changed.items():
        try:
            written.append(override(key, value))
        except UserError:
            _put(filled, key, Problem("forms.error.grammar"))
    if not filled.is_whole:
        return
    assert filled.base is not None
    try:
        cfg = filled.base.cfg
        if cfg is None or filled.changed:
            cfg = base.compose(written)
    except UserError as error:
        place_problem(filled, str(error))
        return
    for key, value in filled.changed.items():
        if not _has(cfg, key, value):
            _put(filled, key, Problem("forms.error.grammar"))
    filled.overrides, filled.cfg = written, cfg
    _check_whole(filled, place)


def _check_whole(filled: Filled, place: Place) -> None:
    """What no field alone decides."""
    cfg = filled.cfg
    assert cfg is not None
    if cfg.model.trust_remote_code and not place.remote_code:
        filled.top.append(Problem("forms.error.remote_code"))
    if not allowed.is_run_name(cfg.run.name):
        filled.problems["run.name"] = Problem("forms.error.run_name")
        return
    directory = run_directory(cfg)
    folder = directory.parent.resolve()
    if not folder.is_relative_to(place.runs.resolve()):
        filled.problems["run.name"] = Problem("forms.error.outside", {"text": cfg.run.name})
        return
    try:
        run_path(place, cfg.run.name)
    except NotHere:
        filled.problems["run.name"] = Problem("forms.error.inside", {"text": cfg.run.name})
        return
    decided = cfg.run.resume or cfg.run.overwrite or goes_on(cfg.stage, cfg.label)
    if not decided and directory.is_dir() and any(directory.iterdir()):
        filled.problems[_FOUND] = Problem(TAKEN, {"name": f"{cfg.run.name}/{directory.name}"})


def _has(cfg: Any, key: str, wanted: Any) -> bool:
    """Whether an option has the wanted value; of a dictionary the wanted items."""
    value: Any = cfg
    for name in key.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return _holds(plain(value), wanted)


def _holds(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return isinstance(value, dict) and all(
            key in value and _holds(value[key], inner) for key, inner in wanted.items()
        )
    return same(value, wanted)


# ---- where a problem belongs ----

_KEY = re.compile(r"[a-z_]+(?:\.[\w-]+)+|\bexperiment\b", re.ASCII)


def named(message: str, filled: Filled) -> list[str]:
    """The keys that a message names and that have a field, each once."""
    keys = dict.fromkeys(match[0] for match in _KEY.finditer(message))
    return [key for key in keys if _input(key, filled) is not None]


def place_problem(filled: Filled, message: str) -> None:
    """What the configuration or a stage's check says, at the field that it names first."""
    keys = named(message, filled)
    _put(filled, keys[0] if keys else None, told(message))


def _put(filled: Filled, key: str | None, problem: Problem) -> None:
    at = _input(key or "", filled)
    if at is None:
        filled.top.append(problem)
    else:
        filled.problems[at] = problem


def _input(key: str, filled: Filled) -> str | None:
    """The id of the input of a dotted option; of one inside a dictionary that of its row."""
    for each in filled.form:
        if each.key == key:
            return key
        if not key.startswith(f"{each.key}.") or each.widget not in (Widget.items, Widget.table):
            continue
        name, _, option = key.removeprefix(f"{each.key}.").partition(".")
        for number, row in enumerate(filled.rows.get(each.key, [])):
            if row.name == name:
                return f"{each.key}#{number}.{option}".rstrip(".")
        return each.key
    return None
