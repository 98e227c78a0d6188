"""What comes back from annotators, read and checked, source by source."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.labels.checking import Checked, Ledgers, Refused, check
from rlhf.labels.store import REFUSED_FILE
from rlhf.labels.targets import read_labels
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.labels")
_QUOTED = 3  # refused rows that a message quotes


@dataclass(slots=True)
class Source:
    """One file, or one project of a server: what it held."""

    name: str
    target: str  # the tool that it comes from
    sha256: str | None
    rows: int = 0
    refused: int = 0


@dataclass(slots=True)
class Incoming:
    """Everything that an import reads."""

    sources: list[Source] = field(default_factory=list)
    labels: list[Checked] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)


def read_incoming(
    paths: Iterable[Path],
    ledgers: Ledgers,
    annotator: str | None,
    *,
    record: Callable[[Path], str | None],
    alive: Callable[[], None],
) -> Incoming:
    """Read the files, and check each row against the ledgers.

    annotator: who made the labels that do not name anybody; record: takes a file into the manifest
    and returns its hash; alive: called after each row. Raises UserError for a file as a whole; rows
    that are no labels are `refused`.
    """
    incoming = Incoming()
    for path in paths:
        target, rows = read_labels(path)
        LOG.info("%s: read as %s", path, target.value)
        source = Source(str(path), target.value, record(path))
        for row in check(rows, ledgers, annotator):
            alive()
            source.rows += 1
            if isinstance(row, Refused):
                source.refused += 1
                incoming.refused.append(row)
            else:
                incoming.labels.append(row)
        incoming.sources.append(source)
    return incoming


def check_refused(refused: Sequence[Refused], allowed: int, labels_folder: Path) -> None:
    """Warn of refused rows. Raises UserError where there are more than `allowed`
    (``data.max_bad_rows``).
    """
    if not refused:
        return
    quoted = "\n".join(
        f"  {row.place}, task {row.task or '(no id)'}: {row.reason}" for row in refused[:_QUOTED]
    )
    if len(refused) > _QUOTED:
        quoted += f"\n  and {len(refused) - _QUOTED} more"
    if len(refused) > allowed:
        raise UserError(
            f"{len(refused)} rows are no labels of this export, more than "
            f"data.max_bad_rows={allowed}; nothing was imported.\n{quoted}\n"
            f"All of them, with what they held: {labels_folder / REFUSED_FILE}. Repair the file, "
            f"or allow them with data.max_bad_rows={len(refused)}."
        )
    LOG.warning("%d rows were refused (data.max_bad_rows=%d):\n%s", len(refused), allowed, quoted)
