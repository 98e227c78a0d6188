"""A function that the sandbox can't load."""

import numpy as np


def size(numbers: list[int]) -> int:
    """
    Count.

    Args:
        numbers: To be counted.
    """
    return int(np.size(numbers))
