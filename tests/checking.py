"""The checks of a configuration, as the command line runs them before a stage."""

from conf.schema import Config
from rlhf.__main__ import stage_modules
from rlhf.checks import launch
from rlhf.cli.command import checks_of
from rlhf.stages import methods


def check(cfg: Config) -> list[str]:
    """The notes of the stage's checks. Raises UserError."""
    methods.register()
    return launch.check_stage(checks_of(cfg.stage, stage_modules), cfg)
