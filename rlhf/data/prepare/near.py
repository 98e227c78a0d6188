"""Step near_duplicates: MinHash with banding over character n-grams, every candidate pair checked
exactly.

Texts are compared as sets of hashed n-grams of their normalised form (minhash.py). All of it runs
over whole arrays: buckets are neighbours in sorted band keys (those of datasketch.MinHashLSH,
without its dictionaries of sets).
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conf.preparation.duplicates import NearDuplicates
from rlhf.data.prepare.clusters import beside_pictures, components, keep_one
from rlhf.data.prepare.exact import HashTable
from rlhf.data.prepare.held import Mapped, gathered, picked
from rlhf.data.prepare.items import Context, Item
from rlhf.data.prepare.minhash import (
    BASE,
    Sides,
    chunks,
    mix64,
    ngram_hashes,
    signatures,
)
from rlhf.data.prepare.numbers import Numbers
from rlhf.data.prepare.texts import normalised, noting, sides
from rlhf.process import parallel

# share of the pairs at the threshold that the bands may leave out; of more similar ones they leave
# out fewer
_MISSED = 0.005
NGRAM, PERMUTATIONS = 5, 128  # of step near_duplicates by default
_TOGETHER = 256  # texts that a process signs at once
_NO_SIGNATURE = np.empty((0, PERMUTATIONS), dtype=np.uint32)
_MOST_PAIRS = 1 << 21  # candidate pairs held before they are checked
_PAIRS_AT_ONCE = 1 << 15
_SMALL_BUCKET = 32  # rows up to which all pairs of a bucket are candidates at once


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
        key = mix64(key ^ signature[:, column].astype(np.uint64)) * BASE
    order = np.argsort(key, kind="stable")
    starts = np.append(0, np.flatnonzero(np.diff(key[order])) + 1)
    sizes = np.diff(np.append(starts, len(order)))
    return Buckets(order, starts[sizes > 1], sizes[sizes > 1])


class Sets:
    """The n-gram sets of some texts, for exact similarities. numbers: texts with different ones
    are not similar at all.
    """

    def __init__(
        self, texts: Sequence[Sides], rows: NDArray[np.int64], ngram: int, numbers: bool
    ) -> None:
        from scipy.sparse import csr_array

        self._at = np.full(len(texts), -1, dtype=np.int64)  # row of the matrix for each text
        self._at[rows] = np.arange(len(rows))
        hashes, counts = [], []
        self._numbers = Numbers() if numbers else None
        for part in chunks(texts[int(row)] for row in rows):
            part_hashes, starts = ngram_hashes(part, ngram)
            hashes.append(part_hashes)
            counts.append(np.diff(np.append(starts, len(part_hashes))))
            if self._numbers is not None:
                self._numbers.add(part)
        if self._numbers is not None:
            self._numbers.close()
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
            if self._numbers is not None:
                out[block][self._numbers.differ(first, other)] = 0.0
        return out

    def alike(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """The rows [M] in groups that may be similar: those with the same numbers, where numbers
        count.
        """
        if self._numbers is None:
            return [rows]
        return [rows[places] for places in self._numbers.alike(self._at[rows])]

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


# of some texts: [M] 128-bit keys, equal for equal texts, and [M, P] their signatures
Signatures = tuple[list[bytes], NDArray[np.uint32]]


@dataclass(frozen=True, slots=True)
class Signed:
    """What a process does to some neighbouring texts."""

    seed: int
    ngram: int = NGRAM
    count: int = PERMUTATIONS

    def __call__(self, texts: list[Sides]) -> Signatures:
        plain = [plainly(text) for text in texts]
        keys = list(map(key_of, plain))
        return keys, signatures(plain, self.ngram, self.count, self.seed)


def plainly(text: Sides) -> Sides:
    """A text's two sides in the form in which they are compared."""
    return normalised(text[0]), normalised(text[1])


def key_of(text: Sides) -> bytes:
    """128 bits of a text in that form (BLAKE2b)."""
    joined = "\0".join(text).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(joined, digest_size=16).digest()


def _different(
    parts: Iterable[Signatures], rows: int
) -> tuple[list[bytes], NDArray[np.int64], list[int], NDArray[np.uint32]]:
    """[N] the key of each text, [N] its number among the different ones, [U] where each of those
    comes first, and [U, P] their signatures. Equal keys count as equal texts. rows: N.
    """
    seen = HashTable()
    unique_of = np.empty(rows, dtype=np.int64)
    firsts: list[int] = []
    all_keys: list[bytes] = []
    signature = []
    row = 0
    for keys, values in parts:
        new = []
        for at, key in enumerate(keys):
            halves = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
            known = seen.add(*halves, len(firsts) + 1)
            if known is None:
                new.append(at)
                firsts.append(row)
                known = len(firsts)
            unique_of[row] = known - 1
            row += 1
        all_keys += keys
        signature.append(values[new])
    return all_keys, unique_of, firsts, np.concatenate(signature or [_NO_SIGNATURE])


def near_clusters(
    texts: Sequence[Sides],
    *,
    threshold: float = 0.8,
    ngram: int = NGRAM,
    count: int = PERMUTATIONS,
    seed: int = 0,
    numbers: bool = False,
) -> NDArray[np.int64]:
    """[N] number of each text's cluster: connected components of the pairs whose n-gram sets have a
    Jaccard similarity of at least `threshold`; with `numbers` pairs in which each text has a number
    that the other lacks are left out.

    Exact for every pair that shares a band; of the pairs at the threshold itself 2 in 1,000 share
    none (the defaults), of more similar ones fewer. Where more than _SMALL_BUCKET texts share a
    band, `numbers` compares those with the same numbers only: of a template's thousands no two are
    worth a look.
    """
    parts = parallel.over_parts(Signed(seed, ngram, count), texts, _TOGETHER)
    return clusters_of(parts, texts, threshold=threshold, ngram=ngram, numbers=numbers)[1]


def clusters_of(
    parts: Iterable[Signatures],
    texts: Sequence[Sides],
    *,
    threshold: float,
    ngram: int = NGRAM,
    numbers: bool = False,
) -> tuple[list[bytes], NDArray[np.int64]]:
    """[N] keys that are equal for equal texts, and [N] `near_clusters`. parts: what `Signed` gives
    for the texts, in order.
    """
    keys, unique_of, firsts, signature = _different(parts, len(texts))
    if len(firsts) < 2:
        return keys, unique_of
    unique = Mapped(lambda first: plainly(texts[first]), firsts)
    ranges = bands(threshold, signature.shape[1])
    labels = _cluster(unique, threshold - 1e-9, ngram, signature, ranges, numbers)
    return keys, labels[unique_of]


def _cluster(
    texts: Sequence[Sides],
    threshold: float,
    ngram: int,
    signature: NDArray[np.uint32],
    ranges: Sequence[tuple[int, int]],
    numbers: bool,
) -> Any:
    """[N] cluster numbers of different texts."""
    tables = [buckets(signature, band) for band in ranges]
    involved = np.unique(np.concatenate([part.rows() for part in tables]))
    labels = np.arange(len(texts))
    if not len(involved):
        return labels
    sets = Sets(texts, involved, ngram, numbers)
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
        if mark in done:
            continue
        done.add(mark)
        joined: list[tuple[int, int]] = []
        for group in sets.alike(bucket):
            joined += _large_bucket(group, labels, sets, threshold)
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
    shown: list[tuple[str, ...]] = []
    rows = gathered(noting(items, options.part, shown), context.folder)
    texts = Mapped(lambda item: sides(item.columns, options.part, context.kind), rows)

    def cluster(some: Sequence[int]) -> Any:
        return near_clusters(
            texts if len(some) == len(rows) else picked(texts, array("Q", some)),
            threshold=options.threshold,
            ngram=options.ngram,
            count=options.permutations,
            seed=context.seed,
            numbers=options.numbers,
        )

    labels = beside_pictures(shown, cluster)
    yield from keep_one(rows, labels, options.keep, options.column, "near duplicate", context)
