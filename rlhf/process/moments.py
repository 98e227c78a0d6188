"""Mean and standard deviation over ranks and over time, in two passes."""

import math
from collections.abc import Callable, Sequence

# rlhf.process.distributed.all_sum: element-wise, the same result on every rank
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
