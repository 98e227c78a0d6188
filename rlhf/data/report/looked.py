"""What detectors ask of single rows, found in one pass over parts of the rows that is shared out
among processes: a row is read once, and its words are parted once, however many ask.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, overload

from rlhf.data.prepare.items import Item
from rlhf.process import parallel
from rlhf.types import UserError

Found = TypeVar("Found")
Look = Callable[[list[Item]], Any]  # what a part of the rows gives; equal ones ask the same
PART = 256  # rows that a process looks at together


class Looked(Sequence[Item]):
    """Rows, with what some functions give for each part of them. `over` hands that out, once."""

    def __init__(self, items: Sequence[Item], looks: Sequence[Look]) -> None:
        self._items = items
        self._found: dict[Look, list[Any]] = {look: [] for look in looks}
        for results in parallel.over_parts(_All(looks), items, PART):
            for look, result in zip(looks, results, strict=True):
                self._found[look].append(result)

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        return self._items[index]

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    def take(self, look: Look) -> list[Any] | None:
        """What a function gave for the parts, in order, which is kept no longer; None where it was
        not asked.
        """
        return self._found.pop(look, None)


class _All:
    """All functions of one part; one that can't be asked here leaves its reason."""

    def __init__(self, looks: Sequence[Look]) -> None:
        self._looks = looks

    def __call__(self, items: list[Item]) -> list[Any]:
        return [_tried(look, items) for look in self._looks]


def _tried(look: Look, items: list[Item]) -> Any:
    try:
        return look(items)
    except UserError as error:
        return error


def over(look: Callable[[list[Item]], Found], items: Sequence[Item]) -> Iterator[Found]:
    """What a function gives for each part of the rows, in order. Raises what it raised."""
    known = items.take(look) if isinstance(items, Looked) else None
    if known is None:
        yield from parallel.over_parts(look, items, PART)
        return
    for found in known:
        if isinstance(found, UserError):
            raise found
        yield found


def by_row(
    look: Callable[[list[Item]], Sequence[tuple[int, Found]]], items: Sequence[Item]
) -> Iterator[tuple[int, Found]]:
    """(row, what was found in it) for a function that gives such places in its part."""
    start = 0
    for found in over(look, items):
        for number, what in found:
            yield start + number, what
        start += PART
