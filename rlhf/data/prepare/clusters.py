"""Clusters of duplicates: connected components of pairs, and the one row of each that stays."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from conf.preparation.base import Keep
from rlhf.data.prepare.items import Context, Item, joined
from rlhf.data.rows import finite
from rlhf.process.wording import describe
from rlhf.types import UserError


def components(count: int, left: Any, right: Any) -> Any:
    """[count] the number of each node's component, for the edges left[i]-right[i]."""
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(count, count))
    return connected_components(edges, directed=False)[1]


def members(labels: Sequence[int]) -> list[list[int]]:
    """The rows of each cluster, in order; clusters in the order of their first rows."""
    rows_of: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        rows_of.setdefault(int(label), []).append(row)
    return list(rows_of.values())


def beside_pictures(
    shown: Sequence[Sequence[str]], cluster: Callable[[Sequence[int]], Sequence[int]]
) -> list[int]:
    """The number of each row's cluster, where rows with different pictures are never alike.

    shown: each row's pictures; cluster: from the indices of some rows to numbers of clusters.
    """
    if not any(shown):
        return [int(label) for label in cluster(range(len(shown)))]
    groups: dict[tuple[str, ...], list[int]] = {}
    for row, pictures in enumerate(shown):
        groups.setdefault(tuple(pictures), []).append(row)
    labels, taken = [0] * len(shown), 0
    for rows in groups.values():
        own = [0]
        if len(rows) > 1:
            own = [int(label) for label in cluster(rows)]
        for row, label in zip(rows, own, strict=True):
            labels[row] = taken + label
        taken += max(own, default=0) + 1
    return labels


def score(item: Item, column: str) -> float:
    """The number in a column of a row. Raises UserError that names the row."""
    value = item.columns.get(column)
    number = finite(value)
    if number is None:
        raise UserError(
            f"{item.place}: keep=best needs a number in column {column!r}, found {describe(value)}."
        )
    return number


def chosen(items: Sequence[Item], rows: Sequence[int], keep: Keep, column: str | None) -> int:
    """The row of a cluster that stays. Where some rows are held out it is one of those, so that no
    training row resembles a held-out row.
    """
    candidates = [row for row in rows if items[row].split == "eval"] or list(rows)
    if keep is Keep.longest:
        return max(candidates, key=lambda row: (len(joined(items[row].columns)), -row))
    if keep is Keep.best:
        assert column is not None
        return max(candidates, key=lambda row: (score(items[row], column), -row))
    return candidates[0]


def keep_one(
    items: Sequence[Item],
    labels: Sequence[int],
    keep: Keep,
    column: str | None,
    what: str,
    context: Context,
) -> Iterator[Item]:
    """Yield one row of each cluster; the others are rejected as a `what` of it. The figures hold
    how many clusters have two rows or more, and the size of the largest.
    """
    stays = list(range(len(items)))  # [N] the row that stays for each
    several = [rows for rows in members(labels) if len(rows) > 1]
    size = {}
    for rows in several:
        kept = chosen(items, rows, keep, column)
        size[kept] = len(rows)
        for row in rows:
            stays[row] = kept
    for row, item in enumerate(items):
        kept = stays[row]
        if kept == row:
            yield item
        else:
            context.rejected(item, f"{what} of {items[kept].place} (cluster of {size[kept]})")
    context.figures.update(clusters=len(several), largest=max(size.values(), default=0))
