"""A file is read again when it is another, and not when it isn't."""

import os
import time
from pathlib import Path

from rlhf.board.runs.cache import FileCache


def test_a_file_is_read_when_it_changed(tmp_path: Path) -> None:
    reads: list[Path] = []

    def read(path: Path) -> str:
        reads.append(path)
        return path.read_text()

    cache = FileCache(read, most=2)
    path = tmp_path / "a"
    assert cache.get(path) is None
    path.write_text("one")
    assert cache.get(path) == "one"
    path.write_text("two")  # as long, and perhaps at the same moment by the file system's clock
    assert cache.get(path) == "two"
    past = time.time() - 60
    os.utime(path, (past, past))
    assert cache.get(path) == "two"
    before = len(reads)
    assert cache.get(path) == "two" and len(reads) == before
    for name in ("b", "c"):
        (tmp_path / name).write_text(name)
        cache.get(tmp_path / name)
    os.utime(path, (past, past))
    cache.get(path)
    assert len(reads) == before + 3, "only the last two are kept"
