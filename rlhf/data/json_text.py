"""JSON texts whose objects name each key once. json.loads takes the last of two equal keys and says
nothing of the first.

Reading calls the function below for every object. On rows of a few hundred words it takes 0.1 to
0.8 us of the 30 to 65 us that a row costs until it is a pair; on conversations of ten turns of
eight words 5 of 95 us.
"""

import json
from typing import Any


class Repeated(dict[str, Any]):
    """An object that has `key` more than once; of its values it holds the last."""

    key: str


def decoder(found: list[Repeated]) -> json.JSONDecoder:
    """A decoder that puts every object with a repeated key into `found`, and leaves it where it
    stands in the value.
    """

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) == len(pairs):
            return out
        repeated = Repeated(pairs)
        repeated.key = _second(pairs)
        found.append(repeated)
        return repeated

    return json.JSONDecoder(object_pairs_hook=made)


def repeated_key(value: Any) -> str | None:
    """The first repeated key in `value` by its path, as what is wrong with it; None without any."""
    waiting = [("", value)]
    while waiting:
        where, held = waiting.pop()
        if isinstance(held, Repeated):
            path = f"{where}.{held.key}".removeprefix(".")
            return f"key {path!r}: it stands twice in one object, expected each key once"
        inner: list[tuple[str, Any]] = []
        if isinstance(held, dict):
            inner = [(f"{where}.{key}".removeprefix("."), part) for key, part in held.items()]
        elif isinstance(held, list):
            inner = [(f"{where}[{i}]", part) for i, part in enumerate(held)]
        waiting += reversed(inner)
    return None


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object_pairs_hook of json.loads. Raises ValueError for a repeated key."""
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError(f"key {_second(pairs)!r} stands twice in one object")
    return out


def _second(pairs: list[tuple[str, Any]]) -> str:
    """The first key that stands there more than once."""
    names = [name for name, _ in pairs]
    return next(name for name in names if names.count(name) > 1)
