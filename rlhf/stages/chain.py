"""stage=chain: SFT, reward model, PPO and evaluation from one command, each stage in a process of
its own.
"""

import json
import logging
import signal
import sys
import time
from collections.abc import Sequence

import yaml

from conf.schema import Config
from conf.stages import ChainStage
from rlhf.cli import config
from rlhf.process import distributed
from rlhf.process.supervision import run_child
from rlhf.run.context import RunContext
from rlhf.run.directory import CONFIG_FILE, SUMMARY_FILE, changed_options, run_directory
from rlhf.run.tracking.files import plain_config
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.stages.chain")


def commands(stages: list[str], overrides: list[str]) -> list[list[str]]:
    """One command per stage: the chain's own overrides without its ``stage`` ones."""
    shared = [o for o in overrides if not o.lstrip("+").startswith(("stage=", "stage."))]
    return [[sys.executable, "-m", "rlhf", f"stage={stage}", *shared] for stage in stages]


def finished(composed: Sequence[Config]) -> list[float]:
    """Wall seconds of the first stages that a resumed chain leaves as they are: those that have
    ended.

    Raises UserError for one that ended with other options, or before a stage that it builds on.
    """
    out: list[float] = []
    for place, cfg in enumerate(composed):
        directory = run_directory(cfg)
        if not (directory / SUMMARY_FILE).is_file():
            continue
        if len(out) < place:
            raise UserError(
                f"{directory} is finished, but stage={composed[len(out)].stage.name} of the "
                "chain, which comes before it, is not: it would be "
                "kept as it is, from other weights. Remove it, or start the chain anew with "
                "run.overwrite=true or another run.name."
            )
        stored = yaml.safe_load((directory / CONFIG_FILE).read_text(encoding="utf-8")) or {}
        changed = changed_options(stored, plain_config(cfg))
        if changed:
            raise UserError(
                f"{directory} is finished, with other options: {'; '.join(changed[:3])}. Set "
                "them back, or start the chain anew with "
                "run.overwrite=true or another run.name."
            )
        out.append(
            float(json.loads((directory / SUMMARY_FILE).read_text(encoding="utf-8"))["wall_s"])
        )
    return out


def run(ctx: RunContext) -> None:
    """Every stage is composed and checked before the first one starts; a stage that fails ends the
    chain with its exit code in the message.

    With ``run.resume=true`` stages that have ended are left as they are, and the first that has not
    goes on from its last checkpoint.
    """
    stage = ctx.cfg.stage_as(ChainStage)
    remedy = "Run it without torchrun, or launch each stage with torchrun."
    distributed.require_one_process("stage=chain", remedy)
    planned = commands(list(stage.stages), list(ctx.argv))
    composed = [config.compose(command[3:]) for command in planned]
    done = finished(composed) if ctx.cfg.run.resume else []
    metrics: dict[str, float] = {}
    for number, (name, command) in enumerate(zip(stage.stages, planned, strict=True)):
        ctx.tracker.log(number, {"chain/stage": float(number)})
        if number < len(done):
            LOG.info("stage=%s has ended already and is left as it is.", name)
            metrics[f"time/{name}_s"] = done[number]
            continue
        began = time.perf_counter()
        code = run_child(command)
        if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            raise SystemExit(code)  # the stage has said what it saved
        if code != 0:
            raise UserError(
                f"stage={name} of the chain ended with exit code {code}; run.resume=true goes on "
                f"with it. Its command: python {' '.join(command[1:])}"
            )
        metrics[f"time/{name}_s"] = time.perf_counter() - began
    total = sum(metrics.values())
    ctx.finish(
        steps=len(planned),
        metrics=metrics | {"time/total_s": total},
        model=None,
        figures={name: f"{seconds:.0f}" for name, seconds in metrics.items()}
        | {"seconds in all": f"{total:.0f}"},
    )
