"""Files: their hashes, and JSON files of one object, which are read with a helpful error and
written whole or not at all; locks between processes; and folders that end with their process.
"""

import atexit
import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlhf.types import UserError

LOG = logging.getLogger("rlhf.process")
_SAMPLE = 2**20  # bytes
_LOCK_S = 0.5
_OWNER = ".owner"  # the file that the process of a folder has locked


def sha256(path: Path) -> str:
    """The hash of a file's bytes, hexadecimal."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def fingerprint(files: Sequence[Path]) -> str | None:
    """16 hexadecimal digits that change when a model's files do; None for no files.

    Of a large file its size and both ends count, since weights of many GiB take minutes to read.
    """
    if not files:
        return None
    whole = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        whole.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as source:
            whole.update(source.read(_SAMPLE))
            if size > _SAMPLE:
                source.seek(max(_SAMPLE, size - _SAMPLE))
                whole.update(source.read(_SAMPLE))
    return whole.hexdigest()[:16]


def _unix_line_ends(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\r\n", "\n").replace("\r", "\n")
    if isinstance(value, Mapping):
        return {_unix_line_ends(key): _unix_line_ends(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_unix_line_ends(inner) for inner in value]
    return value


def digest(value: Any) -> str:
    """16 hexadecimal digits of a JSON value's content.

    Line ends don't count, since spreadsheets and browsers change them.
    """
    text = json.dumps(_unix_line_ends(value), ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def json_object(path: Path, consequence: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises UserError where there is none; the message ends with `consequence`, what follows from
    that it can't be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg}), so {consequence}."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} can't be read ({type(error).__name__}: {error}), so {consequence}."
        ) from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"{path}: expected an object, found {kind}, so {consequence}.")
    return content


def json_value(value: Any) -> Any:
    """`value` as JSON can hold it.

    NaN and infinities become None, numpy and tensor scalars numbers, keys texts.
    """
    if isinstance(value, Mapping):
        return {str(key): json_value(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(inner) for inner in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write beside `path` and rename, so that a reader never sees half a file."""
    beside = path.with_name(path.name + ".tmp")
    text = json.dumps(json_value(content), indent=2, ensure_ascii=False)
    beside.write_text(text + "\n", encoding="utf-8")
    os.replace(beside, path)


@contextmanager
def exclusive(path: Path, waiting: Callable[[], None]) -> Iterator[bool]:
    """Hold the lock of the file `path`, which no two processes hold at a time and which ends with
    its process, however that ends. `waiting` is called every half second that another holds it.

    Yields whether it is held: False on a file system without locks. Raises OSError for a path that
    can't be written.
    """
    with path.open("ab") as file:
        held = _lock(file)
        if held is False:
            LOG.info("%s: another process is at it, and is waited for", path)
        while held is False:
            waiting()
            time.sleep(_LOCK_S)
            held = _lock(file)
        yield held is not None


def _lock(file: Any) -> bool | None:
    """Whether the file's lock was free, and is now held; None where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        LOG.warning("%s can't be locked (%s): other processes are not waited for", file.name, error)
        return None
    return True


# ---- folders that end with their process ----


def memory_folder() -> Path | None:
    """A folder whose files are memory, where there is one."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else None


class OwnFolder:
    """A folder for files that are of use while this process lives. It ends with this object or
    process; a process that is killed leaves it, and `delete_orphans` deletes it then, which the
    next one in the same place calls.
    """

    def __init__(self, kind: str, place: Path | None = None) -> None:
        """`kind`: what its files are, a part of its name. `place`: None: the system's folder for
        temporary files. Raises OSError.
        """
        place = Path(tempfile.gettempdir()) if place is None else place
        place.mkdir(parents=True, exist_ok=True)
        delete_orphans(place)
        # under another name until it is locked, so that nobody takes it for an orphan
        made = Path(tempfile.mkdtemp(prefix=f".rlhf-{kind}-", dir=place))
        file = (made / _OWNER).open("wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # a file system without locks: no other process can tell whose it is
            (made / _OWNER).unlink()
        self.path = made.rename(place / made.name.removeprefix("."))
        self._end = weakref.finalize(self, _delete, self.path, file)

    def close(self) -> None:
        """Delete it."""
        self._end()


def _delete(folder: Path, owner: Any) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    owner.close()


def delete_orphans(place: Path) -> None:
    """Delete the folders in `place` whose processes have ended: nobody holds their locks."""
    for owner in place.glob(f"rlhf-*/{_OWNER}"):
        with suppress(OSError), owner.open("r+b") as file:  # someone else's, or in use
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(owner.parent, ignore_errors=True)


def folder_until_exit(kind: str) -> Path:
    """A temporary folder for files of `kind`, a part of its name. It is deleted when the process
    that asked for it ends, and not with one that is forked from it.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"rlhf-{kind}-"))
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder
