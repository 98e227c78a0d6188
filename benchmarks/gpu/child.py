"""``python -m rlhf`` for a trial: before the run its memory plan, and at its end what torch took of
the device (`python -m benchmarks.gpu.child NOTES OPTIONS...`).

NOTES is a JSON file: parameters, plan_gib, plan_moment; allocated_gib and reserved_gib on CUDA.
"""

import atexit
import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def planned(options: Sequence[str]) -> dict[str, Any]:
    """What the planner says of the run."""
    from rlhf.checks.memory.moments import machine_of
    from rlhf.checks.memory.plan import plan
    from rlhf.checks.memory.shapes import shapes_of
    from rlhf.checks.memory.states import GIB, total
    from rlhf.cli import config
    from rlhf.stages import methods

    methods.register()
    cfg = config.compose(options)
    shapes, _ = shapes_of(cfg.model, ())
    machine = machine_of(cfg.engine, cfg.model.params, all_devices=False)
    found = plan(cfg, shapes, machine)
    worst, servers = found.peak(), found.servers
    beside = 0.0  # of the same device, or the same host
    if servers is not None and machine.cuda:
        beside = servers.count * servers.devices * total(servers.parts).device
    elif servers is not None:
        beside = servers.on_host
    return {
        "parameters": shapes.policy.parameters,
        "plan_gib": found.device_gib + beside / GIB,
        "plan_moment": f"{worst.phase.value}: {worst.name}",
    }


def taken() -> dict[str, float]:
    """The most that torch held of the device in this process; {} without one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {
        "allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }


def main() -> None:
    notes, options = Path(sys.argv[1]), sys.argv[2:]
    found = planned(options)
    notes.write_text(json.dumps(found), encoding="utf-8")
    atexit.register(lambda: notes.write_text(json.dumps(found | taken()), encoding="utf-8"))
    sys.argv = ["rlhf", *options]
    runpy.run_module("rlhf", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
