"""What the log says of rows: what was not read as it stands, and what messages hold beside what
every stage reads.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from rlhf.data.messages import RECORD
from rlhf.process import distributed
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.data")


@dataclass(slots=True)
class Seen:
    """What rows hold beside what every stage reads, for the log: how many hold it, and where the
    first is.
    """

    counts: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, names: Iterable[str], place: str) -> None:
        """Count one row that holds `names`."""
        for name in names:
            count, first = self.counts.get(name, (0, place))
            self.counts[name] = (count + 1, first)

    def merge(self, other: "Seen") -> None:
        """Count what `other` counted."""
        for name, (count, first) in other.counts.items():
            mine, place = self.counts.get(name, (0, first))
            self.counts[name] = (mine + count, place)

    def told(self, name: str) -> str:
        """For messages."""
        count, first = self.counts[name]
        return f"{count} rows, the first {first}"


def refuse_pictures(keys: Seen, name: str, why: str) -> None:
    """Raises UserError where some row of `name` shows pictures, `why` being what can't take them,
    and what can.
    """
    if "images" in keys.counts:
        raise UserError(
            f"{name}: messages show pictures ({keys.told('images')}), but {why}, or leave those "
            "rows out."
        )


def tell(notes: Seen, name: str) -> None:
    """Warn of what was not read as it stands."""
    for what in notes.counts:
        LOG.warning("%s: %s (%s)", name, what, notes.told(what))


def tell_kept(keys: Seen, name: str) -> None:
    """Log which of `keys`, of messages that are written, nothing but a chat template may read."""
    for key in keys.counts:
        if key not in RECORD and key != "tools" and distributed.is_main():
            LOG.warning(
                "%s: messages hold the key %r (%s), which is kept: nothing but a chat template "
                "that names it reads it",
                name,
                key,
                keys.told(key),
            )
