"""Writes what follows from the options' declarations: docs/configuration.md and conf/schema.json.

python -m rlhf.cli.reference            # write both
python -m rlhf.cli.reference --check    # exit code 1 where one of them is not up to date
"""

import argparse
import dataclasses
import html
import json
import sys
import textwrap
from collections.abc import Iterator, Sequence

from conf.preparation import STEPS
from conf.schema import GROUPS, ITEM_GROUPS, Config
from conf.stages import STAGES, OfflineStage, TrainStage
from rlhf.cli.json_schema import json_schema
from rlhf.cli.options import (
    Described,
    item_type,
    options_of,
    plain_doc,
    value_text,
)
from rlhf.cli.presets import CONF_DIR, choices, stage_schema, summary

PAGE = CONF_DIR.parent / "docs" / "configuration.md"
SCHEMA = CONF_DIR / "schema.json"
_INTRODUCTION = """\
# Configuration

Every option with its default, type, range and meaning. This page is generated from the declarations
in `conf/` by `make reference`. `python -m rlhf stage=NAME --help` prints the part that concerns a
stage, `python -m rlhf stage=NAME --cfg job` the values of a run, and `conf/schema.json` is the same
for editors.

A group's preset is chosen as `engine=zero2`, an option is set as `engine.micro_tokens=8192`; `null`
means "not set". Defaults are those of the declarations: a preset or an experiment may set others.
"""
_HEAD = ("| option | default | type | range, unit | meaning |", "| --- | --- | --- | --- | --- |")


def page() -> str:
    """The text of docs/configuration.md."""
    parts = [_INTRODUCTION]
    for field in dataclasses.fields(Config):
        if field.name == "stage":
            parts += list(_stages())
        elif isinstance(field.type, type):
            title = f"## {field.name}\n\n{_prose(field.type)}\n"
            if field.name in GROUPS:
                presets = ", ".join(f"`{field.name}={name}`" for name in choices(field.name))
                title += f"\nPresets: {presets}.\n"
            parts += [title, *_tables(list(options_of(field.type, f"{field.name}.")))]
        else:
            parts += _items(field.name, item_type(field.type))
    parts.append(
        "## Steps of data.pipeline\n\n"
        "A step is its name, or `{step: NAME, option: value ...}`; "
        "[what each does](reference/data-steps.md).\n"
    )
    for name, step in STEPS.items():
        parts += [f"### {name}\n\n{_prose(step)}\n", *_tables(list(options_of(step, "")))]
    return "\n".join(parts)


def _items(name: str, cls: type) -> Iterator[str]:
    """A dictionary of groups of options."""
    yield f"## {name}\n\n{_prose(cls)}\n"
    for group, item in ITEM_GROUPS.items():
        if item is cls:
            presets = ", ".join(f"`{preset}`" for preset in choices(group))
            yield f"Presets, several as `{group}=[NAME,NAME]`: {presets}.\n"
    yield from _tables([one for one in options_of(Config, "") if one.key.split(".")[0] == name])


def _stages() -> Iterator[str]:
    yield "## stage\n"
    for cls, title in (
        (TrainStage, "Every training stage"),
        (OfflineStage, "Stages on TRL's trainers"),
    ):
        yield f"### {title}\n\n{_prose(cls)}\n"
        yield from _tables(_own(cls))
    for schema, stage in STAGES.items():
        presets = [name for name in choices("stage") if stage_schema(name) == schema]
        yield f"### {', '.join(f'stage={name}' for name in presets)}\n"
        yield f"{_prose(stage)}\n"
        if len(presets) > 1:
            yield "".join(f"- `{name}`: {_text(summary('stage', name))}\n" for name in presets)
        yield from _other_defaults(stage)
        yield from _tables(_own(stage))


def _own(cls: type) -> list[Described]:
    """The options that the class itself adds to those that it inherits."""
    options = [option for option in options_of(cls, "stage.") if option.key != "stage.name"]
    bases = {base for base in (TrainStage, OfflineStage) if base is not cls}
    return [option for option in options if option.owner not in bases]


def _other_defaults(cls: type) -> Iterator[str]:
    """The inherited options whose default is another one here."""
    for base in (OfflineStage, TrainStage):
        if issubclass(cls, base):
            usual = {option.key: option for option in options_of(base, "stage.")}
            changed = [
                f"`{option.key}={value_text(option.default)}`"
                for option in options_of(cls, "stage.")
                if option.key in usual
                and option.key != "stage.name"
                and option.default != usual[option.key].default
            ]
            if changed:
                yield f"Other defaults: {', '.join(changed)}.\n"
            return


def _tables(options: Sequence[Described]) -> Iterator[str]:
    """A table for each section."""
    sections = dict.fromkeys(option.section for option in options)
    for section in sections:
        rows = [_row(option) for option in options if option.section == section]
        heading = f"*{section[0].upper()}{section[1:]}*\n\n" if section else ""
        yield heading + "\n".join([*_HEAD, *rows]) + "\n"


def _row(option: Described) -> str:
    kind = option.kind.replace("|", ", ")
    limits = option.bounds or option.info.unit or ""
    default = f"`{value_text(option.default)}`"
    cells = (f"`{option.key}`", default, kind, limits, _text(option.info.doc))
    return f"| {' | '.join(cells)} |"


def _prose(cls: type) -> str:
    """What a dataclass's docstring says, in lines of at most 100 characters."""
    return textwrap.fill(_text(plain_doc(cls)), 100, break_on_hyphens=False)


def _text(text: str) -> str:
    """Prose as Markdown takes it: no HTML tags, no end of a table's cell."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("&gt;", ">")


def schema_text() -> str:
    """The text of conf/schema.json."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Write both files, or tell whether they are up to date."""
    parser = argparse.ArgumentParser(prog="python -m rlhf.cli.reference", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args(argv)
    stale = []
    for path, text in ((PAGE, page()), (SCHEMA, schema_text())):
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path.name)
        if not arguments.check:
            path.write_text(text, encoding="utf-8")
    if stale:
        verb = "not up to date" if arguments.check else "written"
        print(f"{verb}: {', '.join(stale)}")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
