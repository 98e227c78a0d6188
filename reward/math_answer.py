r"""Mathematical answers by math-verify, in a process of its own (reward/worker.py)."""

import importlib.util
from typing import Any

from conf.schema import RewardTerm
from reward.worker import Worker


class MathAnswer:
    r"""1 where the response's answer equals the row's as an expression: \frac{1}{2}, 0.5 and 1/2
    are the same.

    As in TRL's accuracy_reward the answer has to be LaTeX between delimiters, \boxed{} before
    others. An answer that takes more than 3 s of CPU or the memory of the process to evaluate is
    wrong.
    """

    workers = 1

    def __init__(self, term: RewardTerm) -> None:
        """Raises ValueError when math-verify is not installed."""
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError(
                "needs the package math-verify, which is not installed: pip install "
                "math-verify==0.9.0"
            )
        self.columns: tuple[str, ...] = (term.column or "answer",)
        self.worker = Worker("math")

    def reference(self, *values: Any) -> Any:
        if (
            isinstance(values[0], bool)
            or not isinstance(values[0], (str, int, float))
            or not str(values[0]).strip()
        ):
            raise ValueError(f"expected a mathematical expression or a number, found {values[0]!r}")
        self.worker.check(values[0])
        return values[0]

    def score(self, response: str, reference: Any) -> float:
        return self.worker.score(reference, response)
