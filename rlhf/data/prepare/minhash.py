"""MinHash signatures of texts over hashed character n-grams: rolling hashes of code points, and the
minima of datasketch's permutations over them (the same numbers as datasketch.MinHash gives).
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

Sides = tuple[str, str]  # rlhf.data.prepare.texts.sides
# added to the code points of what is judged bad: another alphabet, so that it never equals the good
# side
_OTHER = np.uint64(1 << 22)
_FILL = np.uint64(1 << 21)  # follows a text of fewer characters than an n-gram has
BASE = np.uint64(0x9E3779B97F4A7C15)
CHUNK = 1 << 18  # characters hashed at once
_BLOCK = 1 << 16  # n-grams permuted at once: they stay in the processor's cache


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """MurmurHash3's 64-bit finalizer."""
    values = values ^ (values >> np.uint64(33))
    values = values * np.uint64(0xFF51AFD7ED558CCD)
    values = values ^ (values >> np.uint64(33))
    values = values * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


def _mix32(values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """MurmurHash3's 32-bit finalizer: what datasketch puts before its permutations."""
    values = values ^ (values >> np.uint32(16))
    values = values * np.uint32(0x85EBCA6B)
    values = values ^ (values >> np.uint32(13))
    values = values * np.uint32(0xC2B2AE35)
    return values ^ (values >> np.uint32(16))


def _codes(texts: Sequence[Sides], ngram: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Code points of the texts' two sides one after the other, of every text at least `ngram`, and
    [N] how many each text has.
    """
    pieces, sizes = [], []
    for good, bad in texts:
        lacking = max(0, ngram - len(good) - len(bad))
        pieces += [good, bad, lacking * "\0"]
        sizes += [len(good), len(bad), lacking]
    encoded = "".join(pieces).encode("utf-32-le", "surrogatepass")
    codes = np.frombuffer(encoded, dtype="<u4").astype(np.uint64)
    added = np.array([0, _OTHER, _FILL], dtype=np.uint64)
    codes += np.repeat(np.tile(added, len(texts)), sizes)
    return codes, np.array(sizes, dtype=np.int64).reshape(-1, 3).sum(axis=1)


def ngram_hashes(
    texts: Sequence[Sides], ngram: int
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """64-bit hashes of every text's n-grams one after the other, and where each text's begin; every
    text has at least one.
    """
    whole, lengths = _codes(texts, ngram)
    windows = len(whole) - ngram + 1
    hashes = np.zeros(windows, dtype=np.uint64)
    for offset in range(ngram):
        hashes = hashes * BASE + whole[offset : offset + windows]
    inside = np.ones(len(whole), dtype=bool)  # windows that begin and end in one text
    ends = np.cumsum(lengths)
    for offset in range(1, ngram):
        inside[ends - offset] = False
    starts = np.concatenate([[0], np.cumsum(lengths - ngram + 1)[:-1]]).astype(np.int64)
    return mix64(hashes[inside[:windows]]), starts


@cache
def permutations(count: int, seed: int) -> NDArray[np.uint32]:
    """[2, count] odd factors and summands of permutations h -> a h + b modulo 2^32: the numbers
    that datasketch draws, which takes longer to import than thousands of texts to compare.
    """
    draws = np.random.RandomState(seed)
    halves = draws.randint(0, 1 << 31, count, dtype=np.uint32)
    summands = draws.randint(0, 1 << 32, count, dtype=np.uint32)
    return np.stack([2 * halves + 1, summands])


def minima(
    hashes: NDArray[np.uint64], starts: NDArray[np.int64], permutation: NDArray[np.uint32]
) -> NDArray[np.uint32]:
    """[N, P] MinHash signatures: the smallest permuted value of each text's n-grams, from the upper
    half of their hashes.
    """
    mixed = _mix32((hashes >> np.uint64(32)).astype(np.uint32))
    out = np.empty((len(starts), permutation.shape[1]), dtype=np.uint32)
    factors, summands = permutation
    ends = np.append(starts[1:], len(mixed))
    first = 0
    while first < len(starts):  # whole texts, about _BLOCK n-grams at a time
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + _BLOCK, side="right")))
        block = mixed[starts[first] : ends[last - 1]]
        offsets = starts[first:last] - starts[first]
        values = np.empty_like(block)
        for p in range(permutation.shape[1]):
            np.multiply(block, factors[p], out=values)
            values += summands[p]
            out[first:last, p] = np.minimum.reduceat(values, offsets)
        first = last
    return out


def chunks(texts: Iterable[Sides], size: int | None = None) -> Iterator[list[Sides]]:
    """Neighbouring texts of about `size` characters (None: CHUNK) together."""
    size = CHUNK if size is None else size
    part: list[Sides] = []
    held = 0
    for text in texts:
        part.append(text)
        held += len(text[0]) + len(text[1])
        if held >= size:
            yield part
            part, held = [], 0
    if part:
        yield part


def signatures(texts: Sequence[Sides], ngram: int, count: int, seed: int) -> NDArray[np.uint32]:
    """[N, count] MinHash signatures."""
    permutation = permutations(count, seed)
    parts = [minima(*ngram_hashes(part, ngram), permutation) for part in chunks(texts)]
    if parts:
        return np.concatenate(parts)
    return np.empty((0, count), dtype=np.uint32)
