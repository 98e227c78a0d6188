"""The files of a version, and whether they are still what was registered."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from rlhf.models.directories import fingerprint
from rlhf.process.files import sha256
from rlhf.registry.records import Draft, ModelFile
from rlhf.types import UserError

_SHOWN = 5  # changed files that a message names


def listed(directory: Path) -> tuple[ModelFile, ...]:
    """Every file below a directory, by path. Raises UserError where there is none."""
    out = []
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            inside = path.relative_to(directory).as_posix()
            out.append(ModelFile(inside, sha256(path), path.stat().st_size))
    if not out:
        raise UserError(f"{directory} holds no files: expected a model's directory.")
    return tuple(out)


def digest_of(files: Sequence[ModelFile]) -> str:
    """sha256 over the paths and hashes of all files, hexadecimal."""
    rows = [[file.path, file.sha256] for file in sorted(files, key=lambda file: file.path)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def changes(draft: Draft) -> list[str]:
    """What is no longer as it was registered, a sentence each; empty where all is."""
    folder = Path(draft.path)
    if not folder.is_dir():
        return [f"{folder} is gone"]
    out = []
    known = {file.path for file in draft.files}
    for file in draft.files:
        path = folder / file.path
        if not path.is_file():
            out.append(f"{file.path} is gone")
        elif path.stat().st_size != file.bytes or sha256(path) != file.sha256:
            out.append(f"{file.path} was changed")
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).as_posix()
        if path.is_file() and inside not in known:
            out.append(f"{inside} is new")
    base = draft.lineage.get("base")
    if base is not None and fingerprint(base["path"]) != base["weights"]:
        out.append(f"its base {base['path']} was changed or is gone")
    return out


def check_unchanged(draft: Draft, label: str) -> None:
    """Raises UserError that names the files which are no longer as they were registered."""
    found = changes(draft)
    if found:
        more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise UserError(
            f"{label}: the files in {draft.path} are not those that were registered: "
            f"{'; '.join(found[:_SHOWN])}{more}. Restore them, or register what is there now as a "
            "new version."
        )
