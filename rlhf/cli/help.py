"""What ``--help`` prints: every option of a stage, the changed ones first."""

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Any

from conf.schema import Config
from conf.stages import GROUPS_OF, STAGES
from rlhf.cli.options import NAME, Described, options_of, plain_doc, value_text
from rlhf.cli.presets import CONF_DIR, choices, list_stages, stage_schema, summary

WIDTH = 100
FLAGS = """\
flags
  --cfg job           print the configuration of the run instead of running it
  -m, --multirun      a run for each combination of values: stage.kl_coef=0.05,0.1
  --help              with stage=NAME: every option of the stage
  --hydra-help        Hydra's own flags"""


def without_stage() -> str:
    """The help of a command line that names no stage."""
    return f"{list_stages()}\n\n{FLAGS}"


def of_stage(cfg: Config) -> str:
    """The help of a stage: its options with their meaning, those that the presets, the experiment
    or the command line changed first.
    """
    name = cfg.stage.name
    schema = stage_schema(name)
    groups = {"stage": STAGES[schema], **_groups(schema)}
    described = {group: list(options_of(cls, f"{group}.")) for group, cls in groups.items()}
    lines = [f"stage={name}: {summary('stage', name)}", ""]
    lines += _changed(cfg, described)
    for group, cls in groups.items():
        lines += _group(group, cls, described[group])
    others = [field.name for field in dataclasses.fields(Config) if field.name not in groups]
    if others:
        lines += [f"Groups that are left out here: {', '.join(others)} (docs/configuration.md)."]
    return "\n".join([*lines, "", FLAGS])


def _groups(schema: str) -> dict[str, type]:
    """The groups that a stage reads, in the order of the configuration."""
    fields = dataclasses.fields(Config)
    names = GROUPS_OF.get(schema)
    return {
        field.name: field.type  # type: ignore[misc]
        for field in fields
        if field.name != "stage" and (names is None or field.name in names)
    }


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
        lines.append(f"  presets: {', '.join(f'{group}={name}' for name in choices(group))}")
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
