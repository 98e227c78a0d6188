"""The exports that a labels directory has labels of: a copy of each ledger under exports/<id>, so
that the directory stands by itself.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from rlhf.labels.checking import Ledgers
from rlhf.labels.ledger import EXPORT_FILE, TASKS_FILE, read_export
from rlhf.labels.records import Export
from rlhf.process.hashing import sha256
from rlhf.types import UserError

FOLDER = "exports"


def places(folder: Path) -> dict[str, Path]:
    """The copies by export id."""
    return {
        path.name: path
        for path in sorted((folder / FOLDER).glob("*"))
        if not path.name.startswith(".") and path.is_dir()
    }


def take(folder: Path, source: Path) -> Export:
    """Copy an export's ledger. Raises UserError where it can't be read, or differs from the one of
    that id that labels were checked against.
    """
    export = read_export(source)
    place = folder / FOLDER / export.id
    if place.is_dir():
        if sha256(place / TASKS_FILE) != sha256(source / TASKS_FILE):
            raise UserError(
                f"{source} and {place} both hold export {export.id}, but their {TASKS_FILE} "
                "differ: restore the one that went out."
            )
        return export
    beside = folder / FOLDER / f".{export.id}.tmp"
    shutil.rmtree(beside, ignore_errors=True)  # what a killed import left
    beside.mkdir(parents=True)
    for name in (TASKS_FILE, EXPORT_FILE):
        shutil.copyfile(source / name, beside / name)
    beside.rename(place)
    return export


def ledgers(known: Mapping[str, Path]) -> Ledgers:
    """Raises UserError where a copy was changed."""
    found = {}
    for name, place in known.items():
        export = read_export(place)
        if export.id != name:
            raise UserError(
                f"{place} holds export {export.id}: expected {name}. Nothing but imports may "
                "write there."
            )
        found[name] = export
    return Ledgers(found)
