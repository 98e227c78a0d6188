"""Preferences and answers that a function can check, with TRL's reward signature."""

from typing import Any

from rlhf.data.recipes.smollm2 import PREFERRED


def decided(completions: list[Any], **_: Any) -> list[float]:
    """1 for a completion that starts with the preferred tone of the smollm2 recipe, else 0.
    Completions are strings or lists of messages.
    """
    return [float(_text(c).lstrip().startswith(PREFERRED)) for c in completions]


def final_answer(completions: list[Any], answer: list[Any], **_: Any) -> list[float]:
    """1 for a completion whose last word is its row's `answer`; else 0. Raises ValueError for a row
    without one.
    """
    if any(expected is None for expected in answer):
        raise ValueError("expected a column `answer` in every row, found a row without one")
    return [
        float(_text(c).split()[-1:] == [str(expected).strip()])
        for c, expected in zip(completions, answer, strict=True)
    ]


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
