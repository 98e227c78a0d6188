"""What the gateway adds to a request."""

from pathlib import Path

from benchmarks import gateway


def test_the_added_latency(tmp_path: Path) -> None:
    direct, through = gateway.measure(tmp_path, 60)
    assert 0 < direct < through
    assert through - direct < gateway.MOST_MS
