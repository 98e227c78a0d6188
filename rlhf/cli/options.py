"""The options as their dataclasses declare them: dotted keys, each option in words, and what
``--help`` prints of them, the changed ones first.

The items of a dictionary of dataclasses stand as ``reward.terms.<name>.weight``; below a dictionary
of anything, every key is valid: ``data.gym.options.<anything>``.
"""

import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeGuard

from conf.options import MISSING, OptionInfo, default_of, info_of
from conf.schema import Config
from conf.stages import GROUPS_OF, STAGES
from rlhf.cli.presets import CONF_DIR, choices, list_stages, stage_schema, summary

NAME = "<name>"  # stands for the name of a dictionary's item
ANYTHING = "<anything>"  # below it every key is valid


def valid_keys(stages: Sequence[str]) -> list[str]:
    """Every dotted option of the configuration with any of the given stages (names of `STAGES`)."""
    keys = [key for key in _walk(Config, "") if key != "stage"]
    for stage in stages:
        keys.extend(_walk(STAGES[stage], "stage."))
    return list(dict.fromkeys(keys))


def _walk(cls: type, prefix: str) -> Iterator[str]:
    for field in dataclasses.fields(cls):
        key = f"{prefix}{field.name}"
        yield key
        if is_group(field.type):
            yield from _walk(field.type, f"{key}.")
        item = item_type(field.type)
        if item is not None:
            yield from _walk_items(item, key)


def _walk_items(item: Any, key: str) -> Iterator[str]:
    """The keys inside a dictionary whose values are of the type `item`."""
    if not is_group(item):
        yield f"{key}.{ANYTHING}"
        return
    yield f"{key}.{NAME}"
    yield from _walk(item, f"{key}.{NAME}.")


def general(key: str, keys: Sequence[str]) -> tuple[str, str]:
    """`key` with ``<name>`` for the name of a dictionary's item, and that name: from
    reward.terms.brevity.kind to reward.terms.<name>.kind and brevity. An empty name without one.
    """
    key = _anything(key, keys)
    if key.endswith(ANYTHING):
        return key, ""
    for parent in parents(keys, NAME):
        if key.startswith(f"{parent}."):
            name, dot, rest = key.removeprefix(f"{parent}.").partition(".")
            return _anything(f"{parent}.{NAME}{dot}{rest}", keys), name
    return key, ""


def _anything(key: str, keys: Sequence[str]) -> str:
    for parent in parents(keys, ANYTHING):
        if key.startswith(f"{parent}."):
            return f"{parent}.{ANYTHING}"
    return key


def parents(keys: Sequence[str], marker: str) -> list[str]:
    """The options whose keys in the list end in `marker`: the dictionaries of that kind."""
    return [key.removesuffix(f".{marker}") for key in keys if key.endswith(f".{marker}")]


@dataclass(frozen=True, slots=True)
class Described:
    """One option of a group."""

    key: str  # dotted
    kind: str  # its type in words
    default: Any
    info: OptionInfo
    section: str  # title of the options that it stands among; empty without one
    owner: type  # the dataclass that declares it

    @property
    def facts(self) -> str:
        """Type, range and unit in a few words."""
        parts = [self.kind]
        if self.bounds:
            parts.append(self.bounds)  # holds the unit
        elif self.info.unit is not None:
            parts.append(f"in {self.info.unit}")
        return ", ".join(parts)

    @property
    def bounds(self) -> str:
        """The range in words; empty without one, and where the type lists the choices."""
        return "" if self.info.choices else self.info.range_text()


def options_of(cls: type, prefix: str) -> Iterator[Described]:
    """The options of a dataclass in their order, those of groups inside it included; a dictionary's
    items as ``reward.terms.<name>.weight``.
    """
    section = ""
    for field in dataclasses.fields(cls):
        info = info_of(field)
        section = info.section or section
        key = f"{prefix}{field.name}"
        if is_group(field.type):
            owner = _owner(cls, field.name)
            for inner in options_of(field.type, f"{key}."):
                inner_section = inner.section or section
                yield dataclasses.replace(inner, section=inner_section, owner=owner)
            continue
        default = default_of(field)
        text = type_text(field.type, info)
        yield Described(key, text, default, info, section, _owner(cls, field.name))
        item = item_type(field.type)
        if is_group(item):
            yield from options_of(item, f"{key}.{NAME}.")


def is_group(annotation: Any) -> TypeGuard[type]:
    """Whether an option's type is a dataclass: a group of options."""
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def item_type(annotation: Any) -> Any:
    """What a dictionary's items are; None for an option of another type."""
    if typing.get_origin(annotation) is dict:
        return typing.get_args(annotation)[1]
    return None


def _owner(cls: type, name: str) -> type:
    """The first class, from the base down, that declares the option."""
    for base in reversed(cls.__mro__):
        if name in inspect.get_annotations(base):
            return base
    return cls


def type_text(annotation: Any, info: OptionInfo) -> str:
    """An option's type in words, such as ``float or null`` or ``one of token|sequence``."""
    if info.choices:
        return "one of " + "|".join(str(choice) for choice in info.choices)
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is types.UnionType:
        inner = [arg for arg in args if arg is not types.NoneType]
        return f"{type_text(inner[0], info)} or null"
    if origin is list:
        if args[0] is Any:
            return "list"
        return f"list of {type_text(args[0], OptionInfo(doc=''))}"
    if origin is dict:
        return "dictionary"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "one of " + "|".join(member.value for member in annotation)
    if annotation is Any:
        return "any"
    return {"str": "text", "bool": "true or false"}.get(annotation.__name__, annotation.__name__)


def value_text(value: Any) -> str:
    """A value as the command line writes it."""
    if value is None:
        return "null"
    if value == MISSING:
        return "(must be set)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, dict):
        items = [f"{key}: {value_text(inner)}" for key, inner in value.items()]
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list):
        return "[" + ",".join(value_text(inner) for inner in value) + "]"
    if isinstance(value, str):
        return value.replace("\n", "\\n") if value else "''"
    return re.sub(r"e-0+", "e-", f"{value}")


def plain_doc(cls: type) -> str:
    """A dataclass's docstring as one line: its first paragraph, without reStructuredText marks."""
    paragraph = (cls.__doc__ or "").strip().split("\n\n")[0]
    return " ".join(paragraph.replace("``", "`").split())


WIDTH = 100
FLAGS = """\
flags
  --cfg job           print the configuration of the run instead of running it
  -m, --multirun      a run for each combination of values: stage.kl_coef=0.05,0.1
  --help              with stage=NAME: every option of the stage
  --hydra-help        Hydra's own flags"""


def general_help() -> str:
    """The help of a command line that names no stage."""
    return f"{list_stages()}\n\n{FLAGS}"


def stage_help(cfg: Config) -> str:
    """The help of a stage: its options with their meaning, those that the presets, the experiment
    or the command line changed first.
    """
    name = cfg.stage.name
    schema = stage_schema(name)
    groups = {"stage": STAGES[schema], **_groups(schema)}
    described = {group: list(options_of(cls, _prefix(group))) for group, cls in groups.items()}
    lines = [f"stage={name}: {summary('stage', name)}", ""]
    lines += _changed(cfg, described)
    for group, cls in groups.items():
        lines += _group(group, cls, described[group])
    others = [field.name for field in dataclasses.fields(Config) if field.name not in groups]
    if others:
        lines += [f"Groups that are left out here: {', '.join(others)} (docs/configuration.md)."]
    return "\n".join([*lines, "", FLAGS])


def _prefix(group: str) -> str:
    """What the options of a group begin with."""
    fields = {field.name: field.type for field in dataclasses.fields(Config)}
    return f"{group}." if is_group(fields[group]) or group == "stage" else f"{group}.{NAME}."


def _groups(schema: str) -> dict[str, type]:
    """The groups that a stage reads, in the order of the configuration; of a dictionary of groups
    what its items are.
    """
    names = GROUPS_OF.get(schema)
    found = {}
    for field in dataclasses.fields(Config):
        group: Any = item_type(field.type) or field.type
        if field.name != "stage" and (names is None or field.name in names):
            found[field.name] = group
    return found


def _changed(configuration: object, described: dict[str, list[Described]]) -> list[str]:
    lines = []
    for options in described.values():
        for option in options:
            value = _value(configuration, option.key)
            if option.key != "stage.name" and NAME not in option.key and value != option.default:
                default = f"default {value_text(option.default)}"
                lines += _entry(option, value_text(value), f"{option.facts}; {default}")
    if not lines:
        return []
    title = "changed from the defaults by presets, the experiment or the command line"
    return [title, *lines, ""]


def _value(configuration: object, key: str) -> Any:
    """The value of a dotted option; None for one inside a dictionary."""
    value: Any = configuration
    for name in key.split("."):
        value = getattr(value, name, None)
    return value


def _group(group: str, cls: type, options: Sequence[Described]) -> list[str]:
    shown = [option for option in options if option.key != "stage.name"]
    if not shown:
        return []
    title = f"{group}: {plain_doc(cls)}"
    lines = textwrap.wrap(title, WIDTH, subsequent_indent="    ")
    if group != "stage" and (CONF_DIR / group).is_dir():
        presets = ", ".join(f"{group}={name}" for name in choices(group))
        lines += textwrap.wrap(f"  presets: {presets}", WIDTH, subsequent_indent="    ")
    section = ""
    for option in shown:
        if option.section != section:
            section = option.section
            lines += ["", f"  -- {section}"]
        lines += _entry(option, value_text(option.default), option.facts)
    return [*lines, ""]


def _entry(option: Described, value: str, facts: str) -> list[str]:
    """An option in two or more lines: key, value and facts; what it means."""
    assignment = f"  {option.key}={value}"
    doc = textwrap.wrap(
        option.info.doc, WIDTH, initial_indent="        ", subsequent_indent="        "
    )
    if len(assignment) + len(facts) + 3 <= WIDTH:
        return [f"{assignment}   ({facts})", *doc]
    wrapped = textwrap.wrap(
        f"({facts})", WIDTH, initial_indent="        ", subsequent_indent="        "
    )
    return [assignment, *wrapped, *doc]
