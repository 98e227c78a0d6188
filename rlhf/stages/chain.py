"""stage=chain: SFT, reward model, PPO and evaluation from one command, each stage in a process of its own."""

import signal
import subprocess
import sys
import time

from conf.stages import ChainStage
from rlhf import config, distributed
from rlhf.interrupts import Stopping
from rlhf.run import RunContext
from rlhf.types import UserError


def commands(stages: list[str], overrides: list[str]) -> list[list[str]]:
    """One command per stage: the chain's own overrides without its ``stage`` ones."""
    shared = [o for o in overrides if not o.lstrip("+").startswith(("stage=", "stage."))]
    return [[sys.executable, "-m", "rlhf", f"stage={stage}", *shared] for stage in stages]


def run_stage(command: list[str]) -> int:
    """A stage in a process of its own; its exit code. SIGTERM is passed on to it; Ctrl-C reaches it by itself. Either lets it save first."""
    with subprocess.Popen(command) as process:

        def pass_on(number: int) -> None:
            if number == signal.SIGTERM:
                process.send_signal(number)

        with Stopping(pass_on):
            return process.wait()


def run(ctx: RunContext) -> None:
    """Every stage is composed and checked before the first one starts; a stage that fails ends the chain with its exit code in the message."""
    stage = ctx.cfg.stage
    assert isinstance(stage, ChainStage)
    if distributed.world_size() > 1:
        raise UserError("stage=chain starts the stages itself: run it without torchrun, or launch each stage with torchrun.")
    planned = commands(list(stage.stages), list(ctx.argv))
    for command in planned:
        config.compose(command[3:])
    metrics: dict[str, float] = {}
    for name, command in zip(stage.stages, planned, strict=True):
        began = time.perf_counter()
        ctx.tracker.log(len(metrics), {"chain/stage": float(len(metrics))})
        code = run_stage(command)
        if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            raise SystemExit(code)  # the stage has said what it saved
        if code != 0:
            raise UserError(f"stage={name} of the chain ended with exit code {code}. Its command: python {' '.join(command[1:])}")
        metrics[f"time/{name}_s"] = time.perf_counter() - began
    total = sum(metrics.values())
    ctx.finish(
        steps=len(planned),
        metrics=metrics | {"time/total_s": total},
        model=None,
        figures={name: f"{seconds:.0f}" for name, seconds in metrics.items()} | {"seconds in all": f"{total:.0f}"},
    )
