"""The exports that a labels directory has labels of: a copy of each ledger in exports/<id>, so
that the directory needs no other.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from rlhf.labels.checking import Ledgers
from rlhf.labels.ledger import EXPORT_FILE, TASKS_FILE, read_export
from rlhf.labels.records import Export
from rlhf.process.files import sha256
from rlhf.types import UserError

FOLDER = "exports"


def paths(labels_folder: Path) -> dict[str, Path]:
    """The folders of the copies by export id."""
    folders = sorted((labels_folder / FOLDER).glob("*"))
    return {path.name: path for path in folders if path.is_dir() and not path.name.startswith(".")}


def copy(labels_folder: Path, source: Path) -> Export:
    """Copy the ledger of the export in the folder `source`; a copy that exists is kept.

    Raises UserError where the export can't be read, or where it differs from the copy that labels
    were checked against.
    """
    export = read_export(source)
    target = labels_folder / FOLDER / export.id
    if target.is_dir():
        if sha256(target / TASKS_FILE) != sha256(source / TASKS_FILE):
            raise UserError(
                f"{source} and {target} both hold export {export.id}, but their {TASKS_FILE} "
                "differ: restore the one that went out."
            )
        return export
    temporary = labels_folder / FOLDER / f".{export.id}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed import left
    temporary.mkdir(parents=True)
    for name in (TASKS_FILE, EXPORT_FILE):
        shutil.copyfile(source / name, temporary / name)
    temporary.rename(target)
    return export


def read(folders: Mapping[str, Path]) -> Ledgers:
    """The ledgers of the exports in `folders`, which `paths` lists. Raises UserError where a copy
    was changed.
    """
    exports = {}
    for name, folder in folders.items():
        export = read_export(folder)
        if export.id != name:
            raise UserError(
                f"{folder} holds export {export.id}: expected {name}. Nothing but imports may "
                "write there."
            )
        exports[name] = export
    return Ledgers(exports)
