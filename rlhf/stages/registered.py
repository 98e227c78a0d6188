"""A step before any stage: options that name a version of the registry
(``registry:mine@production``) become the directory of its files, which are checked against what was
registered.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from conf.schema import RunConfig
from rlhf.registry.names import directory_of
from rlhf.registry.records import PREFIX
from rlhf.registry.store import FILE

LOG = logging.getLogger("rlhf.stages.registered")


def registry_file(run: RunConfig, given: str | None) -> Path:
    """The registry's file: `given`, or the one in run.dir."""
    return Path(given).expanduser() if given else Path(run.dir).expanduser() / FILE


def resolve(options: Any, run: RunConfig) -> None:
    """Replace every text in a configuration that begins with ``registry:``. Raises UserError."""
    _resolved("", options, registry_file(run, None))


def _resolved(key: str, value: Any, file: Path) -> Any:
    """The value without names of the registry; containers are changed in place."""
    if isinstance(value, str) and value.startswith(PREFIX):
        path = directory_of(value, key, file)
        LOG.info("%s=%s is %s", key, value, path)
        return path
    if isinstance(value, dict):
        for name in value:
            value[name] = _resolved(f"{key}.{name}", value[name], file)
    elif isinstance(value, list):
        value[:] = [_resolved(key, inner, file) for inner in value]
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            below = f"{key}.{field.name}".lstrip(".")
            setattr(value, field.name, _resolved(below, inner, file))
    return value
