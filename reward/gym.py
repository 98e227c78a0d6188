"""reasoning-gym's tasks by their own verifiers, in a process of its own (reward/worker.py)."""

import importlib.util
import json
from typing import Any

from conf.schema import RewardTerm
from reward.extract import after_marker
from reward.worker import Worker

KEYS = ("task", "config", "question", "answer", "metadata")


class Gym:
    """What the task's score_answer gives, in [0, 1]; some tasks give parts of a point for partly
    right or well-formed answers.

    The answer is what stands between the last <answer> and </answer> (reasoning-gym's own
    convention), else the whole response without the spaces around it.
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
        if not isinstance(entry, dict) or set(entry) != set(KEYS):
            found = ", ".join(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
            raise ValueError(
                f"expected an object with {', '.join(KEYS)}, as data.recipe=gym writes it, found "
                f"{found}"
            )
        self.worker.check(entry)
        return entry

    def score(self, response: str, reference: Any) -> float:
        said = after_marker(response, "<answer>")
        return self.worker.score(reference, response.strip() if said is None else said)
