"""What the ranks of a run do together, and their mean and standard deviation; it also works in one
process without torch.distributed.

torch is imported where it is used: the command line's list of stages and its help need none.
"""

import contextlib
import datetime
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rlhf.types import UserError

if TYPE_CHECKING:
    import torch


def _process_group() -> Any:
    """torch.distributed once this process has joined a group, else None. Without torch, nothing can
    have joined one.
    """
    dist = sys.modules.get("torch.distributed")
    # The attribute is missing while another thread imports torch.
    is_initialized = getattr(dist, "is_initialized", None)
    return dist if is_initialized is not None and is_initialized() else None


def rank() -> int:
    """Global rank: the process group's, or the launcher's RANK before it exists."""
    dist = _process_group()
    return int(os.environ.get("RANK", "0")) if dist is None else dist.get_rank()


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    dist = _process_group()
    return int(os.environ.get("WORLD_SIZE", "1")) if dist is None else dist.get_world_size()


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    return rank() == 0


def device() -> "torch.device":
    """This rank's accelerator, or the CPU."""
    import torch

    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def name_accelerator() -> None:
    """Tell DeepSpeed, which accelerate imports, where there is no GPU: it would warn that it has to
    guess.
    """
    if device().type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


# what to do about engine=torch on several ranks
SEVERAL_PROCESSES = "Use engine=zero0, zero1, zero2 or zero3."


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
    if world_size() == 1 or _process_group() is not None:
        return
    import torch

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(local_rank())
    torch.distributed.init_process_group(
        backend, timeout=datetime.timedelta(minutes=timeout_minutes)
    )


def shutdown() -> None:
    dist = _process_group()
    if dist is not None:
        dist.destroy_process_group()


def barrier() -> None:
    dist = _process_group()
    if dist is not None:
        dist.barrier()


def all_sum(values: Sequence[float]) -> list[float]:
    """Element-wise float64 sum over ranks."""
    return _reduce(values, "SUM")


def all_max(values: Sequence[float]) -> list[float]:
    """Element-wise float64 maximum over ranks."""
    return _reduce(values, "MAX")


def _reduce(values: Sequence[float], operation: Literal["SUM", "MAX"]) -> list[float]:
    dist = _process_group()
    if dist is None:
        return [float(v) for v in values]
    import torch

    tensor = torch.tensor(list(values), dtype=torch.float64, device=device())
    dist.all_reduce(tensor, op=getattr(dist.ReduceOp, operation))
    return [float(v) for v in tensor.tolist()]


def sum_tensor(tensor: "torch.Tensor") -> "torch.Tensor":
    """The sum over ranks of a tensor that is as large on each of them, in its own dtype."""
    dist = _process_group()
    if dist is None:
        return tensor
    whole = tensor.contiguous().clone()
    dist.all_reduce(whole)
    return whole


def gather(value: Any) -> list[Any]:
    """One picklable value per rank, in rank order, on every rank."""
    dist = _process_group()
    if dist is None:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """Rank 0's picklable value, on every rank."""
    dist = _process_group()
    if dist is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


# ---- work that one rank of each node does for all ----

_BEAT_S = 5.0  # between two signs of life of a rank that works
_WORKING, _DONE = "working", "done"


class _FailedElsewhere(UserError):
    """The message of another rank's failure."""


class _Rounds:
    """Exchanges in which every rank says what it does. All ranks take part in each."""

    def __init__(self, alive: Callable[[], None]) -> None:
        self._alive, self._last = alive, time.monotonic()

    def beat(self) -> None:
        """A sign of life of a rank that works; cheap, and most calls do nothing."""
        if time.monotonic() - self._last >= _BEAT_S:
            self.exchange(_WORKING)

    def exchange(self, state: str, message: str = "") -> bool:
        """Whether all ranks are done. Raises UserError where one has failed."""
        states = gather((state, message))
        self._last = time.monotonic()
        self._alive()
        for other, failure in states:
            if other not in (_WORKING, _DONE):
                raise _FailedElsewhere(failure)
        return all(other == _DONE for other, _ in states)


def once_per_node(work: Callable[[Callable[[], None]], None], alive: Callable[[], None]) -> None:
    """Run `work` on the first rank of each node, while the other ranks wait. A collective.

    work: is given a function to call now and then, a sign of life. alive: called on every rank at
    each such sign. Where `work` fails on one rank, all ranks raise: that one its own error, the
    others UserError with its message.
    """
    if _process_group() is None:
        work(lambda: None)
        return
    rounds = _Rounds(alive)
    try:
        if local_rank() == 0:
            work(rounds.beat)
    except _FailedElsewhere:
        raise
    except Exception as error:
        message = str(error)
        if not isinstance(error, UserError):
            message = f"rank {rank()} failed: {type(error).__name__}: {error}"
        with contextlib.suppress(_FailedElsewhere):
            rounds.exchange("failed", message)
        raise
    while not rounds.exchange(_DONE):
        pass


def cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_threads(threads: int | None = None) -> None:
    """torch's threads of this rank: `threads`, or the machine's cores shared out among its
    ranks.
    """
    import torch

    torch.set_num_threads(threads or max(1, cores() // local_world_size()))


# `all_sum`: element-wise, the same result on every rank
SumOverRanks = Callable[[Sequence[float]], list[float]]


def moments(
    count: float,
    total: float,
    squares_about: Callable[[float], float],
    sum_over_ranks: SumOverRanks | None,
) -> tuple[int, float, float]:
    """Count, mean and sum of squared deviations from that mean, over all ranks.

    Two passes, each summed over ranks. Raises ValueError on every rank alike.
    """
    reduce = sum_over_ranks or list
    all_count, all_total = reduce([count, total])
    if all_count == 0:
        raise ValueError("no values to take moments of: the mask is empty on every rank")
    mean = all_total / all_count
    if not math.isfinite(mean):
        raise ValueError(f"expected finite values, found a mean of {mean}")
    (m2,) = reduce([squares_about(mean)])
    return round(all_count), mean, m2


def sample_std(m2: float, count: int) -> float:
    """From the sum of squared deviations; 0 for a single value."""
    return math.sqrt(m2 / (count - 1)) if count > 1 else 0.0


class RunningMoments:
    """Mean and sample standard deviation of everything seen, merged batch by batch (Chan, Golub &
    LeVeque 1983, equation 2.1b).
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._m2 = 0.0  # sum of squared deviations from the mean

    @property
    def std(self) -> float:
        """Divides by count - 1; 0 before the second value."""
        return sample_std(self._m2, self.count)

    def update(self, values: Sequence[float], sum_over_ranks: SumOverRanks | None = None) -> None:
        """Add this rank's values, or with `sum_over_ranks` (a collective) those of all ranks.

        The state is then the same on every rank. Raises ValueError, on every rank, where no rank
        has a value or a value is not finite; the state is then unchanged.
        """
        count, mean, m2 = moments(
            len(values),
            math.fsum(values),
            lambda about: math.fsum((value - about) ** 2 for value in values),
            sum_over_ranks,
        )
        total = self.count + count
        delta = mean - self.mean
        self._m2 += m2 + delta * delta * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "m2": self._m2}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count = int(state["count"])
        self.mean = float(state["mean"])
        self._m2 = float(state["m2"])
