"""What is kept, as rows for training; and a user's deletion while no gateway runs."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf.gateway import keeping, rows
from rlhf.gateway.clean import Cleaner
from rlhf.gateway.rows import Rows
from rlhf.gateway.split import load_key, pseudonym
from rlhf.gateway.store import FILE, Store


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    rows: Rows
    files: Mapping[str, Path]
    said: int  # feedback with consent
    removed_before: Counter[str]  # personal data, before it was kept
    removed_now: Counter[str]  # what is found now, such as names that are listed since


def export(file: Path, folder: Path, names: str | None) -> Exported:
    """Write rows into `folder`. `names`: a file of names to remove. Raises UserError."""
    cleaner = Cleaner.of(names)
    store = Store(file)
    try:
        said = store.read(keeping.consented)
    finally:
        store.close()
    made = rows.rows_of(said)
    now: Counter[str] = Counter()
    for name, listed in made.files.items():
        made.files[name] = [cleaner.clean(row, "", now) for row in listed]
    removed = keeping.removed_counts(said)
    return Exported(made, rows.write(made, folder), len(said), removed, now)


def table(found: Exported) -> list[dict[str, str]]:
    """A line for each file."""
    uses = {rows.KTO: "stage=kto", rows.PAIRS: "stage=dpo, reward", rows.SFT: "stage=sft"}
    return [
        {"file": str(path), "rows": str(len(found.rows.files[name])), "for": uses[name]}
        for name, path in found.files.items()
    ]


def told(found: Exported) -> list[str]:
    """What became of the rest, a line each."""
    lines = [f"{found.said} pieces of feedback with consent"]
    for reason, count in sorted(found.rows.left.items()):
        first = found.rows.first[reason]
        lines.append(f"no row: {count} ({reason}; the first is feedback {first})")
    for when, counts in (("before", found.removed_before), ("now", found.removed_now)):
        finds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        lines.append(f"personal data removed {when}: {finds or 'none'}")
    return lines


def forget(folder: Path, user: str) -> dict[str, int]:
    """Delete all that is kept of a user; rows of each table. Raises UserError."""
    key = load_key(folder)
    store = Store(folder / FILE)
    try:
        name = pseudonym(key, user)
        return store.submit(lambda db: keeping.forget(db, name), wipe=True).result()
    finally:
        store.close()
