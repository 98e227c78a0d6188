"""What every schema needs: the marker of a mandatory value, and the error of a value out of range.
Standard library only.
"""

from typing import Any

MISSING: Any = "???"  # OmegaConf's marker of a mandatory value


def check(condition: bool, key: str, value: object, expected: str) -> None:
    """Raise ``ValueError`` naming the option, what was expected and what was found."""
    if not condition:
        raise ValueError(f"{key}={value!r} is out of range: expected {expected}.")
