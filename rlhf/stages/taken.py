"""What a stage that trains nothing takes of a run and of a configuration."""

from typing import Any, Protocol

from conf.run import RunConfig
from conf.schema import Config


class HasConfig(Protocol):
    """All that such a stage takes of a run: it leaves the directory alone."""

    cfg: Config


class Options(Protocol):
    """What a check reads that needs the stage's own options and the run's."""

    run: RunConfig
    stage: Any
