"""The shape in which parts of an evaluation reach their report."""

import pytest

from eval.sections import Table, with_interval


def test_a_table_has_a_cell_for_each_column() -> None:
    rows = [{"policy": "base", "exact": "0.10"}, {"policy": "mine", "exact": "0.40"}]
    table = Table.of("Sums", rows)
    assert table == Table("Sums", ("policy", "exact"), (("base", "0.10"), ("mine", "0.40")))
    with pytest.raises(ValueError, match=r"'Sums', row 2.*\['policy', 'exact'\].*\['policy'\]"):
        Table.of("Sums", [rows[0], {"policy": "mine"}])
    with pytest.raises(ValueError, match=r"'Sums', row 1: expected 2 cells, found 1"):
        Table("Sums", ("policy", "exact"), (("base",),))


def test_zero_has_no_sign() -> None:
    assert with_interval(-0.0001, -0.25, 0.1) == "0.000 [-0.250, 0.100]"
