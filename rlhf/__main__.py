"""``python -m rlhf stage=...``: the list of stages, their help, or a run of one of them."""

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from conf.schema import Config
from rlhf.cli import command
from rlhf.cli.presets import module_name
from rlhf.process import redaction


def stage_module(preset: str) -> ModuleType:
    """The module with the `check` and the `run` of the stage `preset`.

    Its name is a string, so that a stage loads no other stage's libraries.
    """
    return stage_modules(module_name(preset))


def stage_modules(name: str) -> ModuleType:
    """The module `name` of rlhf/stages/, imported."""
    return importlib.import_module(f"rlhf.stages.{name}")


def execute(cfg: Config, argv: Sequence[str]) -> None:
    """Run the stage of `cfg` in this process. Raises UserError for bad input, before any weights
    load.
    """
    command.execute(cfg, argv, stage_modules)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default this process's own, and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    return command.main(arguments, execute)


if __name__ == "__main__":
    sys.excepthook = redaction.excepthook
    sys.exit(main())
