"""The harness that measures the board, with few runs and one start."""

from pathlib import Path

import pytest

from benchmarks.board import AIMS, furnish, measure

pytestmark = pytest.mark.benchmarks


def test_it_measures_what_it_has_aims_for(tmp_path: Path) -> None:
    furnish(tmp_path, 2, 3)
    figures = measure(tmp_path, 1)
    assert figures.keys() == AIMS.keys()
    assert all(figure > 0 for figure in figures.values())
    assert figures["memory_mib"] > 20
