"""The fields of a stage's form, from the options' declarations: what each takes, and where it
stands. They never change while the board runs, so they are made once.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from conf.options import MISSING
from conf.preparation import STEPS
from conf.schema import GROUPS, Config
from conf.stages import GROUPS_OF, STAGES
from rlhf.board.forms import allowed
from rlhf.board.forms.basic import BASIC
from rlhf.cli.options import NAME, Described, is_group, item_type, options_of
from rlhf.cli.presets import choices, stage_schema

NONE = "null"  # the preset of no experiment, as conf/config.yaml has it


class Widget(Enum):
    """How a value is asked for."""

    preset = "preset"  # a preset of a group
    text = "text"
    check = "check"
    choice = "choice"
    many = "many"  # any of several values
    lines = "lines"  # a list, one item a line
    table = "table"  # a dictionary: names and values
    items = "items"  # a dictionary of dataclasses: names and options
    steps = "steps"  # steps of data.pipeline, each with its options


class Scalar(Enum):
    """What one text becomes."""

    text = "text"
    whole = "whole"
    number = "number"
    truth = "truth"
    anything = "anything"  # JSON, or the text itself


@dataclass(frozen=True, slots=True)
class Field:
    """A field; `key` is the option's, of a preset the group's, inside an item without its name."""

    key: str
    widget: Widget
    scalar: Scalar = Scalar.text
    nullable: bool = False
    choices: tuple[str, ...] = ()
    option: Described | None = None  # None for a preset
    inner: tuple["Field", ...] = ()  # of an item

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.option is not None and self.option.default == MISSING


@dataclass(frozen=True, slots=True)
class Group:
    """The folded options of a group by section."""

    name: str
    preset: Field | None
    sections: tuple[tuple[str, tuple[Field, ...]], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """All fields of a stage. There is one for each: `form_of` keeps it."""

    stage: str
    schema: str
    basic: tuple[Field, ...]
    groups: tuple[Group, ...]

    def __iter__(self) -> Iterator[Field]:
        yield from self.basic
        for group in self.groups:
            if group.preset is not None:
                yield group.preset
            for _, section in group.sections:
                yield from section

    @property
    def presets(self) -> list[Field]:
        """The fields that choose presets."""
        return [field for field in self if field.widget is Widget.preset]

    @property
    def options(self) -> list[Field]:
        """The fields of options."""
        return [field for field in self if field.widget is not Widget.preset]


@functools.cache
def form_of(stage: str, remote_code: bool) -> Form:
    """The form of a stage's preset. Raises KeyError for a stage that has none."""
    schema = stage_schema(stage)
    first = BASIC[schema]
    by_key: dict[str, Field] = {}
    groups: dict[str, list[Field]] = {}
    for name, cls in _groups(schema).items():
        found = [field for field in fields_of(cls, f"{name}.") if _is_shown(field, remote_code)]
        groups[name] = found
        by_key |= {field.key: field for field in found}
    presets = {name: _preset(name) for name in (*groups, "experiment") if _has_presets(name)}
    by_key |= presets
    basic = tuple(by_key[key] for key in first if key in by_key)
    folded = [_folded(name, groups[name], presets.get(name), first) for name in groups]
    experiment = Group("experiment", presets["experiment"], ())
    return Form(stage, schema, basic, (experiment, *folded))


def _groups(schema: str) -> dict[str, type]:
    """The stage and the groups that it reads and that have a form."""
    read = GROUPS_OF[schema]
    types_of = {field.name: field.type for field in dataclasses.fields(Config)}
    groups: dict[str, Any] = {"stage": STAGES[schema]}
    return groups | {name: types_of[name] for name in read if name not in allowed.NO_FORM}


def _has_presets(name: str) -> bool:
    return name in GROUPS or name == "experiment"


def _preset(group: str) -> Field:
    names = allowed.presets(group, choices(group))
    if group == "experiment":
        names = [NONE, *names]
    return Field(group, Widget.preset, choices=tuple(names))


def _is_shown(field: Field, remote_code: bool) -> bool:
    return field.key != "stage.name" and allowed.may_set(field.key, remote_code=remote_code)


def _folded(
    name: str, fields: Sequence[Field], preset: Field | None, first: Sequence[str]
) -> Group:
    rest = [field for field in fields if field.key not in first]
    titles = dict.fromkeys(_section(field) for field in rest)
    sections = [(title, tuple(f for f in rest if _section(f) == title)) for title in titles]
    if name in first:
        preset = None
    return Group(name, preset, tuple(sections))


def _section(field: Field) -> str:
    assert field.option is not None
    return field.option.section


# ---- from an option to its field ----


def fields_of(cls: type, prefix: str) -> list[Field]:
    """The fields of a dataclass's options."""
    annotations = dict(_annotations(cls, prefix))
    options = [option for option in options_of(cls, prefix) if option.key in annotations]
    return [_field(option, annotations[option.key]) for option in options]


def _annotations(cls: type, prefix: str) -> Iterator[tuple[str, Any]]:
    """Options and their types; the options inside a dictionary's items are left out."""
    for field in dataclasses.fields(cls):
        key = f"{prefix}{field.name}"
        if is_group(field.type):
            yield from _annotations(field.type, f"{key}.")
        else:
            yield key, field.type


def _field(option: Described, annotation: Any) -> Field:
    key = option.key
    item = item_type(annotation)
    if is_group(item):
        return Field(key, Widget.items, option=option, inner=tuple(_inner(item, key)))
    if item is not None:
        return Field(key, Widget.table, _VALUES.get(key) or scalar_of(item), option=option)
    if key == "data.pipeline":
        return Field(key, Widget.steps, choices=tuple(STEPS), option=option)
    inner, nullable = _without_null(annotation)
    if typing.get_origin(inner) is list:
        return _list(option, typing.get_args(inner)[0], nullable=nullable)
    names = allowed.values(key, _choices(inner, option))
    if inner is bool and not nullable:
        return Field(key, Widget.check, Scalar.truth, option=option)
    if inner is bool:
        names = ("true", "false")
    widget = Widget.choice if names else Widget.text
    return Field(key, widget, scalar_of(inner), nullable, names, option)


# What the values of dictionaries of anything are.
_VALUES = {
    "data.columns": Scalar.text,
    "columns": Scalar.text,  # of a source
    "label.policies": Scalar.text,
    "label.choice": Scalar.number,
}


def _inner(item: type, parent: str) -> list[Field]:
    """The fields of a dictionary's item, but those that no page may set."""
    found = []
    for field in fields_of(item, ""):
        key = f"{parent}.{NAME}.{field.key}"
        if allowed.may_set(key, remote_code=False):
            names = allowed.values(key, field.choices)
            found.append(dataclasses.replace(field, choices=names))
    return found


@functools.cache
def step_fields(step: str) -> tuple[Field, ...]:
    """The fields of a step of data.pipeline."""
    return tuple(fields_of(STEPS[step], ""))


def _list(option: Described, item: Any, *, nullable: bool) -> Field:
    names = allowed.values(option.key, _choices(item, option))
    widget = Widget.lines
    # weights belong to losses by their order, which boxes don't have
    if names and option.key not in ("stage.losses", "stage.dpo_losses"):
        widget = Widget.many
    return Field(option.key, widget, scalar_of(item), nullable, names, option)


def _without_null(annotation: Any) -> tuple[Any, bool]:
    if typing.get_origin(annotation) is not types.UnionType:
        return annotation, False
    (inner,) = (arg for arg in typing.get_args(annotation) if arg is not types.NoneType)
    return inner, True


def _choices(annotation: Any, option: Described) -> tuple[str, ...]:
    if option.info.choices:
        return tuple(str(choice) for choice in option.info.choices)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return tuple(str(member.value) for member in annotation)
    return ()


def scalar_of(annotation: Any) -> Scalar:
    """What a text of that type becomes."""
    known = {bool: Scalar.truth, int: Scalar.whole, float: Scalar.number, Any: Scalar.anything}
    return known.get(annotation, Scalar.text)
