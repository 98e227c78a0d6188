"""Parts of error messages: what a value is, and the known word nearest to a misspelt word."""

import difflib
from collections.abc import Sequence
from typing import Any

_KINDS = {
    str: "text",
    bool: "true/false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
_LONGEST = 60  # characters of a value that a message shows


def describe(value: Any) -> str:
    """A value's kind and its beginning: "text 'abc'", "a list of 3", "null"."""
    kind = _KINDS.get(type(value), type(value).__name__)
    if value is None:
        return kind
    if isinstance(value, (list, dict)):
        return f"{kind} of {len(value)}"
    shown = repr(value)
    if len(shown) > _LONGEST:
        shown = shown[: _LONGEST - 3] + "..."
    return f"{kind} {shown}"


def nearest(word: str, known: Sequence[str], cutoff: float = 0.6) -> str | None:
    """The known word most like `word` (case is ignored), or None when none is close: of a
    likeness of at least `cutoff`, where 1 is the same word.
    """
    close = difflib.get_close_matches(word.lower(), [k.lower() for k in known], n=1, cutoff=cutoff)
    if not close:
        return None
    return next((k for k in known if k.lower() == close[0]), None)


def nearest_hint(word: str, known: Sequence[str], before: str, after: str = "") -> str:
    """`before`, the known word most like `word`, and `after`; nothing when none is close."""
    near = nearest(word, known)
    return "" if near is None else f"{before}{near}{after}"
