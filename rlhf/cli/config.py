"""From the command line's overrides to the configuration.

Overrides are checked against the options there are, with the nearest one in the message, and
rewritten where Hydra's grammar wants another form. Hydra composes them with the YAML of conf/, and
the result becomes dataclasses. What we use of Hydra beyond its public interface stands here alone
(`split`), so that an upgrade that removes it is noticed by tests/cli/test_hydra_private.py.
"""

import dataclasses
import functools
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema import GROUPS, ITEM_GROUPS, Config
from conf.stages import STAGES
from rlhf.cli.options import ANYTHING, NAME, general, parents, valid_keys
from rlhf.cli.presets import CONF_DIR, PRESET_GROUPS, choices, nearest, preset_text, stage_schema
from rlhf.types import UserError


@functools.cache
def register() -> None:
    """Store every dataclass in ``/schema``, so that a YAML can say ``/schema/engine@_here_``."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(group="schema", name="config", node=Config, package="_global_")
    for name, node in (GROUPS | ITEM_GROUPS).items():
        store.store(group="schema", name=name, node=node)
    for name, node in STAGES.items():
        store.store(group="schema/stage", name=name, node=node)


def compose(overrides: Sequence[str]) -> Config:
    """The configuration of a command line, without its side effects (tests, the chain stage,
    notebooks). Raises UserError.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    check_overrides(overrides)
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        try:
            composed = hydra_compose("config", overrides=prepare(overrides))
        except HydraException as error:
            raise UserError(explain(error)) from error
    return to_dataclass(composed)


def stage_preset(preset: str) -> Any:
    """The stage of ``conf/stage/<preset>.yaml`` as a dataclass, without composing the rest. Raises
    UserError for no such preset.
    """
    import yaml
    from omegaconf import OmegaConf

    known = choices("stage")
    if preset not in known:
        raise UserError(
            f"no stage {preset!r}. Stages: {', '.join(known)}. Nearest: {nearest(preset, known)}."
        )
    values = yaml.safe_load(preset_text("stage", preset))
    values.pop("defaults")
    schema = OmegaConf.structured(STAGES[stage_schema(preset)])
    return OmegaConf.to_object(OmegaConf.merge(schema, values))


def to_dataclass(cfg: Any) -> Config:
    """A composed DictConfig as dataclasses: unknown keys and out-of-range values end here. Raises
    UserError.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        config = OmegaConf.to_object(cfg)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    except (OmegaConfBaseException, ValueError, TypeError, ArithmeticError) as error:
        raise UserError(str(error).splitlines()[0]) from error
    assert isinstance(config, Config)
    _check_finite("", config)
    return config


def _check_finite(key: str, value: Any) -> None:
    """No option is infinite or no number: null is how a limit is left out. Raises UserError."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _check_finite(f"{key}.{field.name}".lstrip("."), getattr(value, field.name))
    elif isinstance(value, dict):
        for name, inner in value.items():
            _check_finite(f"{key}.{name}", inner)
    elif isinstance(value, list):
        for inner in value:
            _check_finite(key, inner)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(
            f"{key}={value}: expected a finite number (null where the option may be left out)."
        )


def explain(error: Exception) -> str:
    """A failed composition in one line: Hydra's message, what it wraps, and the key it names."""
    lines = str(error).splitlines() + str(error.__cause__ or "").splitlines()
    keys = [f" (at {match[1]})" for line in lines if (match := _FULL_KEY.match(line))]
    told = [line.rstrip(":") for line in lines if not line.startswith(" ")]
    return ": ".join(dict.fromkeys(told[:2])) + "".join(keys[:1])


def to_yaml(configuration: object) -> str:
    """The resolved configuration as YAML, enumerations by name."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(configuration))


_FULL_KEY = re.compile(r"\s*full_key: (.*)")
_PATH = re.compile(
    r"(\+{0,2}(?:(?:model|migrate)\.path|data\.(?:path|eval_path|registry|sources\.[^.=]+\.path)))="
    r"([^'\"\[{,\\][^'\",\\]*)"
)
_PLAIN_PATH = re.compile(r"[\w./:*?$ @%+|-]*", re.ASCII)  # what Hydra reads as it stands
_SIZE = re.compile(r"(\+{0,2}model\.params=)(\d+\.?\d*)([kmbt])", re.IGNORECASE)
_POWERS = {"k": 3, "m": 6, "b": 9, "t": 12}


def prepare(arguments: Sequence[str]) -> list[str]:
    """Arguments in the form that Hydra takes: paths quoted, sizes as numbers, and overrides of a
    dictionary's items, with or without ``+``, in the one form that Hydra merges into them.

    `+reward.terms.brevity.kind=length` becomes `++reward.terms={brevity:{kind:length}}`: Hydra
    makes an item of a typed dictionary whole, defaults included, so it would then refuse to add a
    second field, and to set the first.
    """
    known = valid_keys(list(STAGES))
    return [
        _merging(_with_number(argument), parents(known, NAME), parents(known, ANYTHING))
        for argument in quote_paths(arguments)
    ]


def quote_paths(arguments: Sequence[str]) -> list[str]:
    """Overrides whose path holds a cap, a glob or another character that Hydra's grammar has no use
    for (data.path=rows.jsonl#500, data.path=~/rows (1).jsonl), quoted as it wants them; others as
    they are.
    """
    return [_quoted_path(argument) for argument in arguments]


def _quoted_path(argument: str) -> str:
    match = _PATH.fullmatch(argument)
    if match is None or _PLAIN_PATH.fullmatch(match[2]) or "${" in match[2]:
        return argument
    return f'{match[1]}="{match[2]}"'


def _with_number(argument: str) -> str:
    """model.params=7b as model.params=7e9; k, m, b and t are thousands, millions, billions and
    trillions. Others as they are.
    """
    match = _SIZE.fullmatch(argument)
    if match is None:
        return argument
    return f"{match[1]}{match[2]}e{_POWERS[match[3].lower()]}"


def _merging(argument: str, of_items: Sequence[str], of_anything: Sequence[str]) -> str:
    key, equals, value = argument.lstrip("+").partition("=")
    for parent in of_anything:
        if key.startswith(f"{parent}.") or (key == parent and value.startswith("{")):
            return f"++{key}={value}"
    for parent in of_items:
        if equals and key.startswith(f"{parent}."):
            path = key.removeprefix(f"{parent}.").split(".")
            before = "".join(f"{{{part}:" for part in path)
            after = "}" * len(path)
            values = [f"{before}{value}{after}" for value in _values(argument, value)]
            return f"++{parent}={','.join(values)}"
    return argument


def _values(argument: str, value: str) -> list[str]:
    """The values of a sweep, or the only value as it was written."""
    override = _parse(argument)
    return list(override.sweep_string_iterator()) if override.is_sweep_override() else [value]


def _parse(argument: str) -> Any:
    """Hydra's reading of one override. Raises UserError with the quoting that would work, if any
    would.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    try:
        return parser.parse_override(argument)
    except HydraException as error:
        reason = f"{argument}: {str(error).splitlines()[0]}"
        quoted = quoting(argument)
        if quoted is None:
            raise UserError(f"The command line can't be read at {reason}.") from error
        raise UserError(
            f"The command line can't be read at {reason}. Quote texts once for Hydra, and the "
            f"whole once for the shell: {quoted}"
        ) from error


def is_readable(argument: str) -> bool:
    """Whether Hydra can read an override as it stands, as one value."""
    try:
        return not _parse(argument).is_sweep_override()
    except UserError:
        return False


def is_dictionary(key: str) -> bool:
    """Whether an option's value is a dictionary."""
    keys = valid_keys(list(STAGES))
    return general(key, keys)[0] in (*parents(keys, NAME), *parents(keys, ANYTHING))


def quoting(argument: str) -> str | None:
    """How to write an override in a shell so that Hydra reads what it says; None where no quoting
    would help.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, equals, text = argument.partition("=")
    for value in _meanings(text) if equals else ():
        written = f"{key}={_in_grammar(value)}"
        try:
            override = OverridesParser.create().parse_override(written)
        except HydraException:
            continue
        if not override.is_sweep_override() and override.value() == value:
            return shlex.quote(written)
    return None


_ONE_ITEM = re.compile(r"\{\s*([\w.]+)\s*:\s*([^:{}\[\]]*[^:{}\[\]\s])\s*\}")


def _meanings(text: str) -> Iterator[Any]:
    """What a value may mean that Hydra can't parse: a dictionary or a list as YAML has them, or a
    text.
    """
    import yaml

    if not text.startswith(("{", "[")):
        yield text
        return
    if (match := _ONE_ITEM.fullmatch(text)) and not match[2].startswith(("'", '"')):
        yield {match[1]: match[2]}
    try:
        yield yaml.safe_load(text)
    except yaml.YAMLError:
        return


def _in_grammar(value: Any) -> str:
    """A value in Hydra's grammar, its texts in quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_in_grammar(held)}" for key, held in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_in_grammar, value)) + "]"
    if isinstance(value, str):
        if re.fullmatch(r"[A-Za-z_][\w./-]*", value, re.ASCII):
            return value
        escaped = value.replace('"', '\\"')
        return f'"{escaped}"'
    return "null" if value is None else str(value).lower()


def check_overrides(arguments: Sequence[str]) -> None:
    """Refuse unknown groups, presets and keys (also with ``+``) with the nearest valid one, and
    several values without -m. Raises UserError.
    """
    command_line = split(quote_paths(arguments))
    overrides = [_parse(argument) for argument in command_line.overrides]
    stages = _stages(overrides)
    schemas = [stage_schema(stage) for stage in stages]
    keys = valid_keys(schemas or list(STAGES))
    of_stage = f" of stage={stages[0]}" if len(stages) == 1 else ""
    folders = _folders(overrides)
    for override in overrides:
        key = override.key_or_group
        if override.is_delete():
            raise UserError(
                f"{override.input_line}: options can't be deleted; set {key} to a value, or to "
                "null where it may be unset."
            )
        if override.is_sweep_override() and not command_line.multirun:
            raise UserError(_several_values(override))
        if key in ("hydra", "stage") or key.startswith(("hydra.", "hydra/")):
            continue
        if key in PRESET_GROUPS:
            _check_preset(override, folders)
        else:
            _check_key(override, keys, of_stage)


def _stages(overrides: Sequence[Any]) -> list[str]:
    """The stages of the command line, several in a sweep. Raises UserError for an unknown one."""
    stages: list[str] = []
    for override in overrides:
        if override.key_or_group != "stage":
            continue
        if override.is_sweep_override():
            stages = list(override.sweep_string_iterator())
        else:
            value = override.value()
            stages = [str(stage) for stage in (value if isinstance(value, list) else [value])]
    known = choices("stage")
    for stage in stages:
        if stage not in known:
            raise UserError(
                f"stage={stage}: no such stage. Stages: {', '.join(known)}. "
                f"Nearest: stage={nearest(stage, known)}."
            )
    return stages


def _several_values(override: Any) -> str:
    key, _, value = override.input_line.partition("=")
    text = shlex.quote(f'{key}="{value}"')
    return (
        f"{override.input_line}: several values. A list is written {key}=[{value}], a text {text}; "
        "a run for each value needs the flag -m."
    )


_SEARCH_PATH = "hydra.searchpath"


def _folders(overrides: Sequence[Any]) -> list[Path]:
    """Folders with presets of a user's own: hydra.searchpath=[file:///FOLDER]."""
    for override in overrides:
        if override.key_or_group == _SEARCH_PATH and not override.is_sweep_override():
            named = [str(folder) for folder in override.value() or []]
            return [Path(folder.removeprefix("file://")) for folder in named]
    return []


def _check_preset(override: Any, folders: Sequence[Path]) -> None:
    group, value = override.key_or_group, override.value()
    if override.is_sweep_override() or value is None:
        return
    own = [path.stem for folder in folders for path in sorted((folder / group).glob("*.yaml"))]
    known = [*choices(group), *own]
    for name in map(str, value if isinstance(value, list) else [value]):
        if name not in known:
            raise UserError(
                f"{group}={name}: no such preset. Presets of {group}: {', '.join(known)}. "
                f"Nearest: {group}={nearest(name, known)}."
            )


def _check_key(override: Any, keys: Sequence[str], of_stage: str) -> None:
    value = None if override.is_sweep_override() else override.value()
    for key in _keys_inside(override.key_or_group, value):
        in_general, name = general(key, keys)
        if in_general not in keys:
            close = nearest(in_general, [*keys, *PRESET_GROUPS]).replace(NAME, name or NAME)
            raise UserError(f"{key}: no such option{of_stage}. Nearest: {close}.")


def _keys_inside(key: str, value: Any) -> Iterator[str]:
    """`key`, and the keys inside a dictionary that it is set to."""
    yield key
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _keys_inside(f"{key}.{name}", inner)


@dataclass(frozen=True, slots=True)
class CommandLine:
    """A command line as Hydra splits it."""

    overrides: list[str]  # option=value, in their order
    multirun: bool  # -m: a job for each combination of the values of sweeps


def split(arguments: Sequence[str]) -> CommandLine:
    """Overrides apart from Hydra's flags. Exits with Hydra's usage line for an unknown flag."""
    from hydra._internal.utils import get_args

    args = get_args(list(arguments))
    return CommandLine(overrides=list(args.overrides), multirun=bool(args.multirun))
