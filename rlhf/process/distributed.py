"""Process group helpers that also work in one process without torch.distributed."""

import datetime
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from rlhf.types import UserError


def rank() -> int:
    """Global rank: the process group's, or the launcher's RANK before it exists."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return (
        dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    )


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    """This rank's accelerator, or the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def require_one_process(what: str, remedy: str, asked_ranks: int | None = None) -> None:
    """Raise UserError where `what`, such as ``engine=torch``, would run on several ranks: on
    `asked_ranks` (engine.gpus of a dry run), or on those that were launched.
    """
    ranks = world_size() if asked_ranks is None else asked_ranks
    if ranks == 1:
        return
    cause = f"{ranks} ranks were launched"
    if asked_ranks is not None:
        cause = f"engine.gpus={asked_ranks}"
    raise UserError(f"{what} runs in one process, but {cause}. {remedy}")


def initialise(timeout_minutes: float = 30.0) -> None:
    """Join the process group when a launcher (torchrun) started several ranks; otherwise do
    nothing.
    """
    if world_size() == 1 or dist.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(local_rank())
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=timeout_minutes))


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_sum(values: Sequence[float]) -> list[float]:
    """Element-wise float64 sum over ranks."""
    return _reduce(values, dist.ReduceOp.SUM)


def all_max(values: Sequence[float]) -> list[float]:
    """Element-wise float64 maximum over ranks."""
    return _reduce(values, dist.ReduceOp.MAX)


def _reduce(values: Sequence[float], op: Any) -> list[float]:
    if not dist.is_initialized():
        return [float(v) for v in values]
    tensor = torch.tensor(list(values), dtype=torch.float64, device=device())
    dist.all_reduce(tensor, op=op)
    return [float(v) for v in tensor.tolist()]


def gather(value: Any) -> list[Any]:
    """One picklable value per rank, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, value)
    return out


def broadcast(value: Any) -> Any:
    """Rank 0's picklable value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def set_threads(threads: int | None = None) -> None:
    """torch's threads of this rank: `threads`, or the machine's cores shared out among its
    ranks.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    torch.set_num_threads(threads or max(1, cores // local_world_size()))
