"""What a plan is for: how many ranks, each with how much memory."""

from dataclasses import dataclass

from conf.choices import Dtype
from conf.schema import Config
from rlhf.checks.memory import GIB
from rlhf.process import distributed

ASSUMED_GIB = 80.0  # a device of an A100 or H100


@dataclass(frozen=True, slots=True)
class Machine:
    """`device_gib`: of one rank's device; without a GPU its share of the host's memory."""

    ranks: int
    cuda: bool
    device_gib: float
    # of the host that holds all ranks; None: not known, since the devices are not here
    host_gib: float | None
    notes: tuple[str, ...] = ()  # what was assumed

    def half(self, dtype: Dtype) -> bool:
        """Whether weights are in half precision: ``auto`` is bfloat16 on a GPU
        (rlhf.models.loading.resolve_dtype).
        """
        return self.cuda if dtype is Dtype.auto else dtype is not Dtype.float32


def machine_of(cfg: Config, *, all_devices: bool) -> Machine:
    """The devices that the configuration asks for, else those that are here (`all_devices`: one
    rank on each, not just those launched).
    """
    import psutil
    import torch

    engine, launched = cfg.engine, distributed.world_size()
    memory = psutil.virtual_memory().total / GIB
    if torch.cuda.is_available():
        here = torch.cuda.device_count()
        own = min(torch.cuda.get_device_properties(i).total_memory for i in range(here)) / GIB
        ranks = engine.gpus or (max(launched, here) if all_devices else launched)
        return Machine(ranks, True, engine.gpu_memory_gib or own, memory if ranks <= here else None)
    asked = (
        engine.gpus is not None or engine.gpu_memory_gib is not None or cfg.model.params is not None
    )
    if not asked:
        return Machine(launched, False, memory / launched, memory)
    notes = []
    if engine.gpu_memory_gib is None:
        notes.append(
            f"no GPU here: devices of {ASSUMED_GIB:.0f} GiB are assumed; "
            "engine.gpu_memory_gib=<GiB> says otherwise"
        )
    if engine.gpus is None:
        notes.append(
            f"{launched} device{'s' if launched > 1 else ''}, one for each rank launched; "
            "engine.gpus=<number> says otherwise"
        )
    return Machine(
        engine.gpus or launched, True, engine.gpu_memory_gib or ASSUMED_GIB, None, tuple(notes)
    )
