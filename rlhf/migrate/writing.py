"""What a migration leaves: an experiment of ours, the command that runs it, and the table of what
became of every key.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from conf import schema
from rlhf.migrate.converting import Line, Migration
from rlhf.migrate.tables import Fate

_ORDER = ("run", "model", "adapter", "engine", "rollout", "reward", "data", "tracking", "stage")
_LONGEST_VALUE = 60


def experiment_name(path: Path, wished: str | None, taken: Sequence[str]) -> str:
    """A preset's name: the file's, with another end where one of ours has it."""
    name = wished or re.sub(r"[^\w-]+", "_", path.stem).strip("_") or "migrated"
    return f"{name}_migrated" if name in taken else name


def experiment(migration: Migration, source: str) -> str:
    """The YAML of a preset of the group experiment."""
    comments = [
        f"Migrated from {migration.toolkit.title}.",
        f"{source}, by stage=migrate; for stage={migration.stage}.",
    ]
    return preset(comments, migration.options)


def preset(comments: Sequence[str], options: Mapping[str, Any], base: str | None = None) -> str:
    """The YAML of a preset of the group experiment. `comments`: its first lines; `options`: values
    by dotted option, and presets by group; `base`: the experiment that it builds on.
    """
    presets = {key: value for key, value in options.items() if key in schema.GROUPS}
    nested: dict[str, Any] = {}
    for option in sorted(options, key=_place):
        if option not in presets:
            _set(nested, option.split("."), options[option])
    lines = ["# @package _global_", *(f"# {comment}" for comment in comments)]
    defaults = [] if base is None else [f"  - {base}"]
    defaults += [f"  - override /{group}: {name}" for group, name in presets.items()]
    if defaults:
        lines += ["defaults:", *defaults, ""]
    body = yaml.safe_dump(nested, sort_keys=False, allow_unicode=True, width=100)
    return "\n".join(lines) + "\n" + (body if nested else "")


def _place(option: str) -> tuple[int, str]:
    group = option.partition(".")[0]
    return _ORDER.index(group) if group in _ORDER else len(_ORDER), option


def _set(nested: dict[str, Any], names: Sequence[str], value: Any) -> None:
    for name in names[:-1]:
        nested = nested.setdefault(name, {})
    nested[names[-1]] = value


def overrides(migration: Migration, name: str, folder: Path) -> list[str]:
    """The command line that runs an experiment in `folder`/experiment/."""
    return [
        f"stage={migration.stage}",
        f"hydra.searchpath=[file://{folder.resolve()}]",
        f"experiment={name}",
    ]


# ---- the table ----


def counts(migration: Migration) -> str:
    """How many keys of the file have which fate."""
    found = Counter(line.answer.fate for line in migration.lines if not line.is_default)
    return ", ".join(f"{found[fate]} {fate.value}" for fate in Fate if found[fate])


def table(migration: Migration, source: str, command: str) -> str:
    """All keys as Markdown, by what becomes of them."""
    lines = [
        f"# {source}",
        "",
        f"From {migration.toolkit.title} to stage={migration.stage}, {migration.ranks} rank(s): "
        f"{counts(migration)}.",
        "",
        f"    {command}",
    ]
    for fate in Fate:
        rows = migration.with_fate(fate)
        if rows:
            lines += ["", f"## {fate.value.capitalize()}", "", *_rows(rows)]
    left_out = [line for line in migration.lines if line.is_default]
    if left_out:
        title = f"Left out, so {migration.toolkit.title}'s default"
        lines += ["", f"## {title}", "", *_rows(left_out)]
    return "\n".join(lines) + "\n"


def _rows(rows: Sequence[Line]) -> list[str]:
    lines = ["| key | value | ours | note |", "| --- | --- | --- | --- |"]
    for row in rows:
        cells = (row.key, _short(row.value), _ours(row), row.answer.note)
        escaped = [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]
        lines.append(f"| {' | '.join(escaped)} |")
    return lines


def _ours(row: Line) -> str:
    pairs = [f"{option}={_short(value)}" for option, value in row.answer.options.items()]
    return " ".join(pairs)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def summary(migration: Migration) -> str:
    """What has to be known at once: what isn't possible, and what isn't known."""
    lines = [f"{migration.toolkit.title} to stage={migration.stage}: {counts(migration)}."]
    for fate in (Fate.impossible, Fate.unknown):
        for line in migration.with_fate(fate):
            lines.append(f"  {fate.value}: {line.key}={_short(line.value)}: {line.answer.note}")
    return "\n".join(lines)
