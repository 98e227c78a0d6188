"""What each worker of a search has of the machine: cores and CUDA devices."""

import os

from conf.methods import SearchStage
from rlhf.launch.machine import parse_cores
from rlhf.process.devices import visible_devices
from rlhf.search.running import Slot

_DEVICES = "CUDA_VISIBLE_DEVICES"


def slots(stage: SearchStage) -> list[Slot]:
    """A slot for each of stage.workers. Raises UserError for cores that this process hasn't."""
    cores = _cores(stage)
    devices = _devices(stage)
    out = []
    for number in range(stage.workers):
        environment = {}
        if devices is not None:
            environment[_DEVICES] = devices[number]
        own = None
        if cores is not None:
            own = cores[number]
        out.append(Slot(number=number, cores=own, environment=environment))
    return out


def _cores(stage: SearchStage) -> list[frozenset[int]] | None:
    """The cores of each worker; None: any."""
    if stage.cores is not None:
        return [frozenset(parse_cores("stage.cores", text)) for text in stage.cores]
    usable: list[int] = []
    if hasattr(os, "sched_getaffinity"):  # Linux
        usable = sorted(os.sched_getaffinity(0))
    each = len(usable) // stage.workers
    if stage.workers == 1 or each == 0:
        return None
    out = []
    for number in range(stage.workers):
        first = number * each
        out.append(frozenset(usable[first : first + each]))
    return out


def _devices(stage: SearchStage) -> list[str] | None:
    """The CUDA devices of each worker, in the words of CUDA_VISIBLE_DEVICES; None: as the
    environment has them. Workers share devices where there are fewer of them.
    """
    if stage.devices is not None:
        return stage.devices
    if stage.workers == 1:
        return None
    found = visible_devices()
    if not found:
        return None
    each = len(found) // stage.workers
    out = []
    for number in range(stage.workers):
        first = number * each
        own = found[first : first + each]
        if each == 0:
            own = [found[number % len(found)]]
        out.append(",".join(own))
    return out
