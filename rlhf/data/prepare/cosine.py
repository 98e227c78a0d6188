"""Step cosine_duplicates: all pairs of unit vectors with a cosine above a threshold, without
looking at all pairs.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conf.preparation.duplicates import CosineDuplicates
from rlhf.data.prepare.clusters import beside_pictures, components, keep_one
from rlhf.data.prepare.items import Context, Item
from rlhf.data.prepare.texts import asked_about, sides
from rlhf.data.prepare.vectors import vectors

Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]
_ROWS = 1024  # of a block
_CHECKED = 1 << 16  # candidate pairs multiplied at once
_SLACK = 1e-6  # float32 rounding of a dot product


def prefixes(matrix: Any, threshold: float) -> Any:
    """[N, V] the rarest features of each row, ones: two rows with a cosine of at least `threshold`
    have one of them in common.

    Bayardo et al. 2007 (Scaling Up All Pairs Similarity Search, WWW), with the rows' own norms:
    order features from rare to frequent. If f is the first one that x and y share, x.y is a sum
    over f and later ones, so x.y <= |x from f on| (Cauchy-Schwarz, |y| = 1). Hence where |x from f
    on| < threshold the pair is below it; so f is among the features at which the rest of x still
    weighs `threshold`, and as much of y.
    """
    from scipy.sparse import csr_array

    frequency = np.bincount(matrix.indices, minlength=matrix.shape[1])
    rank = np.empty(matrix.shape[1], dtype=np.int64)
    rank[np.argsort(frequency, kind="stable")] = np.arange(matrix.shape[1])
    counts = np.diff(matrix.indptr)
    row = np.repeat(np.arange(matrix.shape[0]), counts)
    order = np.lexsort((rank[matrix.indices], row))  # within each row from rare to frequent
    squares = matrix.data[order].astype(np.float64) ** 2
    before = np.append(0.0, np.cumsum(squares))  # of all entries in front, over all rows
    # squared norm from an entry to the end of its row
    rest = np.repeat(before[matrix.indptr[1:]], counts) - before[:-1]
    kept = rest >= (threshold - _SLACK) ** 2
    columns = matrix.indices[order][kept]
    starts = np.append(0, np.cumsum(np.bincount(row[kept], minlength=matrix.shape[0])))
    return csr_array((np.ones(len(columns), dtype=np.int32), columns, starts), shape=matrix.shape)


def sparse_pairs(matrix: Any, threshold: float) -> Pairs:
    """All pairs i < j of unit rows with a cosine of at least `threshold`."""
    prefix = prefixes(matrix, threshold)
    other_way = prefix.T.tocsr()
    left, right = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for start in range(0, matrix.shape[0], _ROWS):
        shared = (prefix[start : start + _ROWS] @ other_way).tocoo()
        row, other = shared.row.astype(np.int64) + start, shared.col.astype(np.int64)
        later = other > row
        row, other = row[later], other[later]
        for at in range(0, len(row), _CHECKED):
            i, j = row[at : at + _CHECKED], other[at : at + _CHECKED]
            near = matrix[i].multiply(matrix[j]).sum(axis=1) >= threshold - _SLACK
            left.append(i[near])
            right.append(j[near])
    return np.concatenate(left), np.concatenate(right)


def dense_pairs(matrix: NDArray[np.float32], threshold: float) -> Pairs:
    """All pairs i < j of unit rows with a cosine of at least `threshold`, block by block."""
    left, right = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for start in range(0, len(matrix), _ROWS):
        row, other = np.nonzero(
            matrix[start : start + _ROWS] @ matrix[start:].T >= threshold - _SLACK
        )
        later = other > row
        left.append(row[later] + start)
        right.append(other[later] + start)
    return np.concatenate(left), np.concatenate(right)


def cosine_duplicates(
    options: CosineDuplicates, items: Iterator[Item], context: Context
) -> Iterator[Item]:
    """Keep one row of each cluster. Equal texts are put together before vectors are compared, so
    that a thousand copies are no half million pairs.
    """
    rows = list(items)
    texts = [sides(item.columns, options.part, context.kind) for item in rows]
    seen: dict[tuple[str, str], int] = {}
    unique_of = np.array([seen.setdefault(text, len(seen)) for text in texts], dtype=np.int64)
    alike = np.arange(len(seen))
    if len(seen) > 1:
        matrix = vectors(list(seen), options.vectors, options.model)
        similar = dense_pairs if isinstance(matrix, np.ndarray) else sparse_pairs
        alike = components(len(seen), *similar(matrix, options.threshold))
    labels = alike[unique_of]
    shown = [asked_about(item.columns, options.part) for item in rows]
    apart = beside_pictures(shown, lambda some: labels[list(some)].tolist())
    yield from keep_one(rows, apart, options.keep, options.column, "cosine duplicate", context)
