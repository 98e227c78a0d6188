"""Runs one stage in this process: the ranks join, the data is there, the stage's check passes, the
run directory opens, the stage runs.
"""

import logging
import os
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from conf import published
from conf.choices import Recipe
from conf.schema import Config
from conf.stages import TrainStage
from rlhf.cli.presets import module_name, stage_schema
from rlhf.process import distributed
from rlhf.process.libraries import quiet_libraries
from rlhf.process.supervision import Watchdog

# From the name of a module in rlhf/stages/ to the module, imported: rlhf/__main__.py has it.
Modules = Callable[[str], Any]

LOG = logging.getLogger("rlhf")
# Modules of rlhf/stages/ that are no stages. A stage that trains gets its rows by the first, and is
# looked at by the second; the others are for the runs that ask for them.
_ROWS, _MEMORY, _DRY_RUN, _RECIPE = "rows", "memory", "dry_run", "recipe"
# torch takes seconds to import: a chain needs none, and stage=data imports it for the steps that
# load a model
_WITHOUT_TORCH = ("chain", "data")


def execute(cfg: Config, argv: Sequence[str], modules: Modules) -> None:
    """Run the stage of `cfg`. `argv` is the command line, for the manifest. Raises UserError for
    bad input, before any weights load.
    """
    # fork after threads would warn at every data worker
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    schema, name = stage_schema(cfg.stage.name), module_name(cfg.stage.name)
    if schema not in _WITHOUT_TORCH:
        distributed.name_accelerator()
    if schema not in ("chain", "data", "doctor"):
        # The others load no model by themselves, and transformers takes seconds to import.
        quiet_libraries()
    if schema in ("chain", "doctor"):
        stage = modules(name)
    else:
        stage = _checked(cfg, name, modules)
        if not cfg.run.dry_run and schema not in _WITHOUT_TORCH:
            distributed.set_threads(cfg.engine.threads)
    if cfg.run.dry_run:
        if distributed.is_main():
            modules(_DRY_RUN).show(cfg, argv)
    elif schema == "doctor":
        stage.run(SimpleNamespace(cfg=cfg))  # it only looks, so it leaves no run directory
    else:
        _run(cfg, argv, stage, modules)


def checks_of(stage: Any, modules: Modules) -> list[Any]:
    """The checks of a stage, given by its options: its own, then those of its rows and of its
    memory where it trains.
    """
    checks = [modules(module_name(stage.name)).check]
    if isinstance(stage, TrainStage):
        checks += [modules(_ROWS).check, modules(_MEMORY).check]
    return checks


def _checked(cfg: Config, name: str, modules: Modules) -> Any:
    """Join the other ranks, make sure of the data, and check the configuration. Returns the stage's
    module. Raises UserError on all ranks alike.
    """
    from rlhf.checks import launch

    limit = cfg.run.phase_timeout_s or 0.0
    with Watchdog(cfg.run.phase_timeout_s) as watchdog:
        watchdog.phase("launch")
        # Ranks that wait for one that hangs must outlive it: its watchdog tells the cause, their
        # timeout would tell a consequence.
        distributed.initialise(max(30.0, limit / 60 + 10.0))
        watchdog.phase("download")
        if cfg.data.recipe is not Recipe.none:
            modules(_RECIPE).ensure(cfg)
        watchdog.phase("preflight")
        stage = modules(name)
        if isinstance(cfg.stage, TrainStage):
            modules(_MEMORY).choose_micro_batch(cfg)
        for note in launch.check_stage(checks_of(cfg.stage, modules), cfg):
            LOG.warning(note)
        rates = published.taken(cfg.stage, cfg.adapter.kind)
        if rates and distributed.is_main():
            LOG.info(rates)
    return stage


def _run(cfg: Config, argv: Sequence[str], stage: Any, modules: Modules) -> None:
    from rlhf.run.context import RunContext

    with Watchdog(cfg.run.phase_timeout_s) as watchdog:
        watchdog.phase("open the run")
        # stages whose checkpoints depend on the number of ranks have such a function
        adapt = getattr(stage, "adapt_checkpoint", None)
        ctx = RunContext.open(cfg, argv, adapt)
    if isinstance(cfg.stage, TrainStage):
        stage.run(ctx, modules(_ROWS))
    else:
        stage.run(ctx)
