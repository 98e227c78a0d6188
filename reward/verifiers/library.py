"""Verifiers whose libraries evaluate the response: math-verify and reasoning-gym, each in a process
of its own (reward/verifiers/worker.py).
"""

import importlib.util
import json
from typing import Any

from conf.schema import RewardTerm
from reward.verifiers.extract import after_marker
from reward.verifiers.worker import Worker

_GYM_KEYS = ("task", "config", "question", "answer", "metadata")


class MathAnswer:
    r"""1 where the response's answer equals the row's as an expression, else 0: \frac{1}{2}, 0.5
    and 1/2 are equal.

    As in TRL's accuracy_reward the answer has to be LaTeX between delimiters; \boxed{} takes
    precedence over others. An answer is wrong when evaluating it takes more than 3 s of CPU or more
    memory than the process may use.
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
        answer = values[0]
        usable = isinstance(answer, (str, int, float)) and not isinstance(answer, bool)
        if not usable or not str(answer).strip():
            raise ValueError(f"expected a mathematical expression or a number, found {answer!r}")
        self.worker.check(answer)
        return answer

    def score(self, response: str, reference: Any) -> float:
        return self.worker.score(reference, response)


class Gym:
    """The score of the task's own score_answer, in [0, 1]; some tasks give partial credit for
    partly right or well-formed answers.

    The answer is the text between the last <answer> and </answer> (reasoning-gym's convention),
    else the whole response without surrounding spaces.
    """

    workers = 1

    def __init__(self, term: RewardTerm) -> None:
        """Raises ValueError when reasoning-gym is not installed."""
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ValueError(
                "needs the package reasoning-gym, which is not installed: pip install "
                "reasoning-gym==0.1.25"
            )
        self.columns: tuple[str, ...] = (term.column or "metadata",)
        self.worker = Worker("gym")

    def reference(self, *values: Any) -> Any:
        entry = json.loads(values[0]) if isinstance(values[0], str) else values[0]
        if not isinstance(entry, dict) or set(entry) != set(_GYM_KEYS):
            actual = type(entry).__name__
            if isinstance(entry, dict):
                actual = ", ".join(map(str, entry))
            raise ValueError(
                f"expected an object with {', '.join(_GYM_KEYS)}, as data.recipe=gym writes it, "
                f"found {actual}"
            )
        self.worker.check(entry)
        return entry

    def score(self, response: str, reference: Any) -> float:
        answer = after_marker(response, "<answer>")
        if answer is None:
            answer = response.strip()
        return self.worker.score(reference, answer)
