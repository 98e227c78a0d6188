"""The pictures that rows name, or hold as bytes: found, opened, measured and hashed while the rows
are read, so that every `Picture` is a file that was there and whole.

    a path            inside of the folder of the data file, or of data.image_dir; also file:
    data:...;base64,  written once into a folder, under the hash of its bytes
    bytes             the same: {"bytes", "path"} as datasets has them

Symbolic links are followed before it is asked whether a path is inside. An address (http: and the
like) is never fetched. What a picture's file may be stands in rlhf/process/pixels.py.
"""

import base64
import binascii
import hashlib
import io
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from rlhf.data.calls import is_nothing
from rlhf.process.files import folder_until_exit
from rlhf.process.pixels import FORMATS, Measured, PictureError, measure
from rlhf.process.wording import describe
from rlhf.types import Picture, RowError

STORE = ".images"  # in run.dir
_MOST_BYTES = 2**30  # of a picture's file
_KNOWN = 2**17  # pictures whose measures are remembered
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//.*)?")
_CLAIMS = ("sha256", "width", "height")  # what a row of ours says of its picture


@dataclass(frozen=True, slots=True)
class Pictures:
    """Where the pictures of a file's rows may be, and where their bytes go."""

    folder: Path | None  # None: rows of a hub, which have no files beside them
    most: int  # pixels
    store: Path | None = None  # None: a temporary folder, which this process removes

    def of(self, given: Any, name: str) -> Picture:
        """The picture that a row gives, `name` for messages. Raises RowError."""
        if isinstance(given, Mapping):
            return self._of_object(given, name)
        if isinstance(given, (bytes, bytearray)):
            return self._of_bytes(bytes(given), name)
        if isinstance(given, str):
            return self._of_text(given, name)
        raise RowError(
            f"{name}: expected a path, data:image/...;base64,... or an object with bytes or a "
            f"path, found {describe(given)}"
        )

    def _of_object(self, given: Mapping[Any, Any], name: str) -> Picture:
        held = {str(key): value for key, value in given.items() if not is_nothing(value)}
        if held.get("detail") == "auto":  # OpenAI's: the model's own size
            del held["detail"]
        sources = [key for key in ("bytes", "base64", "url", "path") if key in held]
        others = held.keys() - {*sources, *_CLAIMS}
        if not sources or others:
            found = ", ".join(map(repr, held)) or "nothing"
            raise RowError(
                f"{name}: expected an object with bytes, base64, url or path, found {found}"
            )
        source = held[sources[0]]
        if sources[0] == "bytes":
            if not isinstance(source, (bytes, bytearray)):
                raise RowError(f"{name}: expected bytes, found {describe(source)}")
            found_picture = self._of_bytes(bytes(source), name)
        elif not isinstance(source, str):
            raise RowError(f"{name}: expected {sources[0]} as text, found {describe(source)}")
        elif sources[0] == "base64":
            found_picture = self._of_base64(source, name)
        elif sources[0] == "url":
            found_picture = self._of_text(source, name)
        else:
            found_picture = self._of_path(source, name)
        _check_claims(held, found_picture, name)
        return found_picture

    def _of_text(self, text: str, name: str) -> Picture:
        if text[:5].lower() == "data:":
            head, comma, body = text.partition(",")
            if not comma or not head.lower().endswith(";base64"):
                raise RowError(
                    f"{name}: expected data:image/...;base64,..., found {describe(text)}"
                )
            return self._of_base64(body, name)
        if text[:5].lower() == "file:":
            return self._of_path(_path_of(text, name), name)
        address = _ADDRESS.fullmatch(text[:200].partition("\n")[0])
        if address is not None and address[2] is not None:
            raise RowError(
                f"{name}: expected a file of this machine, found an address ({text[:60]!r}): "
                f"nothing is fetched. Download the pictures, and name their files"
            )
        return self._of_path(text, name)

    def _of_base64(self, text: str, name: str) -> Picture:
        try:
            data = base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise RowError(f"{name}: expected base64, found {describe(text)} ({error})") from None
        return self._of_bytes(data, name)

    def _of_bytes(self, data: bytes, name: str) -> Picture:
        if not data:
            raise RowError(f"{name}: expected a picture's bytes, found none")
        digest = hashlib.sha256(data).hexdigest()
        measured = _measured(data, name, self.most)
        folder = _temporary() if self.store is None else self.store
        path = folder.absolute() / f"{digest}.{FORMATS[measured.format]}"
        write_once(path, data)
        return Picture(path=str(path), sha256=digest, width=measured.width, height=measured.height)

    def _of_path(self, path: str, name: str) -> Picture:
        file, size, changed, number = self._found(path, name)
        try:
            digest, measured = _looked_at(str(file), size, changed, number, self.most)
        except PictureError as error:
            raise RowError(f"{name}, {describe(path)}: {error}") from None
        except OSError as error:
            raise RowError(
                f"{name}, {describe(path)}: it can't be read ({error.strerror})"
            ) from None
        return Picture(path=str(file), sha256=digest, width=measured.width, height=measured.height)

    def _found(self, path: str, name: str) -> tuple[Path, int, int, int]:
        """The file of `path`, its size, when it changed, and its number. Raises RowError."""
        if self.folder is None:
            raise RowError(
                f"{name}: a hub's rows have no files beside them, found the path "
                f"{describe(path)}. Set data.image_dir to the folder of the pictures"
            )
        inside = f"inside of {self.folder}"
        try:
            root = _resolved(self.folder)
            file = (root / path).resolve()
            if not file.is_relative_to(root):
                raise RowError(
                    f"{name}: expected a file {inside}, found {describe(path)}, which is "
                    f"outside of it. data.image_dir names another folder"
                )
            if not file.exists():
                raise RowError(f"{name}: no such file {inside}: {describe(path)}")
            if not file.is_file():
                raise RowError(f"{name}: expected a file, found another kind: {describe(path)}")
            about = file.stat()
        # a name that is too long or has a null in it, links in a circle, a forbidden folder
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, RowError):
                raise
            raise RowError(f"{name}: no path of a file {inside}: {describe(path)}") from None
        return file, about.st_size, about.st_mtime_ns, about.st_ino


@cache
def _resolved(folder: Path) -> Path:
    return folder.resolve()


def _path_of(address: str, name: str) -> str:
    """The path of a file: address. Raises RowError for one of another machine."""
    try:
        parts = urlsplit(address)
    except ValueError:
        parts = None
    if parts is None or parts.netloc not in ("", "localhost") or not parts.path:
        raise RowError(f"{name}: expected file:///path, found {describe(address)}")
    return unquote(parts.path)


def _measured(data: bytes, name: str, most: int) -> Measured:
    try:
        return measure(io.BytesIO(data), most)
    except PictureError as error:
        raise RowError(f"{name}, {len(data):,} bytes: {error}") from None


@lru_cache(_KNOWN)
def _looked_at(path: str, size: int, changed: int, number: int, most: int) -> tuple[str, Measured]:
    """The hash and the measures of a file, remembered for as long as size, time and number of the
    file are the same. Raises PictureError and OSError.
    """
    if size > _MOST_BYTES:
        raise PictureError(f"it has {size:,} bytes, more than any picture that is read")
    data = Path(path).read_bytes()
    if not data:
        raise PictureError("it is empty (0 bytes)")
    return hashlib.sha256(data).hexdigest(), measure(io.BytesIO(data), most)


def _check_claims(held: Mapping[str, Any], found: Picture, name: str) -> None:
    """Raises RowError where a row says something else of its picture than what was found."""
    real: Mapping[str, Any] = found
    for key in _CLAIMS:
        if key in held and held[key] != real[key]:
            raise RowError(
                f"{name}: expected {key} {held[key]!r} as the row says, found {real[key]!r}: the "
                f"file {found['path']} is another than when the row was written"
            )


# ---- bytes ----


def write_once(path: Path, data: bytes) -> None:
    """Write a file whose name says what is in it, unless it is there. It appears whole."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    with os.fdopen(handle, "wb") as out:
        out.write(data)
    Path(beside).chmod(0o644)
    os.replace(beside, path)


@cache
def _temporary() -> Path:
    return folder_until_exit("images")
