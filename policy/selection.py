"""Which responses of a step train: groups whose scores differ, the best of each group, or its best
and worst as a pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from conf.choices import Selection


@dataclass(frozen=True, slots=True)
class Selected:
    """Row numbers. `pairs` hold (better, worse) and are empty unless the selection makes pairs;
    every row of a pair is in `rows`.
    """

    rows: list[int]
    pairs: list[tuple[int, int]]


def rows_by_group(groups: Sequence[int]) -> list[list[int]]:
    """Row numbers of each group, groups by first appearance."""
    out: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        out.setdefault(group, []).append(row)
    return list(out.values())


def all_equal(scores: Sequence[float], rows: Sequence[int]) -> bool:
    """Whether these rows' scores are all the same, so that comparing them says nothing."""
    return max(scores[row] for row in rows) == min(scores[row] for row in rows)


def unequal_groups(scores: Sequence[float], groups: Sequence[int]) -> list[list[int]]:
    """Row numbers of the groups whose scores are not all equal, groups by first appearance."""
    return [rows for rows in rows_by_group(groups) if not all_equal(scores, rows)]


def _best(scores: Sequence[float], rows: Sequence[int]) -> int:
    return max(rows, key=lambda row: (scores[row], -row))


def _worst(scores: Sequence[float], rows: Sequence[int]) -> int:
    return min(rows, key=lambda row: (scores[row], row))


def select(scores: Sequence[float], groups: Sequence[int], selection: Selection) -> Selected:
    """The rows that train. `scores`, `groups`: [B]. Ties go to the first row.

    all: every row. unequal: the rows of groups whose scores are not all equal (Yu et al. 2025,
    arXiv:2503.14476, section 3.2). best: the best row of every group (Dong et al. 2023,
    arXiv:2304.06767). best_worst: the best and the worst row of every group whose scores are not
    all equal (Guo et al. 2024, arXiv:2402.04792).
    """
    match selection:
        case Selection.all:
            return Selected(list(range(len(scores))), [])
        case Selection.unequal:
            return Selected([row for rows in unequal_groups(scores, groups) for row in rows], [])
        case Selection.best:
            return Selected([_best(scores, rows) for rows in rows_by_group(groups)], [])
        case Selection.best_worst:
            pairs = [
                (_best(scores, rows), _worst(scores, rows))
                for rows in unequal_groups(scores, groups)
            ]
            return Selected([row for pair in pairs for row in pair], pairs)
    raise ValueError(f"unknown selection {selection!r}")
