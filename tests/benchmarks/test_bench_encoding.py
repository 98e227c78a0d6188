"""The benchmark of encoding measures what it says, on a few rows."""

from pathlib import Path

import pytest

from benchmarks import encoding

pytestmark = pytest.mark.benchmarks


@pytest.mark.parametrize("kind", encoding.KINDS)
def test_both_ways_encode_the_same_rows(tmp_path: Path, kind: str) -> None:
    ours = encoding.measured("ours", kind, 12, tmp_path)
    peer = encoding.measured("map", kind, 12, tmp_path)
    assert ours.rows == peer.rows == 12
    # the template's newline behind the last turn is no token of ours
    assert ours.tokens == pytest.approx(peer.tokens, abs=1.5)
    assert ours.cpu_s > 0 and peer.cpu_s > 0
    assert 0 < ours.peak_gib < 8 and ours.encode_s > 0 and ours.again_s is not None
