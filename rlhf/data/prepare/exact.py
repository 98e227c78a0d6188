"""Step exact_duplicates: one row a text, for more rows than a Python set could hold."""

import hashlib
from array import array
from collections.abc import Iterator
from typing import Any

from conf.preparation.duplicates import ExactDuplicates
from rlhf.data.formats import Use
from rlhf.data.prepare.items import Context, Item
from rlhf.data.prepare.texts import asked_about, normalised, sides

_SHARDS = 256
_FIRST = 64  # slots of an empty shard
_FULL = 0.75  # share of the slots in use before a shard grows
_GROWTH = 1.5


class HashTable:
    """128-bit keys with a number each, in arrays of machine words: 24 bytes a slot.

    Open addressing with linear probing (Knuth, The Art of Computer Programming 3, 6.4). 256 shards
    grow one at a time, so that growing never holds two copies of the whole.
    """

    def __init__(self) -> None:
        self._high = [array("Q", bytes(8 * _FIRST)) for _ in range(_SHARDS)]
        self._low = [array("Q", bytes(8 * _FIRST)) for _ in range(_SHARDS)]
        self._value = [array("Q", bytes(8 * _FIRST)) for _ in range(_SHARDS)]  # 0: the slot is free
        self._used = [0] * _SHARDS

    def __len__(self) -> int:
        return sum(self._used)

    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(24 * len(values) for values in self._value)

    def add(self, high: int, low: int, value: int) -> int | None:
        """Store `value` (above 0) under a new key and return None; for a known key return the value
        that it has.
        """
        shard = high & (_SHARDS - 1)
        highs, lows, values = self._high[shard], self._low[shard], self._value[shard]
        slots = len(values)
        at = low % slots
        while values[at]:
            if lows[at] == low and highs[at] == high:
                return values[at]
            at = at + 1 if at + 1 < slots else 0
        highs[at], lows[at], values[at] = high, low, value
        self._used[shard] += 1
        if self._used[shard] > _FULL * slots:
            self._grow(shard)
        return None

    def _grow(self, shard: int) -> None:
        old = zip(self._high[shard], self._low[shard], self._value[shard], strict=True)
        slots = int(len(self._value[shard]) * _GROWTH) | 1
        highs, lows, values = (array("Q", bytes(8 * slots)) for _ in range(3))
        for high, low, value in old:
            if value:
                at = low % slots
                while values[at]:
                    at = at + 1 if at + 1 < slots else 0
                highs[at], lows[at], values[at] = high, low, value
        self._high[shard], self._low[shard], self._value[shard] = highs, lows, values


_ROW_BITS = 48


class Seen:
    """The texts that came before, and where each came first: file and row number."""

    def __init__(self) -> None:
        self._table = HashTable()
        self._origins: dict[str, int] = {}
        self._names: list[str] = []

    def first(self, key: bytes, origin: str, number: int) -> tuple[str, int] | None:
        """Where a text came first, or None for a new one. key: `key_of` it; equal ones count as
        equal texts.
        """
        if origin not in self._origins:
            self._origins[origin] = len(self._names)
            self._names.append(origin)
        value = (self._origins[origin] << _ROW_BITS | number) + 1  # 0 is a free slot
        index = self._table.add(
            int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little"), value
        )
        if index is None:
            return None
        return self._names[(index - 1) >> _ROW_BITS], (index - 1) & ((1 << _ROW_BITS) - 1)


def key_of(text: str) -> bytes:
    """128 bits of a text (BLAKE2b)."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def row_key(options: ExactDuplicates, columns: dict[str, Any], kind: Use) -> bytes:
    """Equal for rows of the same text, and of the same pictures where what is asked counts."""
    good, bad = sides(columns, options.part, kind)
    if options.normalise:
        good, bad = normalised(good), normalised(bad)
    return key_of("\0".join((good, bad, *asked_about(columns, options.part))))


def exact_duplicates(
    options: ExactDuplicates, items: Iterator[Item], context: Context
) -> Iterator[Item]:
    """Keep the first row of each text."""
    seen = Seen()
    for item in items:
        key, item.key = item.key, None
        if key is None:
            key = row_key(options, item.columns, context.kind)
        first = seen.first(key, item.origin, item.number)
        if first is None:
            yield item
        else:
            context.rejected(item, f"the same text as {first[0]}, row {first[1]}")
