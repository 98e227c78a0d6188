"""Overrides as text: from an option and its value to what Hydra reads back as that value."""

import math
import re
from typing import Any

from rlhf.types import UserError

# What Hydra reads as it stands, and as a text.
_PLAIN = re.compile(r"[A-Za-z_/][\w./-]*", re.ASCII)
_PLAIN_KEY = re.compile(r"[A-Za-z_][\w-]*", re.ASCII)
WORDS = ("true", "false", "null", "inf", "nan")  # Hydra reads other types, in any case
_ESCAPED = re.compile(r"([\\()\[\]{}:=, \t])")


def override(key: str, value: Any) -> str:
    """``key=value`` in Hydra's grammar, not yet quoted for a shell. value: None, a truth value, a
    number, a text, or lists and dictionaries of them. Raises UserError for a value that the grammar
    can't hold.
    """
    written = f"{key}={in_grammar(value)}"
    if not _reads_as(written, value):
        raise UserError(f"{key}: a command line can't hold this value: {value!r}.")
    return written


def in_grammar(value: Any) -> str:
    """A value in Hydra's grammar, its texts in quotes where they need them."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        items = [f"{_key(key)}: {in_grammar(inner)}" for key, inner in value.items()]
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(in_grammar, value)) + "]"
    if isinstance(value, str):
        return _text(value)
    return repr(value)


def _text(text: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    if _PLAIN.fullmatch(text) and text.lower() not in WORDS:
        return text
    return QuotedString(text, Quote.double).with_quotes()


def _key(name: str) -> str:
    """A dictionary's key: Hydra takes no quotes there."""
    if _PLAIN_KEY.fullmatch(name):
        return name
    return _ESCAPED.sub(r"\\\1", name)


def _reads_as(written: str, value: Any) -> bool:
    """Whether Hydra reads it as one value, and as this one."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if "${" in written:  # would be read as a reference to another option
        return False
    try:
        override = OverridesParser.create().parse_override(written)
    except HydraException:
        return False
    return not override.is_sweep_override() and same(override.value(), value)


def same(left: Any, right: Any) -> bool:
    """Whether two values are equal and of equal types, inside lists and dictionaries too."""
    if isinstance(left, dict) and isinstance(right, dict):
        if list(left) != list(right):
            return False
        return all(same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=0.0, abs_tol=0.0)
    return type(left) is type(right) and bool(left == right)


def reading(text: str) -> tuple[str, Any]:
    """The option and the value of an override that Hydra can read; without the ``+`` before it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_override(text)
    return override.key_or_group, override.value()
