"""What was read of a file, kept until the file is another."""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

Value = TypeVar("Value")
# A file that was written so lately may be written again without another time of change.
_SETTLED_S = 2.0


class FileCache(Generic[Value]):
    """The values that `read` makes of files, of the `most` that were asked for last."""

    def __init__(self, read: Callable[[Path], Value], most: int) -> None:
        self._read, self._most = read, most
        self._held: OrderedDict[Path, tuple[tuple[int, int, int], Value]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path) -> Value | None:
        """The value of the file as it is now; None where there is none."""
        try:
            found = os.stat(path)
        except OSError:
            return None
        mark = (found.st_mtime_ns, found.st_size, found.st_ino)
        with self._lock:
            held = self._held.get(path)
        settled = time.time() - found.st_mtime > _SETTLED_S
        if held is not None and held[0] == mark and settled:
            return held[1]
        value = self._read(path)
        with self._lock:
            self._held[path] = (mark, value)
            self._held.move_to_end(path)
            while len(self._held) > self._most:
                self._held.popitem(last=False)
        return value
