"""Registers the typed schemas with Hydra, checks the command line's keys, and turns a composed
config into dataclasses.
"""

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf import schema
from conf.stages import STAGES
from rlhf.types import UserError

CONF_DIR = Path(schema.__file__).resolve().parent
NAME = "<name>"  # stands in a dotted option for the name of a dictionary's item
ANYTHING = "<anything>"  # below it every key is valid
_PATH = re.compile(
    r"(\+{0,2}data\.(?:path|eval_path|registry|sources\.[^.=]+\.path))=([^'\"\[{,][^'\",]*)"
)
_SIZE = re.compile(r"(\+{0,2}model\.params=)(\d+\.?\d*)([kmbt])", re.IGNORECASE)
_POWERS = {"k": 3, "m": 6, "b": 9, "t": 12}
GROUPS = (
    "stage",
    "model",
    "adapter",
    "engine",
    "rollout",
    "reward",
    "data",
    "tracking",
    "experiment",
)
_GROUP_SCHEMAS = {
    "model": schema.ModelConfig,
    "adapter": schema.AdapterConfig,
    "engine": schema.EngineConfig,
    "rollout": schema.RolloutConfig,
    "reward": schema.RewardConfig,
    "data": schema.DataConfig,
    "tracking": schema.TrackingConfig,
}


def register() -> None:
    """Store every schema under ``/schema`` so that a YAML can say ``/schema/engine@_here_``."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(group="schema", name="config", node=schema.Config, package="_global_")
    for name, node in _GROUP_SCHEMAS.items():
        store.store(group="schema", name=name, node=node)
    for name, node in STAGES.items():
        store.store(group="schema/stage", name=name, node=node)


def choices(group: str) -> list[str]:
    """Names of the presets in ``conf/<group>``, in the order of the stages where the group is
    ``stage``.
    """
    names = sorted(
        str(p.relative_to(CONF_DIR / group).with_suffix(""))
        for p in (CONF_DIR / group).glob("*.yaml")
    )
    if group == "stage":
        order = list(STAGES)
        names.sort(key=lambda n: order.index(n) if n in order else len(order))
    return names


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.0)
    return close[0] if close else ""


def _subdataclass(annotation: Any) -> type | None:
    return (
        annotation
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation)
        else None
    )


def _items(annotation: Any) -> type | None:
    """What a dictionary of dataclasses by name holds (`reward.terms`)."""
    return (
        _subdataclass(typing.get_args(annotation)[1])
        if typing.get_origin(annotation) is dict
        else None
    )


def _free(annotation: Any) -> bool:
    """A dictionary of anything (`data.gym.options`): whoever reads it checks it."""
    return typing.get_origin(annotation) is dict and typing.get_args(annotation)[1] is Any


def valid_keys(stages: Sequence[str]) -> list[str]:
    """Every dotted option that the given stages have; the items of a dictionary as
    `reward.terms.<name>.weight`.
    """

    def walk(cls: type, prefix: str) -> list[str]:
        out = []
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            inner = _subdataclass(hints[f.name])
            key = prefix + f.name
            out.append(key)
            if inner is not None:
                out.extend(walk(inner, key + "."))
            item = _items(hints[f.name])
            if item is not None:
                out.extend([f"{key}.{NAME}", *walk(item, f"{key}.{NAME}.")])
            if _free(hints[f.name]):
                out.append(f"{key}.{ANYTHING}")
        return out

    keys = [k for k in walk(schema.Config, "") if k != "stage"]
    for stage in stages:
        keys.extend(k for k in walk(STAGES[stage], "stage.") if k not in keys)
    return keys


def _named(key: str, keys: Sequence[str]) -> tuple[str, str]:
    """`key` with the name of a dictionary's item as `<name>`, and that name:
    reward.terms.brevity.kind -> reward.terms.<name>.kind, brevity.
    """
    free = [k for k in keys if k.endswith(f".{ANYTHING}")]

    def anything(one: str) -> str:
        return next((place for place in free if one.startswith(place.removesuffix(ANYTHING))), one)

    if anything(key) != key:
        return anything(key), ""
    for place in (k.removesuffix(f".{NAME}") for k in keys if k.endswith(f".{NAME}")):
        if key.startswith(place + "."):
            name, dot, rest = key.removeprefix(place + ".").partition(".")
            return anything(f"{place}.{NAME}{dot}{rest}"), name
    return key, ""


def _keys_of(key: str, value: Any) -> list[str]:
    """`key`, and the keys inside a dictionary that it is set to."""
    inner = (
        [k for name, v in value.items() for k in _keys_of(f"{key}.{name}", v)]
        if isinstance(value, dict)
        else []
    )
    return [key, *inner]


def merge_items(arguments: Sequence[str]) -> list[str]:
    """Overrides of a dictionary's items, with or without ``+``, in the one form that Hydra merges
    into them.

    `+reward.terms.brevity.kind=length` becomes `++reward.terms={brevity:{kind:length}}`: a typed
    item springs up whole, defaults included, so Hydra would refuse to add its second field and to
    set its first.
    """
    arguments = [_spelled_out(one) for one in quote_paths(arguments)]
    known = valid_keys([])
    places = [k.removesuffix(f".{NAME}") for k in known if k.endswith(f".{NAME}")]
    free = tuple(k.removesuffix(ANYTHING) for k in known if k.endswith(f".{ANYTHING}"))
    out = []
    for argument in arguments:
        key, equals, value = argument.lstrip("+").partition("=")
        if key.startswith(free) or (f"{key}." in free and value.startswith("{")):
            out.append(f"++{key}={value}")
            continue
        place = next((p for p in places if key.startswith(p + ".")), None)
        if place is None or not equals:
            out.append(argument)
            continue
        path = key.removeprefix(place + ".").split(".")
        before, after = "".join(f"{{{part}:" for part in path), "}" * len(path)
        out.append(
            f"++{place}=" + ",".join(f"{before}{one}{after}" for one in _choices(argument, value))
        )
    return out


def quote_paths(arguments: Sequence[str]) -> list[str]:
    """Overrides whose path holds a cap or a glob (data.path=rows.jsonl#500), quoted as Hydra's
    grammar wants them; others as they are.
    """
    out = []
    for argument in arguments:
        match = _PATH.fullmatch(argument)
        out.append(
            f'{match[1]}="{match[2]}"'
            if match is not None and any(mark in match[2] for mark in "#[]")
            else argument
        )
    return out


def _spelled_out(argument: str) -> str:
    """model.params=7b as model.params=7e9; k, m, b and t are thousands, millions, billions and
    trillions. Others as they are.
    """
    match = _SIZE.fullmatch(argument)
    return f"{match[1]}{match[2]}e{_POWERS[match[3].lower()]}" if match is not None else argument


def _choices(argument: str, value: str) -> list[str]:
    """The values of a sweep, or the one value as it was written."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException as error:
        raise UserError(f"The command line can't be read: {error}") from error
    return list(override.sweep_string_iterator()) if override.is_sweep_override() else [value]


def check_overrides(arguments: Sequence[str]) -> None:
    """Refuse unknown groups, presets and keys (also with ``+``) with the nearest valid one. Raises
    UserError.
    """
    from hydra._internal.utils import get_args
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    try:
        overrides = [parser.parse_override(a) for a in get_args(quote_paths(arguments)).overrides]
    except HydraException as error:
        raise UserError(f"The command line can't be read: {error}") from error
    known_stages = choices("stage")
    stages: list[str] = []
    for override in overrides:
        if override.key_or_group == "stage":
            values = (
                override.value()
                if not override.is_sweep_override()
                else list(override.sweep_string_iterator())
            )
            stages = [str(v) for v in (values if isinstance(values, list) else [values])]
            for stage in stages:
                if stage not in known_stages:
                    raise UserError(
                        f"stage={stage}: no such stage. Stages: {', '.join(known_stages)}. "
                        f"Nearest: stage={_nearest(stage, known_stages)}."
                    )
    stage_names = [stage_schema(s) for s in stages] or list(STAGES)
    keys = valid_keys(stage_names)
    for override in overrides:
        key = override.key_or_group
        if override.is_delete():
            raise UserError(
                f"{override.input_line}: options can't be deleted; set {key} to a value, or to "
                "null where it may be unset."
            )
        if key in ("hydra", "stage") or key.startswith(("hydra.", "hydra/")):
            continue
        if key in GROUPS:
            if (
                not override.is_sweep_override()
                and override.value() is not None
                and str(override.value()) not in choices(key)
            ):
                known = choices(key)
                raise UserError(
                    f"{key}={override.value()}: no such preset. Presets of {key}: "
                    f"{', '.join(known)}. "
                    f"Nearest: {key}={_nearest(str(override.value()), known)}."
                )
            continue
        where = f" of stage={stages[0]}" if len(stages) == 1 else ""
        for one in _keys_of(key, override.value() if not override.is_sweep_override() else None):
            found, name = _named(one, keys)
            if found not in keys:
                raise UserError(
                    f"{one}: no such option{where}. Nearest: "
                    f"{_nearest(found, keys + list(GROUPS)).replace(NAME, name or NAME)}."
                )


def stage_schema(preset: str) -> str:
    """The schema that ``conf/stage/<preset>.yaml`` builds on (an algorithm's preset builds on
    ``ppo``).
    """
    import yaml

    defaults = yaml.safe_load((CONF_DIR / "stage" / f"{preset}.yaml").read_text(encoding="utf-8"))[
        "defaults"
    ]
    for entry in defaults:
        if isinstance(entry, str) and entry.startswith("/schema/stage/"):
            return entry.removeprefix("/schema/stage/").removesuffix("@_here_")
    raise UserError(
        f"conf/stage/{preset}.yaml: its defaults list names no /schema/stage/<schema>@_here_."
    )


def stage_preset(preset: str) -> Any:
    """The stage of ``conf/stage/<preset>.yaml`` as a dataclass, without composing the rest. Raises
    UserError for no such preset.
    """
    import yaml
    from omegaconf import OmegaConf

    known = choices("stage")
    if preset not in known:
        raise UserError(
            f"no stage {preset!r}. Stages: {', '.join(known)}. Nearest: {_nearest(preset, known)}."
        )
    values = yaml.safe_load((CONF_DIR / "stage" / f"{preset}.yaml").read_text(encoding="utf-8"))
    values.pop("defaults")
    return OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(STAGES[stage_schema(preset)]), values)
    )


def to_dataclass(cfg: Any) -> schema.Config:
    """A composed DictConfig as dataclasses: unknown keys and out-of-range values end here. Raises
    UserError.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        out = OmegaConf.to_object(cfg)
    except (OmegaConfBaseException, ValueError, TypeError, ArithmeticError) as error:
        place = f"{error.full_key}: " if isinstance(error, MissingMandatoryValue) else ""
        raise UserError(place + str(error).splitlines()[0]) from error
    assert isinstance(out, schema.Config)
    _check_finite("", out)
    return out


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
    """One line for a failed composition: Hydra's message with the cause that it wraps."""
    lines = [str(error).splitlines()[0]]
    if error.__cause__ is not None:
        lines.append(str(error.__cause__).splitlines()[0])
    return ": ".join(lines)


def to_yaml(cfg: schema.Config) -> str:
    """The resolved configuration as YAML, enumerations by name."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def compose(overrides: Sequence[str]) -> schema.Config:
    """Compose without the command line (tests, the chain stage, notebooks)."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    check_overrides(overrides)
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        try:
            composed = hydra_compose("config", overrides=merge_items(overrides))
        except HydraException as error:
            raise UserError(explain(error)) from error
    return to_dataclass(composed)
