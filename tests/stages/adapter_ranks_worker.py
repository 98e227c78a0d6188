"""Run by torchrun (tests/stages/test_adapter_ranks.py): command lines, one after another, in one
launch.

argument: a JSON list of objects: `options`, those of the command; `killed_at`, the optimizer step
after which the run ends as one that is killed (null: it ends by itself).
"""

import contextlib
import importlib
import json
import logging
import sys
from typing import Any

from policy.engines import resharding
from rlhf.cli import config
from rlhf.offline.step_rows import Tended
from rlhf.process import distributed
from rlhf.run.context import RunContext
from rlhf.stages import methods
from rlhf.stages import rows as stage_rows
from tests import drawing

MODULES = {"sft": "sft", "grpo": "online"} | dict.fromkeys(("dpo", "kto", "orpo"), "preference")


def run(options: list[str], killed_at: int | None) -> None:
    """One command, on every rank."""
    cfg = config.compose(options)
    after_step = Tended.after_step

    def stops(self: Any, trainer: Any) -> None:
        if trainer.state.global_step == killed_at:
            raise KeyboardInterrupt
        after_step(self, trainer)

    Tended.after_step = stops  # type: ignore[method-assign]
    try:
        with contextlib.suppress(KeyboardInterrupt):
            module = importlib.import_module(f"rlhf.stages.{MODULES[cfg.stage.name]}")
            module.run(RunContext.open(cfg, (), resharding.adapt), stage_rows)
    finally:
        Tended.after_step = after_step  # type: ignore[method-assign]
    distributed.barrier()


def main() -> None:
    methods.register()
    drawing.off()
    logging.basicConfig(level=logging.WARNING)
    distributed.initialise()
    distributed.set_threads(1)
    for command in json.loads(sys.argv[1]):
        run(command["options"], command["killed_at"])
    distributed.shutdown()


if __name__ == "__main__":
    main()
