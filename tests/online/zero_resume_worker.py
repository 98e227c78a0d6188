"""Run by torchrun (tests/policy/test_resharding.py): command lines, one after another, in one
launch; with faults that a command line can't ask for.

argument: a JSON object: `commands`, a list of lists of options; `best`, the step whose evaluation
is to be the best of the TRL stages (null: as measured); `poison`, {"rank", "step"} of the critic's
loss that is NaN (null: none). A run that rewinds is compared with what it saved.
"""

import importlib
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from policy.engines import resharding
from policy.model import trainable
from rlhf.cli import config
from rlhf.online import loop as online
from rlhf.process import distributed
from rlhf.run.context import RunContext
from rlhf.stages import methods
from rlhf.stages import rows as stage_rows
from tests import drawing

MODULES = {"ppo": "online", "grpo": "online", "sft": "sft"}


def prefer(step: int) -> None:
    """Make the evaluation of one step the best of the run's."""
    real = Trainer._determine_best_metric

    def determine(self: Any, metrics: dict[str, float], trial: Any) -> bool:
        return real(self, metrics | {"eval_loss": float(abs(self.state.global_step - step))}, trial)

    Trainer._determine_best_metric = determine


def poison(rank: int, step: int) -> None:
    """A NaN in the critic's targets, and so in its loss, at one step of one rank."""
    real, calls = online.prepare, [0]

    def prepare(*args: Any, **kwargs: Any) -> Any:
        batch = real(*args, **kwargs)
        calls[0] += 1
        if calls[0] == step and distributed.rank() == rank:
            batch.returns[0, 0] = math.nan
        return batch

    online.prepare = prepare  # type: ignore[assignment]


def state_of(loop: online.Loop) -> dict[str, torch.Tensor]:
    """Policy and critic: this rank's float32 masters, moments and step counts, and the whole
    weights that the forward pass uses.
    """
    out = {}
    for role, engine in (
        ("policy", loop.parts.models.policy),
        ("critic", loop.parts.models.critic),
    ):
        zero = engine.engine.optimizer
        masters = (
            zero.fp32_partitioned_groups_flat
            if hasattr(zero, "fp32_partitioned_groups_flat")
            else zero.single_partition_of_fp32_groups
        )
        out[f"{role}.steps"] = torch.tensor(engine.steps)
        for number, master in enumerate(masters):
            out[f"{role}.{number}"] = master.detach().clone()
            out |= {
                f"{role}.{number}.{kind}": value.detach().clone()
                for kind, value in zero.optimizer.state[master].items()
            }
        for number, param in enumerate(trainable(engine.module)):
            with engine.gather([param]):
                out[f"{role}.weight.{number}"] = param.detach().clone()
    assert {name.rsplit(".", 1)[1] for name in out} >= {"steps", "step", "exp_avg", "exp_avg_sq"}
    return out


def compare_rewinds(done: list[int]) -> None:
    """After a rewind everything is what it was when the checkpoint was saved, and before it
    something was not.
    """
    saved: dict[int, dict[str, torch.Tensor]] = {}
    save, rewind = online.Loop._save, online.Loop._rewind

    def saving(self: online.Loop, step: int) -> None:
        save(self, step)
        saved[step] = state_of(self)

    def rewinding(self: online.Loop, error: online.BadStep) -> None:
        before = state_of(self)
        rewind(self, error)
        expected, found = saved[self.state.step], state_of(self)
        assert any(not torch.equal(before[name], expected[name]) for name in expected), (
            "nothing had changed, so nothing was tested"
        )
        wrong = [name for name in expected if not torch.equal(found[name], expected[name])]
        assert not wrong, f"rank {distributed.rank()}, after the rewind: {wrong}"
        done.append(self.state.step)

    online.Loop._save, online.Loop._rewind = saving, rewinding  # type: ignore[method-assign]


def main() -> None:
    methods.register()
    drawing.off()
    given = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.WARNING)
    distributed.initialise()
    distributed.set_threads(1)
    rewinds: list[int] = []
    if given.get("best") is not None:
        prefer(given["best"])
    if given.get("poison"):
        compare_rewinds(rewinds)
    unpoisoned = online.prepare
    for command in given["commands"]:
        if given.get("poison"):
            online.prepare = unpoisoned  # type: ignore[assignment]
            poison(**given["poison"])
        cfg = config.compose(command)
        importlib.import_module(f"rlhf.stages.{MODULES[cfg.stage.name]}").run(
            RunContext.open(cfg, (), resharding.adapt), stage_rows
        )
        distributed.barrier()
        if given.get("poison") and distributed.is_main():
            (Path(cfg.run.dir) / cfg.run.name / "rewinds.json").write_text(
                json.dumps(rewinds), encoding="utf-8"
            )
        rewinds.clear()
    distributed.shutdown()


if __name__ == "__main__":
    main()
