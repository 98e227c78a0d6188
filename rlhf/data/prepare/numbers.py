"""The numbers in texts: texts that differ in nothing else are different problems, not copies."""

import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.data.prepare.minhash import Sides

_NUMBER = re.compile(r"\d+")
# side (0 or 1), digits, and which occurrence of them on that side
Number = tuple[int, str, int]


def numbers_of(text: Sides) -> Iterator[Number]:
    """Every number of a text's two sides; one that comes twice is two."""
    for side, said in enumerate(text):
        often: Counter[str] = Counter()
        for digits in _NUMBER.findall(said):
            often[digits] += 1
            yield side, digits, often[digits]


class Numbers:
    """The numbers of some texts [R], for comparisons of many pairs at once."""

    def __init__(self) -> None:
        self._known: dict[Number, int] = {}
        self._found = array("q")
        self._starts = array("q", [0])
        self._matrix: Any = None
        self._sizes: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def add(self, texts: Sequence[Sides]) -> None:
        """The next texts."""
        for text in texts:
            for number in numbers_of(text):
                self._found.append(self._known.setdefault(number, len(self._known)))
            self._starts.append(len(self._found))

    def close(self) -> None:
        """All texts are there."""
        from scipy.sparse import csr_array

        starts = np.array(self._starts)
        columns = np.array(self._found)
        ones = np.ones(len(columns), dtype=np.int32)
        shape = len(starts) - 1, max(1, len(self._known))
        self._matrix = csr_array((ones, columns, starts), shape=shape)
        self._matrix.sort_indices()
        self._sizes = np.diff(starts)

    def differ(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[P] whether each of the two texts has a number that the other lacks. A number left out,
        or one more, makes no other text: a word of a copy may be missing.
        """
        common = self._matrix[left].multiply(self._matrix[right]).sum(axis=1)
        return (common < self._sizes[left]) & (common < self._sizes[right])

    def alike(self, texts: NDArray[np.int64]) -> list[NDArray[np.intp]]:
        """The texts [M] in groups of two or more with the same numbers, as places among the [M]."""
        groups: dict[bytes, list[int]] = {}
        for place, text in enumerate(texts):
            own = slice(self._matrix.indptr[text], self._matrix.indptr[text + 1])
            groups.setdefault(self._matrix.indices[own].tobytes(), []).append(place)
        return [np.array(places) for places in groups.values() if len(places) > 1]
