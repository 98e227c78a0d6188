"""A table that nobody can know by heart: environment.tools=[rlhf.environments.tables:table].

The sandbox executes this file: it needs the standard library alone.
"""

import hashlib

DIGITS = 3  # of a key and of a value


def table(key: str) -> str:
    """
    Look a number up in the table.

    Args:
        key: The number whose value is asked for.
    """
    if not key.isdecimal() or len(key) != DIGITS:
        raise ValueError(f"a key has {DIGITS} digits")
    return value(key)


def value(key: str, name: str = "") -> str:
    """The value of a key in the table `name`: digits that depend on nothing but these two."""
    drawn = int.from_bytes(hashlib.sha256(f"{name}:{key}".encode()).digest()[:8], "big")
    return f"{drawn % 10**DIGITS:0{DIGITS}d}"
