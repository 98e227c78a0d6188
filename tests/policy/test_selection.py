"""Which responses of a step train."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.choices import Selection
from policy.advantages import select

SCORES, GROUPS = [1.0, 5.0, 3.0, 2.0, 2.0, 2.0, 0.0, 9.0], [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("selection", "rows", "pairs"),
    [
        (Selection.all, list(range(8)), []),
        (Selection.unequal, [0, 1, 2, 6, 7], []),
        (Selection.best, [1, 3, 7], []),  # the first of equals
        (Selection.best_worst, [1, 0, 7, 6], [(1, 0), (7, 6)]),  # a group of equals makes no pair
    ],
)
def test_hand_computed(selection: Selection, rows: list[int], pairs: list[tuple[int, int]]) -> None:
    found = select(SCORES, GROUPS, selection)
    assert (found.rows, found.pairs) == (rows, pairs)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=30))
def test_selections_agree_with_each_other(drawn: list[tuple[int, int]]) -> None:
    groups, scores = [group for group, _ in drawn], [float(score) for _, score in drawn]
    unequal = {groups[row] for row in select(scores, groups, Selection.unequal).rows}
    paired = select(scores, groups, Selection.best_worst)
    assert {groups[row] for row in paired.rows} == unequal
    assert all(
        scores[better] > scores[worst] and groups[better] == groups[worst]
        for better, worst in paired.pairs
    )
    best = select(scores, groups, Selection.best).rows
    assert sorted(groups[row] for row in best) == sorted(set(groups))
    assert {better for better, _ in paired.pairs} <= set(best)
