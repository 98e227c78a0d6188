"""The dotted names of all options, read off the dataclasses.

The items of a dictionary of dataclasses stand as ``reward.terms.<name>.weight``; below a dictionary
of anything, every key is valid: ``data.gym.options.<anything>``.
"""

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from conf.schema import Config
from conf.stages import STAGES

NAME = "<name>"  # stands for the name of a dictionary's item
ANYTHING = "<anything>"  # below it every key is valid


def valid_keys(stages: Sequence[str]) -> list[str]:
    """Every dotted option of the configuration with any of the given stages (names of `STAGES`)."""
    keys = [key for key in _walk(Config, "") if key != "stage"]
    for stage in stages:
        keys.extend(_walk(STAGES[stage], "stage."))
    return list(dict.fromkeys(keys))


def _walk(cls: type, prefix: str) -> Iterator[str]:
    for field in dataclasses.fields(cls):
        key = f"{prefix}{field.name}"
        yield key
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from _walk(field.type, f"{key}.")
        if typing.get_origin(field.type) is dict:
            yield from _walk_items(typing.get_args(field.type)[1], key)


def _walk_items(item: Any, key: str) -> Iterator[str]:
    """The keys inside a dictionary whose values are of the type `item`."""
    if item is Any:
        yield f"{key}.{ANYTHING}"
        return
    yield f"{key}.{NAME}"
    yield from _walk(item, f"{key}.{NAME}.")


def general(key: str, keys: Sequence[str]) -> tuple[str, str]:
    """`key` with ``<name>`` for the name of a dictionary's item, and that name: from
    reward.terms.brevity.kind to reward.terms.<name>.kind and brevity. An empty name without one.
    """
    key = _anything(key, keys)
    if key.endswith(ANYTHING):
        return key, ""
    for parent in parents(keys, NAME):
        if key.startswith(f"{parent}."):
            name, dot, rest = key.removeprefix(f"{parent}.").partition(".")
            return _anything(f"{parent}.{NAME}{dot}{rest}", keys), name
    return key, ""


def _anything(key: str, keys: Sequence[str]) -> str:
    for parent in parents(keys, ANYTHING):
        if key.startswith(f"{parent}."):
            return f"{parent}.{ANYTHING}"
    return key


def parents(keys: Sequence[str], marker: str) -> list[str]:
    """The options whose keys in the list end in `marker`: the dictionaries of that kind."""
    return [key.removesuffix(f".{marker}") for key in keys if key.endswith(f".{marker}")]
