"""What a form stands for: the command line, and the same as the YAML of an experiment."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlhf.board.forms.base import EXPERIMENT, Presets
from rlhf.board.forms.fields import NONE
from rlhf.cli.presets import CONF_DIR

_PLAIN = re.compile(r"[A-Za-z_/][\w./-]*", re.ASCII)


def command(overrides: Sequence[str]) -> str:
    """The command line for a shell."""
    return shlex.join(["python", "-m", "rlhf", *overrides])


def command_of_file(stage: str, folder: Path, name: str) -> str:
    """The command line that runs the file `folder`/experiment/`name`.yaml."""
    search = f"hydra.searchpath=[file://{folder}]"
    return command([f"stage={stage}", search, f"experiment={name}"])


def experiment(stage: str, presets: Presets, changed: Mapping[str, Any], runs: Path) -> str:
    """The YAML of an experiment. changed: values by dotted option, as JSON has them."""
    lines = ["# @package _global_", f"# For stage={stage}."]
    lines += _defaults(stage, presets)
    nested: dict[str, Any] = {"run": {"dir": str(runs)}}
    for key, value in changed.items():
        _set(nested, key.split("."), value)
    return (
        "\n".join(lines)
        + "\n"
        + yaml.dump(nested, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
    )


def _defaults(stage: str, presets: Presets) -> list[str]:
    """The defaults list: the experiment that it builds on, and the presets."""
    groups = {group: name for group, name in presets.chosen.items() if group != EXPERIMENT}
    inner = [
        f"  - override /{group}: {name}"
        for group, name in groups.items()
        if name != presets.given[group]
    ]
    within = presets.chosen[EXPERIMENT]
    if within != NONE:
        files = [f"  - /experiment/{within}"]
        if (CONF_DIR / EXPERIMENT / "stages" / f"{within}_{stage}.yaml").is_file():
            files.append(f"  - /experiment/stages/{within}_{stage}")
        inner = [*files, "  - _self_", *inner]
    if inner:
        inner = ["defaults:", *inner, ""]
    return inner


def _set(nested: dict[str, Any], names: Sequence[str], value: Any) -> None:
    for name in names[:-1]:
        nested = nested.setdefault(name, {})
    nested[names[-1]] = value


class _Dumper(yaml.SafeDumper):
    """Texts in quotes unless no reader of YAML takes them for anything else."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    is_plain = _PLAIN.fullmatch(text) and yaml.safe_load(text) == text
    is_number = text.lower().strip(".") in ("inf", "nan")
    style = None if is_plain and not is_number else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
