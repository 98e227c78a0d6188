"""What each worker of a search has of the machine: cores and CUDA devices."""

import os

from conf.methods import SearchStage
from rlhf.launch.machine import parse_cores
from rlhf.process.devices import visible_devices
from rlhf.search.running import Slot

_DEVICES = "CUDA_VISIBLE_DEVICES"


def slots(stage: SearchStage) -> list[Slot]:
    """A slot for each of stage.workers. Raises UserError for cores that this process hasn't."""
    cores, devices = _cores(stage), _devices(stage)
    out = []
    for number in range(stage.workers):
        environment = {} if devices is None else {_DEVICES: devices[number]}
        own = None if cores is None else cores[number]
        out.append(Slot(number=number, cores=own, environment=environment))
    return out


def _cores(stage: SearchStage) -> list[frozenset[int]] | None:
    """The cores of each worker; None: any."""
    if stage.cores is not None:
        return [frozenset(parse_cores("stage.cores", text)) for text in stage.cores]
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    each = len(usable) // stage.workers
    if stage.workers == 1 or each == 0:
        return None
    return [frozenset(usable[n * each : (n + 1) * each]) for n in range(stage.workers)]


def _devices(stage: SearchStage) -> list[str] | None:
    """The CUDA devices of each worker, in the words of CUDA_VISIBLE_DEVICES; None: as the
    environment has them. Workers share devices where there are fewer of them.
    """
    if stage.devices is not None:
        return stage.devices
    found = visible_devices() if stage.workers > 1 else []
    if not found:
        return None
    each = len(found) // stage.workers
    if each == 0:
        return [found[number % len(found)] for number in range(stage.workers)]
    return [",".join(found[n * each : (n + 1) * each]) for n in range(stage.workers)]
