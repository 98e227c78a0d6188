"""Preferences that a function can check, with TRL's reward signature."""

from typing import Any

from rlhf.data.smollm2 import PREFERRED


def decided(completions: list[Any], **_: Any) -> list[float]:
    """1 for a completion that starts with the preferred tone of the smollm2 recipe, else 0. Completions are strings or lists of messages."""
    texts = [c if isinstance(c, str) else str(c[-1]["content"]) for c in completions]
    return [float(text.lstrip().startswith(PREFERRED)) for text in texts]
