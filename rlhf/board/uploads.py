"""Files that a browser sends: streamed to the disk, bounded, under safe names, over nothing else.

A file lies in the uploads folder under its name; while it comes it has another, in .incoming.
"""

import contextlib
import os
import secrets
import unicodedata
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from rlhf.data.opening import COMPRESSED, kind_of

TOGETHER = 16  # times the largest file: what all uploads together may have
_INCOMING = ".incoming"
_LONGEST_NAME = 80  # characters; file systems take 255 bytes
_FIELD = "file"


class Refused(Exception):
    """An upload that is not taken: the status of the answer, the key of its words and what fills
    them.
    """

    def __init__(self, status: int, key: str, **values: Any) -> None:
        super().__init__(key)
        self.status, self.key, self.values = status, key, values


def safe_name(given: str) -> str:
    """A plain file name of letters, digits and ``._-`` with an ending that is read. Raises Refused
    for a name without such an ending.
    """
    last = unicodedata.normalize("NFC", given).replace("\\", "/").rsplit("/", 1)[-1]
    kept = "".join(c if c.isalnum() or c in "._-" else "_" for c in last)
    name = kept.rstrip("._-")
    if not kind_of(name):
        raise Refused(415, "data.refused.kind")
    endings = Path(name).suffixes[-2:]
    if endings[-1].lower() not in COMPRESSED:
        endings = endings[-1:]
    ending = "".join(endings)
    stem = name.removesuffix(ending)[: _LONGEST_NAME - len(ending)].strip("._-")
    return (stem or "rows") + ending


def used(folder: Path) -> int:
    """Bytes of all uploads, those that are coming too."""
    total = 0
    for path in (*folder.glob("*"), *(folder / _INCOMING).glob("*")):
        with contextlib.suppress(FileNotFoundError):  # deleted in between
            if path.is_file() and not path.is_symlink():
                total += path.stat().st_size
    return total


class Room:
    """How many bytes may come still."""

    def __init__(self, folder: Path, largest: int) -> None:
        """largest: bytes of one file."""
        self._folder, self._largest = folder, largest
        self._left = min(largest, max(0, TOGETHER * largest - used(folder)))
        self._taken = 0

    def take(self, count: int) -> None:
        """Raises Refused where so many bytes have no room."""
        self._taken += count
        if self._taken <= self._left:
            return
        if self._taken > self._largest:
            raise Refused(413, "data.refused.large", most=self._largest >> 20)
        raise Refused(413, "data.refused.full", most=TOGETHER * self._largest >> 20)


def _publish(part: Path, folder: Path, name: str) -> Path:
    """Move the file to its name, or to name-2 and so on where there is one already."""
    ending = "".join(Path(name).suffixes)
    stem = name.removesuffix(ending)
    number = 1
    while True:
        target = folder / (name if number == 1 else f"{stem}-{number}{ending}")
        try:
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            number += 1
            continue
        part.replace(target)
        return target


class _Parts:
    """What a multipart parser tells: the first part named "file" goes to `write`."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self.name: str | None = None  # of the file
        self.ended = False  # the closing boundary was read
        self.done = False  # the file's own part ended
        self._write = write
        self._inside = False
        self._field, self._value = b"", b""
        self._disposition = b""

    def callbacks(self) -> dict[str, Any]:
        """For python_multipart's parser."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._close,
        }

    def _begin(self) -> None:
        self._field = self._value = self._disposition = b""
        self._inside = False

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field = self._value = b""

    def _headers(self) -> None:
        from python_multipart.multipart import parse_options_header

        _, options = parse_options_header(self._disposition)
        named = options.get(b"name", b"").decode("utf-8", "replace")
        if named == _FIELD and b"filename" in options and self.name is None:
            self.name = options[b"filename"].decode("utf-8", "replace")
            self._inside = True

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._inside:
            self._write(data[start:end])

    def _end(self) -> None:
        self.done = self.done or self._inside
        self._inside = False

    def _close(self) -> None:
        self.ended = True


async def receive(
    content_type: str, stream: AsyncIterator[bytes], folder: Path, largest: int
) -> Path:
    """The file of a form's field "file" in `folder`. content_type: the request's header; largest:
    bytes of a file. Raises Refused; nothing stays of what is refused, or of a torn request.
    """
    incoming = folder / _INCOMING
    incoming.mkdir(parents=True, exist_ok=True)
    room = Room(folder, largest)
    part = incoming / secrets.token_hex(8)
    try:
        with part.open("xb") as out:
            name = await _parse(content_type, stream, room, out.write)
        if part.stat().st_size == 0:
            raise Refused(400, "data.refused.empty")
        return _publish(part, folder, safe_name(name))
    finally:
        part.unlink(missing_ok=True)


async def _parse(
    content_type: str, stream: AsyncIterator[bytes], room: Room, write: Callable[[bytes], Any]
) -> str:
    """Write the file's bytes; its name as the browser gave it. Raises Refused."""
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser, parse_options_header

    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise Refused(400, "data.refused.form")
    parts = _Parts(write)
    try:
        parser = MultipartParser(boundary, parts.callbacks())  # type: ignore[arg-type]
        async for chunk in stream:
            room.take(len(chunk))
            parser.write(chunk)
            if parts.name is not None:
                safe_name(parts.name)  # before the rest of it comes
        parser.finalize()
    except (FormParserError, ValueError) as error:
        raise Refused(400, "data.refused.torn") from error
    if not parts.ended:
        raise Refused(400, "data.refused.torn")
    if parts.name is None or not parts.done:
        raise Refused(400, "data.refused.none")
    return parts.name
