"""The checks of a configuration, as the command line runs them before a stage."""

from conf.schema import Config
from rlhf.__main__ import stage_module
from rlhf.checks import preflight


def check(cfg: Config) -> list[str]:
    """The notes of the stage's own check. Raises UserError."""
    return preflight.check(stage_module(cfg.stage.name).check, cfg)
