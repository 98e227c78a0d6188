"""Step balance: groups of training rows by a column or by what they say, evened out by copies, by
leaving out, or by weights.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import numpy as np

from conf.preparation.sampling import Balance, Balancing, Grouping
from rlhf.data.prepare.clusters import members
from rlhf.data.prepare.items import Context, Item, require_free
from rlhf.data.prepare.texts import sides
from rlhf.data.prepare.vectors import reduced, vectors
from rlhf.process.wording import describe, nearest
from rlhf.types import UserError

WEIGHT = "weight"  # the column that losses read


def column_groups(items: Sequence[Item], column: str, step: str) -> list[str]:
    """[N] the value of a column, as text. Raises UserError for a row without a value."""
    out = []
    for item in items:
        value = item.columns.get(column)
        if not isinstance(value, (str, bool, int, float)):
            if column in item.columns:
                instead = f"found {describe(value)}"
            else:
                near = nearest(column, [str(k) for k in item.columns])
                instead = "but it is missing" + (f"; nearest: {near!r}" if near else "")
            raise UserError(
                f"{item.place}: step {step} needs a text, number or true/false in column "
                f"{column!r}, {instead}."
            )
        out.append(str(value))
    return out


def cluster_groups(matrix: Any, options: Balance, seed: int) -> list[str | None]:
    """[N] cluster of each row by k-means or HDBSCAN; None for a row in no dense region."""
    if options.by is Grouping.kmeans:
        from sklearn.cluster import KMeans

        if matrix.shape[0] < options.clusters:
            raise UserError(
                f"step balance: clusters={options.clusters}, but there are {matrix.shape[0]} "
                "training rows."
            )
        labels = KMeans(options.clusters, n_init=4, random_state=seed).fit_predict(matrix)
        return [f"cluster {label}" for label in labels]
    from sklearn.cluster import HDBSCAN

    if not isinstance(matrix, np.ndarray):
        matrix = reduced(matrix, seed)
    labels = HDBSCAN(min_cluster_size=options.min_cluster, copy=True).fit_predict(matrix)
    return [None if label < 0 else f"cluster {label}" for label in labels]


def weights(groups: Sequence[str | None]) -> list[float]:
    """[N] N / (K n_k) for a row of group k, and 1 for a row of none; their mean is 1, since each of
    the K groups sums to N / K.
    """
    counts = Counter(group for group in groups if group is not None)
    total = sum(counts.values())
    return [1.0 if group is None else total / (len(counts) * counts[group]) for group in groups]


def central(matrix: Any, rows: Sequence[int], count: int) -> list[int]:
    """The `count` of `rows` whose vectors are nearest to their mean, in the order of the rows."""
    part = matrix[np.array(rows)]
    mean = np.asarray(part.mean(axis=0)).ravel()
    mean /= max(float(np.linalg.norm(mean)), 1e-12)
    # rows are unit vectors, so the largest product is the smallest distance
    likeness = np.asarray(part @ mean).ravel()
    best = np.argsort(-likeness, kind="stable")[:count]
    return sorted(rows[i] for i in best)


def _copies(rows: Sequence[int], count: int, rng: random.Random) -> list[int]:
    """`count` more rows: each row comes once before any comes twice."""
    out: list[int] = []
    while len(out) < count:
        out += rng.sample(list(rows), min(len(rows), count - len(out)))
    return out


def balance(options: Balance, items: Iterator[Item], context: Context) -> Iterator[Item]:
    """Even out the training rows: by weights, by copies, or by leaving rows out. Raises UserError
    for weights of rows that have some already.
    """
    everything = list(items)
    train = [item for item in everything if item.split == "train"]
    if not train:
        yield from everything
        return
    matrix = None
    if options.by is not Grouping.column or options.how is Balancing.under:
        texts = [sides(item.columns, options.part, context.kind) for item in train]
        matrix = vectors(texts, options.vectors, options.model)
    groups: list[str | None]
    if options.by is Grouping.column:
        groups = [*column_groups(train, str(options.column), "balance")]
    else:
        groups = cluster_groups(matrix, options, context.seed)
    context.figures["before"] = _counts(groups)
    if options.how is Balancing.weight:
        require_free(train, WEIGHT, "balance", "; how=over or under leaves weights as they are")
        for item, weight in zip(train, weights(groups), strict=True):
            item.columns[WEIGHT] = round(weight, 6)
        yield from everything
    elif options.how is Balancing.over:
        yield from everything
        yield from _over(options, train, groups, context)
    else:
        yield from _under(options, everything, train, groups, matrix, context)


def _by_group(groups: Sequence[str | None]) -> list[tuple[str | None, list[int]]]:
    """(name, rows) of each group, without the rows of none."""
    grouped = [(groups[rows[0]], rows) for rows in members(_numbers(groups))]
    return [(name, rows) for name, rows in grouped if name is not None]


def _over(
    options: Balance, train: Sequence[Item], groups: Sequence[str | None], context: Context
) -> Iterator[Item]:
    """Copies of rows of the smaller groups; a copy names the row that it is a copy of."""
    by_group = _by_group(groups)
    smallest = math.ceil(max((len(rows) for _, rows in by_group), default=0) / options.ratio)
    rng = random.Random(f"{context.seed}:over")
    extra: list[int] = []
    for _, rows in by_group:
        extra += _copies(rows, max(0, smallest - len(rows)), rng)
    for index in extra:
        item = train[index]
        yield Item(deepcopy(item.columns), item.origin, item.number, item.split)
    context.figures["after"] = _counts([*groups, *(groups[index] for index in extra)])


def _under(
    options: Balance,
    everything: Sequence[Item],
    train: Sequence[Item],
    groups: Sequence[str | None],
    matrix: Any,
    context: Context,
) -> Iterator[Item]:
    """All rows but those of the larger groups that are farthest from their group's centre."""
    by_group = _by_group(groups)
    largest = math.floor(min((len(rows) for _, rows in by_group), default=0) * options.ratio)
    left_out: dict[int, str | None] = {}
    for name, rows in by_group:
        for index in set(rows) - set(central(matrix, rows, largest)):
            left_out[index] = name
    names = {id(train[index]): name for index, name in left_out.items()}
    for item in everything:
        if id(item) in names:
            context.rejected(
                item,
                f"group {names[id(item)]!r} has more than {largest} rows, and others are nearer "
                "to its centre",
            )
        else:
            yield item
    kept = [group for index, group in enumerate(groups) if index not in left_out]
    context.figures["after"] = _counts(kept)


def _numbers(groups: Sequence[str | None]) -> list[int]:
    names = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    return [names[group] for group in groups]


def _counts(groups: Sequence[str | None]) -> dict[str, int]:
    return {
        ("in no cluster" if name is None else name): count
        for name, count in Counter(groups).most_common()
    }
