"""Losses and gradient norms that are far above those of the last updates, by the rule that the
configuration sets.
"""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from conf.stages import TrainStage
from policy.engines.base import NonFinite


class Brake:
    """Refuses a figure above a multiple of the median size of its last values; the refused ones are
    not among them.

    All ranks feed it the same figures, so all refuse alike. There is no limit until a figure has
    been seen `window` times.
    """

    def __init__(self, loss: float | None, grad_norm: float | None, window: int) -> None:
        """loss, grad_norm: the multiples, None: no limit. window: updates that the median is taken
        over.
        """
        self.factors = {"loss": loss, "grad_norm": grad_norm}
        self.window = window
        self._last: dict[str, list[float]] = {}

    @staticmethod
    def from_stage(stage: TrainStage) -> "Brake":
        return Brake(stage.spike_loss, stage.spike_grad_norm, stage.spike_window)

    def check(self, kind: str, figures: Mapping[str, float]) -> None:
        """`kind` is loss or grad_norm. Raises NonFinite for the first figure that is no finite
        number, or above its limit; else keeps all of them.
        """
        factor = self.factors[kind]
        for name, value in figures.items():
            if not math.isfinite(value):
                raise NonFinite(f"{name} is {value}")
            last = self._last.get(name, [])
            if factor is None or len(last) < self.window:
                continue
            median = statistics.median(last)
            if abs(value) > factor * median:
                raise NonFinite(
                    f"{name} is {value:.4g}, above stage.spike_{kind}={factor:g} times "
                    f"{median:.4g}, the median of the last {self.window} updates"
                )
        if factor is not None:
            for name, value in figures.items():
                self._last[name] = [*self._last.get(name, []), abs(value)][-self.window :]

    def state_dict(self) -> dict[str, list[float]]:
        return {name: list(values) for name, values in self._last.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._last = {name: [float(v) for v in values] for name, values in state.items()}
