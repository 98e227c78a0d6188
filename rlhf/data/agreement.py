"""How far annotators agree: observed agreement, Cohen's and Fleiss' kappa, Krippendorff's alpha,
each with a bootstrap interval.

Pure functions of (item, annotator, label) triples; an annotator who has not judged an item simply
has no triple for it.

    observed       share of pairs of labels of one item that are equal, averaged over the items with
    two labels or more
    Cohen          two annotators, over the items that both have judged (Cohen 1960)
    Fleiss         any number of annotators (Fleiss 1971). Items may have unequal numbers of labels,
    in Gwet's form (Handbook of Inter-Rater
                   Reliability, 4th ed., ch. 2): each item weighs the same, the chance of a label is
                   its mean share over all items, and
                   items with one label count towards that chance only
    Krippendorff   any number of annotators, missing labels, nominal, ordinal or interval labels
    (Krippendorff 2011, "Computing
                   Krippendorff's Alpha-Reliability"); items with one label are left out. Ordinal
                   distance is the distance of mid-ranks

The intervals resample items (Zapf et al. 2016, BMC Med Res Methodol 16:93). crowd-kit has the
nominal alpha only, at a point; its value and scikit-learn's kappa are what the tests hold these
functions against. Where a coefficient is 0/0, as when every label is the same, it is None.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
_CONFIDENCE = (2.5, 97.5)  # percentiles
_BLOCK = 4_000_000  # numbers that a block of resamples may hold


class Label(NamedTuple):
    """One judgement."""

    item: str
    annotator: str
    label: Hashable


class Level(Enum):
    """What the difference of two labels means to Krippendorff's alpha."""

    nominal = "nominal"
    ordinal = "ordinal"
    interval = "interval"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A coefficient with its 95 % interval; None where it is undefined."""

    value: float | None
    low: float | None
    high: float | None
    items: int  # that it rests on

    def figures(self) -> dict[str, float | int | None]:
        return {"value": self.value, "low": self.low, "high": self.high, "items": self.items}


@dataclass(frozen=True, slots=True)
class Counts:
    """How often each label was given to each item."""

    items: tuple[str, ...]
    labels: tuple[Any, ...]
    table: Array  # [items, labels]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Every coefficient of one set of labels."""

    items: int
    judgements: int
    annotators: int
    labels: tuple[Any, ...]
    level: Level
    observed: Estimate
    cohen: float | None  # mean over pairs of annotators, each weighing as many items as it shares
    cohen_pairs: dict[tuple[str, str], Estimate]
    fleiss: Estimate
    krippendorff: Estimate

    def figures(self) -> dict[str, Any]:
        """As JSON holds it."""
        pairs = [
            {"annotators": list(names), **estimate.figures()}
            for names, estimate in self.cohen_pairs.items()
        ]
        return {
            "items": self.items,
            "judgements": self.judgements,
            "annotators": self.annotators,
            "labels": list(self.labels),
            "level": self.level.value,
            "observed": self.observed.figures(),
            "cohen_kappa": {"value": self.cohen, "pairs": pairs},
            "fleiss_kappa": self.fleiss.figures(),
            "krippendorff_alpha": self.krippendorff.figures(),
        }


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def sorted_labels(values: Iterable[Hashable]) -> tuple[Any, ...]:
    """The different labels: numbers by size, anything else by kind and text."""
    distinct = set(values)
    if all(_is_number(v) for v in distinct):
        return tuple(sorted(distinct, key=float))
    return tuple(sorted(distinct, key=lambda v: (type(v).__name__, str(v))))


def check_single(labels: Iterable[Label]) -> None:
    """Raises ValueError when an annotator has judged an item twice."""
    seen: set[tuple[str, str]] = set()
    for item, annotator, _ in labels:
        if (item, annotator) in seen:
            raise ValueError(
                f"annotator {annotator!r} has judged item {item!r} more than once: expected one "
                "label"
            )
        seen.add((item, annotator))


def count(labels: Sequence[Label]) -> Counts:
    """How often each label was given to each item: items in order of appearance, labels sorted.
    Raises ValueError for a repeated judgement.
    """
    check_single(labels)
    distinct = dict.fromkeys(label.item for label in labels)
    items = {item: i for i, item in enumerate(distinct)}
    names = sorted_labels(label.label for label in labels)
    index = {name: i for i, name in enumerate(names)}
    table = np.zeros((len(items), len(names)), dtype=np.int64)
    np.add.at(
        table,
        ([items[label.item] for label in labels], [index[label.label] for label in labels]),
        1,
    )
    return Counts(tuple(items), names, table)


# ---- coefficients: patterns [P, K] are distinct rows of counts, times [R, P] how often each occurs
# in each of R samples; out: [R], NaN for 0/0 ----


def _ratio(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, NaN where the denominator is 0."""
    zero = np.isclose(denominator, 0.0, atol=1e-12)
    return np.where(zero, np.nan, numerator / np.where(zero, 1.0, denominator))


def _weighted(weights: Array, rows: Array) -> Array:
    """weights [R, P] @ rows [P, K]. Items have few of many labels, as grades with decimals are:
    then only what is there is multiplied.
    """
    if 8 * np.count_nonzero(rows) > rows.size:
        return np.asarray(weights @ rows)
    from scipy.sparse import csr_array

    return np.asarray((csr_array(rows.T) @ weights.T).T)


def observed_agreement(patterns: Array, times: Array) -> Array:
    """Mean over items of the share of equal pairs of labels."""
    sizes = patterns.sum(axis=1)  # [P]
    several = sizes >= 2
    kept, n = patterns[several], sizes[several]
    equal = (kept * (kept - 1)).sum(axis=1) / (n * (n - 1))  # [P]
    return _ratio(times[:, several] @ equal, times[:, several].sum(axis=1))


def fleiss_kappa(patterns: Array, times: Array) -> Array:
    """Fleiss 1971, equations 3 to 7; Gwet's form for unequal numbers of labels."""
    shares = patterns / patterns.sum(axis=1, keepdims=True)  # [P, K]
    chance = ((_weighted(times, shares) / times.sum(axis=1, keepdims=True)) ** 2).sum(axis=1)
    return _ratio(observed_agreement(patterns, times) - chance, 1.0 - chance)


def krippendorff_alpha(
    patterns: Array, times: Array, level: Level, values: Array | None = None
) -> Array:
    """1 - (n - 1) sum_u D_u / D_e over items u with two labels or more; `values` [K] are an
    interval scale's numbers.

    D_u is the sum over pairs of an item's labels of their squared distance, divided by its number
    of labels less one, and D_e that sum over all pairs of labels (Krippendorff 2011, section E).
    For numbers v it is 2 (m sum v^2 - (sum v)^2) / (m - 1).
    """
    sizes = patterns.sum(axis=1)
    several = sizes >= 2
    kept, m, often = patterns[several].astype(np.float64), sizes[several], times[:, several]
    totals = _weighted(often, kept)  # [R, K]
    n = totals.sum(axis=1)
    if level is Level.nominal:
        within = (m**2 - (kept**2).sum(axis=1)) / (m - 1)  # [P]
        disagreement, chance = often @ within, n**2 - (totals**2).sum(axis=1)
        return 1.0 - _ratio((n - 1) * disagreement, chance)
    if level is Level.ordinal:
        # [R, K] mid-ranks: their difference is Krippendorff's ordinal metric
        scale = np.cumsum(totals, axis=1) - totals / 2
    else:
        assert values is not None
        scale = np.broadcast_to(values.astype(np.float64), totals.shape)
    # about their mean, so that the squares stay small
    scale = scale - _ratio((totals * scale).sum(axis=1), n)[:, None]
    first, second = _weighted(scale, kept.T), _weighted(scale**2, kept.T)  # [R, P]
    within = 2 * (m * second - first**2) / (m - 1)
    disagreement = (often * within).sum(axis=1)
    chance = 2 * (n * (totals * scale**2).sum(axis=1) - (totals * scale).sum(axis=1) ** 2)
    return 1.0 - _ratio((n - 1) * disagreement, chance)


def cohen_kappa(cells: Array, times: Array) -> Array:
    """Cohen 1960, equation 2, of tables of counts, one annotator's label by the other's: cells
    [C, 2] are the two labels' numbers, times [R, C] how often each cell occurs in each of R tables.
    """
    labels = np.arange(cells.max(initial=-1) + 1)
    rows, columns = (cells[:, [side]] == labels for side in (0, 1))  # [C, K]
    n = times.sum(axis=1, keepdims=True)
    agreed = (times[:, cells[:, 0] == cells[:, 1]].sum(axis=1, keepdims=True) / n)[:, 0]
    first = _weighted(times, rows.astype(np.float64)) / n  # [R, K]
    other = _weighted(times, columns.astype(np.float64)) / n
    chance = (first * other).sum(axis=1)
    return _ratio(agreed - chance, 1.0 - chance)


# ---- estimates ----


def _plain(value: float) -> float | None:
    if math.isnan(value):
        return None
    return float(value)


def _estimate(point: Array, resampled: Array, items: int) -> Estimate:
    defined = resampled[~np.isnan(resampled)]
    if math.isnan(float(point[0])) or not len(defined):
        return Estimate(_plain(float(point[0])), None, None, items)
    low, high = np.percentile(defined, _CONFIDENCE)
    return Estimate(float(point[0]), float(low), float(high), items)


def _bootstrapped(
    table: Array, coefficient: Callable[[Array, Array], Array], resamples: int, seed: int
) -> Estimate:
    """`coefficient` of a table of counts, and over `resamples` resamples of its items.

    Items with equal counts are one pattern, and drawing items with replacement draws how often each
    pattern occurs, so that a resample of a hundred thousand items costs as little as they have
    patterns.
    """
    several = int((table.sum(axis=1) >= 2).sum())
    if not len(table):
        return Estimate(None, None, None, 0)
    patterns, times = np.unique(table, axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // sum(patterns.shape))

    def drawn(size: int) -> Array:
        return coefficient(patterns, rng.multinomial(len(table), times / len(table), size=size))

    resampled = np.concatenate(
        [drawn(min(block, resamples - start)) for start in range(0, resamples, block)]
    )
    return _estimate(coefficient(patterns, times[None]), resampled, several)


def cohen_pairs(
    labels: Sequence[Label], resamples: int = 1000, seed: int = 0
) -> dict[tuple[str, str], Estimate]:
    """Cohen's kappa of each two annotators that share an item, names sorted. Raises ValueError for
    a repeated judgement.
    """
    check_single(labels)
    names = sorted_labels(label.label for label in labels)
    index = {name: i for i, name in enumerate(names)}
    by_item: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for item, annotator, label in labels:
        by_item[item].append((annotator, index[label]))
    tables: dict[tuple[str, str], Counter[tuple[int, int]]] = {}
    for judgements in by_item.values():
        for (first, a), (second, b) in combinations(sorted(judgements), 2):
            tables.setdefault((first, second), Counter())[a, b] += 1
    out = {}
    for pair, table in sorted(tables.items()):
        cells = np.array(sorted(table))  # [C, 2]
        counts = np.array([table[a, b] for a, b in cells.tolist()])
        shared = table.total()
        drawn = np.random.default_rng(seed).multinomial(shared, counts / shared, size=resamples)
        point = cohen_kappa(cells, counts[None])
        out[pair] = _estimate(point, cohen_kappa(cells, drawn), shared)
    return out


def mean_cohen(pairs: Iterable[Estimate]) -> float | None:
    """Mean kappa over pairs of annotators, each weighing as many items as it shares; pairs whose
    kappa is undefined are left out.
    """
    defined = [(pair.value, pair.items) for pair in pairs if pair.value is not None]
    if not defined:
        return None
    return sum(value * items for value, items in defined) / sum(items for _, items in defined)


def _in_order(counts: Counts, level: Level, order: Sequence[Hashable] | None) -> Counts:
    """Columns in the scale's order. Raises ValueError for labels that the scale lacks, or that are
    no numbers without an order.
    """
    if level is Level.nominal:
        return counts
    if order is not None and level is Level.ordinal:
        strange = [name for name in counts.labels if name not in order]
        if strange:
            raise ValueError(
                f"labels {', '.join(map(repr, strange))} are not in the order "
                f"{', '.join(map(repr, order))}"
            )
        columns = sorted(range(len(counts.labels)), key=lambda i: order.index(counts.labels[i]))
        return Counts(
            counts.items, tuple(counts.labels[i] for i in columns), counts.table[:, columns]
        )
    strange = [name for name in counts.labels if not _is_number(name)]
    if strange:
        expected = "numbers" if level is Level.interval else "numbers or an order"
        raise ValueError(f"{level.value} labels: expected {expected}, found {strange[0]!r}")
    return counts


def agreement(
    labels: Sequence[Label],
    *,
    level: Level = Level.nominal,
    order: Sequence[Hashable] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Agreement:
    """Every coefficient. `order`: ordinal labels from lowest to highest; None: numbers by size.

    Raises ValueError for a repeated judgement, and for labels that don't fit the level.
    """
    counts = _in_order(count(labels), level, order)
    values = np.array(counts.labels, dtype=np.float64) if level is Level.interval else None
    pairs = cohen_pairs(labels, resamples, seed)

    def alpha(patterns: Array, times: Array) -> Array:
        return krippendorff_alpha(patterns, times, level, values)

    return Agreement(
        items=len(counts.items),
        judgements=len(labels),
        annotators=len(Counter(label.annotator for label in labels)),
        labels=counts.labels,
        level=level,
        observed=_bootstrapped(counts.table, observed_agreement, resamples, seed),
        cohen=mean_cohen(pairs.values()),
        cohen_pairs=pairs,
        fleiss=_bootstrapped(counts.table, fleiss_kappa, resamples, seed),
        krippendorff=_bootstrapped(counts.table, alpha, resamples, seed),
    )
