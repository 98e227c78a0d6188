"""Answers of the last minutes with their texts, in memory alone: a user may consent later."""

import time
from collections import OrderedDict

from rlhf.gateway.records import Answered

_MOST_CHARACTERS = 64 << 20


class Recent:
    """Answers by their ids; the oldest go when they are too old, or together too long."""

    def __init__(self, minutes: float, most: int = _MOST_CHARACTERS) -> None:
        self._seconds, self._most = 60 * minutes, most
        self._kept: OrderedDict[str, tuple[float, int, Answered]] = OrderedDict()
        self._size = 0

    def add(self, answered: Answered) -> None:
        """Keep an answer."""
        size = len(str(answered.messages)) + len(str(answered.choices))
        self._kept[answered.id] = (time.monotonic(), size, answered)
        self._size += size
        self._shrink()

    def get(self, name: str) -> Answered | None:
        """An answer that is still here."""
        self._shrink()
        found = self._kept.get(name)
        return None if found is None else found[2]

    def forget(self, user: str) -> None:
        """Drop the answers of a user."""
        for name in [name for name, kept in self._kept.items() if kept[2].user == user]:
            self._size -= self._kept.pop(name)[1]

    def _shrink(self) -> None:
        oldest = time.monotonic() - self._seconds
        while self._kept:
            added, size, _ = next(iter(self._kept.values()))
            if added >= oldest and self._size <= self._most:
                return
            self._kept.popitem(last=False)
            self._size -= size
