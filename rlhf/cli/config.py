"""From overrides to the configuration: registers the dataclasses with Hydra, composes the YAML of
conf/, and turns the result into dataclasses.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from conf.schema import GROUPS, Config
from conf.stages import STAGES
from rlhf.cli.overrides import check_overrides, prepare
from rlhf.cli.presets import CONF_DIR, choices, nearest, preset_text, stage_schema
from rlhf.types import UserError


def register() -> None:
    """Store every dataclass in ``/schema``, so that a YAML can say ``/schema/engine@_here_``."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(group="schema", name="config", node=Config, package="_global_")
    for name, node in GROUPS.items():
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
    """One line for a failed composition: Hydra's message with the cause that it wraps."""
    lines = [str(error).splitlines()[0]]
    if error.__cause__ is not None:
        lines.append(str(error.__cause__).splitlines()[0])
    return ": ".join(lines)


def to_yaml(configuration: object) -> str:
    """The resolved configuration as YAML, enumerations by name."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(configuration))
