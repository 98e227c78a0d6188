"""The checks of a configuration, as the command line runs them before a stage."""

from conf.schema import Config
from rlhf.__main__ import stage_module
from rlhf.checks import launch


def check(cfg: Config) -> list[str]:
    """The notes of the stage's own check. Raises UserError."""
    return launch.check_stage(stage_module(cfg.stage.name).check, cfg)
