"""Step near_duplicates: MinHash with banding over character n-grams, every candidate pair checked
exactly.

Texts are compared as sets of hashed n-grams of their normalised form. All of it runs over whole
arrays: n-grams are rolling hashes of code points, signatures the minima of datasketch's
permutations over them (the same numbers as datasketch.MinHash gives), buckets neighbours in sorted
band keys (those of datasketch.MinHashLSH, without its dictionaries of sets).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conf.preparation.duplicates import NearDuplicates
from rlhf.data.prepare.clusters import components, keep_one
from rlhf.data.prepare.items import Context, Item
from rlhf.data.prepare.texts import normalised, sides
from rlhf.process.libraries import require

Sides = tuple[str, str]  # rlhf.data.prepare.texts.sides
# added to the code points of what is judged bad: another alphabet, so that it never equals the good
# side
_OTHER = np.uint64(1 << 22)
_FILL = np.uint64(1 << 21)  # follows a text of fewer characters than an n-gram has
_BASE = np.uint64(0x9E3779B97F4A7C15)
_CHUNK = 1 << 18  # characters hashed at once
_BLOCK = 1 << 14  # n-grams permuted at once: they stay in the processor's cache
# share of the pairs at the threshold that the bands may leave out; of more similar ones they leave
# out fewer
_MISSED = 0.005
_MOST_PAIRS = 1 << 21  # candidate pairs held before they are checked
_PAIRS_AT_ONCE = 1 << 15
_SMALL_BUCKET = 32  # rows up to which all pairs of a bucket are candidates at once


def _mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
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


def _codes(text: Sides, ngram: int) -> NDArray[np.uint64]:
    """Code points of a text's two sides, at least `ngram` of them."""
    good, bad = (
        np.frombuffer(side.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
        for side in text
    )
    lacking = ngram - len(good) - len(bad)
    return np.concatenate([good, bad + _OTHER, np.full(max(0, lacking), _FILL)])


def ngram_hashes(
    texts: Sequence[Sides], ngram: int
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """64-bit hashes of every text's n-grams one after the other, and where each text's begin; every
    text has at least one.
    """
    codes = [_codes(text, ngram) for text in texts]
    lengths = np.array([len(c) for c in codes], dtype=np.int64)
    whole = np.concatenate(codes)
    windows = len(whole) - ngram + 1
    hashes = np.zeros(windows, dtype=np.uint64)
    for offset in range(ngram):
        hashes = hashes * _BASE + whole[offset : offset + windows]
    inside = np.ones(len(whole), dtype=bool)  # windows that begin and end in one text
    ends = np.cumsum(lengths)
    for offset in range(1, ngram):
        inside[ends - offset] = False
    starts = np.concatenate([[0], np.cumsum(lengths - ngram + 1)[:-1]]).astype(np.int64)
    return _mix64(hashes[inside[:windows]]), starts


def permutations(count: int, seed: int) -> NDArray[np.uint32]:
    """[2, count] factors and summands of datasketch's permutations h -> a h + b modulo 2^32."""
    hashes = require("datasketch", "data").MinHash(num_perm=count, seed=seed, scheme="affine32")
    return np.asarray(hashes.permutations, dtype=np.uint32)


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
        for p in range(permutation.shape[1]):
            out[first:last, p] = np.minimum.reduceat(block * factors[p] + summands[p], offsets)
        first = last
    return out


def chunks(texts: Sequence[Sides], size: int = _CHUNK) -> Iterator[list[Sides]]:
    """Neighbouring texts of about `size` characters together."""
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


def bands(threshold: float, count: int) -> list[tuple[int, int]]:
    """Columns of a signature that make each band: as many as leave out at most _MISSED of the pairs
    at the threshold.

    A pair of similarity s shares no band of r columns with probability (1 - s^r)^b (Leskovec et
    al., Mining of Massive Datasets, 3.4). More columns mean fewer candidates to check. datasketch's
    own choice weighs the areas under that curve, which misses 13 % at a threshold of 0.8.
    """
    fitting = [r for r in range(1, count + 1) if (1 - threshold**r) ** (count // r) <= _MISSED]
    width = max(fitting, default=1)
    return [(start, start + width) for start in range(0, count - width + 1, width)]


@dataclass(frozen=True, slots=True)
class Buckets:
    """Groups of at least two rows that share a band: group i is the rows
    `order[starts[i] : starts[i] + sizes[i]]`, in ascending order.
    """

    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def rows(self) -> NDArray[np.int64]:
        """The rows of all groups, one group after the other."""
        before = np.append(0, np.cumsum(self.sizes)[:-1])  # rows of the groups in front of each
        shifts = np.repeat(self.starts - before, self.sizes)
        return self.order[shifts + np.arange(self.sizes.sum())]

    def pairs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All pairs of the groups of at most _SMALL_BUCKET rows."""
        left, right = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        for size in np.unique(self.sizes[self.sizes <= _SMALL_BUCKET]):
            # [groups, size]
            groups = self.order[self.starts[self.sizes == size][:, None] + np.arange(size)]
            first, other = np.triu_indices(int(size), k=1)
            left.append(groups[:, first].ravel())
            right.append(groups[:, other].ravel())
        return np.concatenate(left), np.concatenate(right)

    def large(self) -> list[NDArray[np.int64]]:
        """The groups of more than _SMALL_BUCKET rows."""
        big = self.sizes > _SMALL_BUCKET
        return [
            self.order[start : start + size]
            for start, size in zip(self.starts[big], self.sizes[big], strict=True)
        ]


def buckets(signature: NDArray[np.uint32], band: tuple[int, int]) -> Buckets:
    """Rows with the same values in a band's columns."""
    key = np.zeros(len(signature), dtype=np.uint64)
    for column in range(*band):
        key = _mix64(key ^ signature[:, column].astype(np.uint64)) * _BASE
    order = np.argsort(key, kind="stable")
    starts = np.append(0, np.flatnonzero(np.diff(key[order])) + 1)
    sizes = np.diff(np.append(starts, len(order)))
    return Buckets(order, starts[sizes > 1], sizes[sizes > 1])


class Sets:
    """The n-gram sets of some texts, for exact similarities."""

    def __init__(self, texts: Sequence[Sides], rows: NDArray[np.int64], ngram: int) -> None:
        from scipy.sparse import csr_array

        self._at = np.full(len(texts), -1, dtype=np.int64)  # row of the matrix for each text
        self._at[rows] = np.arange(len(rows))
        hashes, counts = [], []
        for part in chunks([texts[row] for row in rows]):
            part_hashes, starts = ngram_hashes(part, ngram)
            hashes.append(part_hashes)
            counts.append(np.diff(np.append(starts, len(part_hashes))))
        columns = np.unique(np.concatenate(hashes), return_inverse=True)[1].astype(np.int32)
        del hashes
        starts = np.append(0, np.cumsum(np.concatenate(counts)))
        self._matrix = csr_array(
            (np.ones(len(columns), dtype=np.int32), columns, starts),
            shape=(len(rows), int(columns.max()) + 1),
        )
        self._matrix.sum_duplicates()  # an n-gram counts once, however often it occurs
        self._matrix.data[:] = 1
        self._sizes = np.diff(self._matrix.indptr)
        # scratch: 1 at one text's n-grams
        self._marks = np.zeros(self._matrix.shape[1], dtype=np.int32)

    def jaccard(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.float64]:
        """[P] the Jaccard similarity of each pair of texts, `left` and `right` [P] being rows."""
        out = np.empty(len(left))
        for start in range(0, len(left), _PAIRS_AT_ONCE):
            block = slice(start, start + _PAIRS_AT_ONCE)
            first, other = self._at[left[block]], self._at[right[block]]
            common = self._matrix[first].multiply(self._matrix[other]).sum(axis=1)
            out[block] = common / (self._sizes[first] + self._sizes[other] - common)
        return out

    def jaccard_with(self, text: int, others: NDArray[np.int64]) -> NDArray[np.float64]:
        """[M] the Jaccard similarity of a text with each of the `others` [M]."""
        row = self._at[text]
        own = self._matrix.indices[self._matrix.indptr[row] : self._matrix.indptr[row + 1]]
        at = self._at[others]
        self._marks[own] = 1
        common = self._matrix[at] @ self._marks
        self._marks[own] = 0
        return common / (self._sizes[row] + self._sizes[at] - common)


def _large_bucket(
    rows: NDArray[np.int64], labels: NDArray[np.int64], sets: Sets, threshold: float
) -> list[tuple[int, int]]:
    """Edges that join a large bucket's rows as all its pairs would: rows that are already in one
    cluster are not compared.
    """
    local = labels[rows].copy()
    edges: list[tuple[int, int]] = []
    for pivot in range(len(rows) - 1):
        later = np.flatnonzero(local[pivot + 1 :] != local[pivot]) + pivot + 1
        if not len(later):
            if (local[pivot:] == local[pivot]).all():
                break
            continue
        near = later[sets.jaccard_with(int(rows[pivot]), rows[later]) >= threshold]
        edges += [(int(rows[pivot]), int(rows[other])) for other in near]
        local[np.isin(local, local[near])] = local[pivot]
    return edges


def near_clusters(
    texts: Sequence[Sides],
    *,
    threshold: float = 0.8,
    ngram: int = 5,
    count: int = 128,
    seed: int = 0,
) -> NDArray[np.int64]:
    """[N] number of each text's cluster: connected components of the pairs whose n-gram sets have a
    Jaccard similarity of at least `threshold`.

    Exact for every pair that shares a band; of the pairs at the threshold itself 2 in 1,000 share
    none (the defaults), of more similar ones fewer.
    """
    plain = [(normalised(good), normalised(bad)) for good, bad in texts]
    seen: dict[Sides, int] = {}
    # [N] equal texts are one
    unique_of = np.array([seen.setdefault(text, len(seen)) for text in plain], dtype=np.int64)
    unique = list(seen)
    del plain, seen
    if len(unique) < 2:
        return unique_of
    return _cluster(
        unique,
        threshold - 1e-9,
        ngram,
        signatures(unique, ngram, count, seed),
        bands(threshold, count),
    )[unique_of]


def _cluster(
    texts: Sequence[Sides],
    threshold: float,
    ngram: int,
    signature: NDArray[np.uint32],
    ranges: Sequence[tuple[int, int]],
) -> Any:
    """[N] cluster numbers of different texts."""
    tables = [buckets(signature, band) for band in ranges]
    involved = np.unique(np.concatenate([part.rows() for part in tables]))
    labels = np.arange(len(texts))
    if not len(involved):
        return labels
    sets = Sets(texts, involved, ngram)
    edges: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    pending: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []

    def join() -> None:
        nonlocal labels
        labels = components(len(texts), *_both(edges))

    def check() -> None:
        if not pending:
            return
        first, other = _both(pending)
        pending.clear()
        codes = np.unique(np.minimum(first, other) * len(texts) + np.maximum(first, other))
        first, other = codes // len(texts), codes % len(texts)
        apart = labels[first] != labels[other]
        first, other = first[apart], other[apart]
        near = sets.jaccard(first, other) >= threshold
        edges.append((first[near], other[near]))
        join()

    for part in tables:
        pending.append(part.pairs())
        if sum(len(first) for first, _ in pending) >= _MOST_PAIRS:
            check()
    check()
    done: set[bytes] = set()  # large buckets come back in other bands
    for bucket in (bucket for part in tables for bucket in part.large()):
        mark = bucket.tobytes()
        if mark not in done:
            done.add(mark)
            joined = _large_bucket(bucket, labels, sets, threshold)
            more = np.array(joined, dtype=np.int64).reshape(-1, 2)
            if len(more):
                edges.append((more[:, 0], more[:, 1]))
                join()
    return labels


def _both(
    pairs: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    first = np.concatenate([first for first, _ in pairs])
    return first, np.concatenate([other for _, other in pairs])


def near_duplicates(
    options: NearDuplicates, items: Iterator[Item], context: Context
) -> Iterator[Item]:
    """Keep one row of each cluster."""
    rows = list(items)
    texts = [sides(item.columns, options.part, context.kind) for item in rows]
    labels = near_clusters(
        texts,
        threshold=options.threshold,
        ngram=options.ngram,
        count=options.permutations,
        seed=context.seed,
    )
    yield from keep_one(
        rows, labels.tolist(), options.keep, options.column, "near duplicate", context
    )
