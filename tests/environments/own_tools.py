"""Functions that tests give as tools."""

import functools
import json
from typing import Literal


def stock(item: Literal["apple", "pear"], places: list[int] | None = None) -> str:
    """
    How much of something there is.

    Args:
        item: What is asked for.
        places: Where to look.
    """
    return json.dumps({item: 7, "places": places})


def untyped(item):  # type: ignore[no-untyped-def]
    """
    Nothing.

    Args:
        item: Whatever.
    """


def undocumented(item: str) -> str:
    """Nothing."""
    return item


def variadic(*numbers: int) -> int:
    """
    Add.

    Args:
        numbers: To be added.
    """
    return sum(numbers)


def _inner(item: str) -> str:
    """
    Nothing.

    Args:
        item: Whatever.
    """
    return item


nested = functools.cache(_inner)
