"""The words of many texts as numbers: what clusters and diversity are counted on, in a few bytes a
word.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.data.prepare.items import Item
from rlhf.data.report.lengths import column_texts
from rlhf.data.report.looked import over
from rlhf.data.report.texts import counted_words


@dataclass(frozen=True, slots=True)
class Numbered:
    """Texts as the numbers of their words: text i is `flat[ends[i - 1] : ends[i]]`."""

    words: list[str]  # [V] different words in the order of the alphabet
    flat: NDArray[np.int32]  # [W] every word's number
    ends: NDArray[np.int64]  # [N]

    def counts(self) -> Any:
        """[N, V] how often each text has each word, sparse float64."""
        from scipy.sparse import csr_array

        # scikit-learn takes 32 bits only: enough for 10 GB of texts, of which this is a sample
        starts = np.append(0, self.ends).astype(np.int32)
        ones = np.ones(len(self.flat))
        codes = self.flat.copy()  # what follows works in place
        table = csr_array((ones, codes, starts), shape=(len(self.ends), len(self.words)))
        table.sum_duplicates()
        return table

    def different(self, texts: Sequence[bool]) -> NDArray[np.bool_]:
        """[V] which words the texts of these [N] have."""
        lengths = np.diff(self.ends, prepend=0)
        chosen = np.repeat(np.asarray(texts, dtype=bool), lengths)
        out = np.zeros(len(self.words), dtype=bool)
        out[self.flat[chosen]] = True
        return out


def number(items: Sequence[Item]) -> Numbered:
    """The lower-case words (`texts.words`) of all texts of each row, shared out among processes."""
    numbers: dict[str, int] = {}
    flat, lengths = [np.empty(0, dtype=np.int32)], [np.empty(0, dtype=np.int64)]
    for own, codes, sizes in over(number_part, items):
        known = [numbers.setdefault(word, len(numbers)) for word in own]
        flat.append(np.array(known, dtype=np.int32)[codes])
        lengths.append(sizes)
    ordered = sorted(numbers)
    place = np.empty(len(ordered), dtype=np.int32)
    place[[numbers[word] for word in ordered]] = np.arange(len(ordered))
    return Numbered(ordered, place[np.concatenate(flat)], np.cumsum(np.concatenate(lengths)))


def number_part(items: list[Item]) -> tuple[list[str], NDArray[np.int32], NDArray[np.int64]]:
    """What a process does: the different words of some rows, every word's number among them, and
    [N] how many words each row has.
    """
    numbers: dict[str, int] = {}
    flat: list[int] = []
    sizes = []
    for item in items:
        before = len(flat)
        for texts in column_texts(item.columns).values():
            for text in texts:
                own = counted_words(text).tokens
                for word in own:
                    numbers.setdefault(word, len(numbers))
                flat += map(numbers.__getitem__, own)
        sizes.append(len(flat) - before)
    return list(numbers), np.array(flat, dtype=np.int32), np.array(sizes, dtype=np.int64)


def distinct(texts: Numbered, n: int) -> float:
    """Different n-grams / all n-grams (Li et al. 2016, arXiv:1510.03055); 0 without any."""
    inside = np.ones(len(texts.flat), dtype=bool)  # n-grams that end in the text where they begin
    for offset in range(1, n):
        inside[texts.ends[texts.ends >= offset] - offset] = False
    starts = np.flatnonzero(inside)
    if not len(starts):
        return 0.0
    grams = texts.flat[starts].astype(np.int64)
    for offset in range(1, n):
        if offset > 1:  # a small number for each, so that the next product fits
            grams = np.unique(grams, return_inverse=True)[1]
        grams = grams * len(texts.words) + texts.flat[starts + offset]
    return len(np.unique(grams)) / len(starts)
