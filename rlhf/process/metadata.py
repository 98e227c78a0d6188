"""reasoning-gym's metadata as JSON and back.

Tuples, sets, fractions and keys that are no texts survive; plain JSON would change them.
"""

from fractions import Fraction
from typing import Any

_MARK = "__kind__"


def encode(value: Any) -> Any:
    """What json can hold. Raises TypeError naming a value of another type."""
    if isinstance(value, tuple):
        return {_MARK: "tuple", "items": [encode(item) for item in value]}
    if isinstance(value, (set, frozenset)):
        return {_MARK: "set", "items": sorted((encode(item) for item in value), key=repr)}
    if isinstance(value, Fraction):
        return {_MARK: "fraction", "items": [value.numerator, value.denominator]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value) and _MARK not in value:
            return {key: encode(item) for key, item in value.items()}
        return {
            _MARK: "dict",
            "items": [[encode(key), encode(item)] for key, item in value.items()],
        }
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if hasattr(value, "tolist"):  # numpy
        return encode(value.tolist())
    raise TypeError(f"expected values that JSON can hold, found {type(value).__name__} {value!r}")


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_MARK)
    if kind is None:
        return {key: decode(item) for key, item in value.items()}
    items = [decode(item) for item in value["items"]]
    if kind == "dict":
        return {key: item for key, item in items}  # noqa: C416 - pairs that were lists
    if kind == "fraction":
        return Fraction(*items)
    return tuple(items) if kind == "tuple" else set(items)
