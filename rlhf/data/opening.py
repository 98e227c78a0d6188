"""Files of rows before their rows: what kind a name says, whether the file is compressed, and what
may stand in its place (a Git LFS pointer, another kind of file, nothing).
"""

import bz2
import codecs
import difflib
import gzip
import io
import lzma
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rlhf.types import UserError

KINDS = {
    ".json": "JSON",
    ".jsonl": "JSON lines",
    ".ndjson": "JSON lines",
    ".csv": "CSV",
    ".txt": "a text a line",
    ".parquet": "Parquet",
    ".xlsx": "Excel",
}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_COMPRESSED_INSIDE = (".parquet", ".xlsx")
# bytes, and times its size; deflate comes to 1030 for zeros, texts to 20
_MOST_UNPACKED, _MOST_RATIO = 2**30, 200
# how files begin that are something else than text
_BEGINNINGS = {
    b"\x1f\x8b": (".gz", "gzip data"),
    b"\x28\xb5\x2f\xfd": (".zst", "zstandard data"),
    b"\xfd7zXZ": (".xz", "xz data"),
    b"PAR1": (".parquet", "a Parquet file"),
    b"PK\x03\x04": (".xlsx or unpack it", "a zip archive"),
}
_LFS = b"version https://git-lfs"
_ANNEX = b"/annex/objects/"


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row of a file: its number from 1 (a header not counted), and its columns or why they
    could not be read.
    """

    number: int
    columns: dict[str, Any]
    problem: str | None = None
    raw: object = None  # what the file has there, when there is a problem
    origin: str = ""  # the file, or the name of the data set
    lost: tuple[str, ...] = ()  # what of it is not carried on, a sentence each

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.origin}, row {self.number}"


def kind_of(path: str | Path) -> str | None:
    """The ending that says how a file's rows are read: .jsonl of rows.jsonl and of rows.jsonl.gz;
    None for a file that isn't read.
    """
    suffixes = [suffix.lower() for suffix in Path(path).suffixes[-2:]]
    if not suffixes:
        return None
    kind = suffixes[-1]
    if kind in COMPRESSED and len(suffixes) == 2:
        kind = suffixes[0]
        if kind in _COMPRESSED_INSIDE:
            return None
    return kind if kind in KINDS else None


def endings() -> str:
    """The endings of the files that are read, for messages."""
    plain = [kind for kind in KINDS if kind not in _COMPRESSED_INSIDE]
    return (
        f"{', '.join(plain)} (each also with {', '.join(COMPRESSED)}), "
        f"{' or '.join(_COMPRESSED_INSIDE)}"
    )


def readable_files(folder: Path) -> list[Path]:
    """The files of a directory that can be read, in the order of their names."""
    return sorted(path for path in folder.iterdir() if path.is_file() and kind_of(path))


def check_file(path: str | Path, key: str = "data.path") -> Path:
    """The file of `path`, `key` being the option that names it. Raises UserError: no such file, not
    a file, unknown suffix, empty, a pointer of Git LFS, another kind of file than its name says.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        names = [each.name for each in readable_files(file)[:8]]
        hint = f" {key}='{path}/*' reads its files: {', '.join(names)}." if names else ""
        raise UserError(f"{key}={path} is a directory: expected a file.{hint}")
    if not file.exists():
        raise UserError(f"{key}={path}: no such file.{_near(file)}")
    kind = kind_of(file)
    if kind is None:
        raise UserError(
            f"{key}={path}: expected a file that ends with {endings()}; found "
            f"{''.join(file.suffixes[-2:]) or 'no suffix'!r}."
        )
    if file.stat().st_size == 0:
        raise UserError(f"{key}={path} is empty (0 bytes): expected at least one row.")
    _check_beginning(file, kind, f"{key}={path}")
    return file


def _near(file: Path) -> str:
    """Which file a path that doesn't exist may mean, for a message."""
    folder = file.parent
    if not folder.is_dir():
        return f" There is no directory {folder} either."
    near = difflib.get_close_matches(file.name, [p.name for p in folder.iterdir()], n=1)
    if near:
        return f" Nearest in {folder}: {near[0]}."
    return ""


def _check_beginning(file: Path, kind: str, where: str) -> None:
    """Raises UserError for a file that holds something else than its name says."""
    with file.open("rb") as source:
        head = source.read(64)
    if head.startswith(_LFS):
        raise UserError(
            f"{where} is a Git LFS pointer: the rows themselves are not here. Run `git lfs pull` "
            "in its repository (git lfs install first, if there is no such command)."
        )
    if head.startswith(_ANNEX):
        raise UserError(
            f"{where} is a git-annex pointer: the rows themselves are not here. Run `git annex "
            "get` in its repository."
        )
    if kind in _COMPRESSED_INSIDE or file.suffix.lower() in COMPRESSED:
        return
    for beginning, (suffix, what) in _BEGINNINGS.items():
        if head.startswith(beginning):
            raise UserError(
                f"{where} holds {what}, though its name says {KINDS[kind]}. Give it a name that "
                f"ends with {suffix}."
            )


# ---- bytes ----


def open_bytes(file: Path) -> BinaryIO:
    """A file of text for reading, unpacked as it is read where its name says that it is compressed.

    Reading raises UserError for damaged data, and for a small file that unpacks to more than texts
    could: a zip bomb.
    """
    if file.suffix.lower() not in COMPRESSED:
        return file.open("rb")
    return io.BufferedReader(_Unpacked(file), 2**18)


def check_unpacked(file: Path, unpacked: int) -> None:
    """Raises UserError where so many bytes out of a file of this size can be no texts."""
    packed = file.stat().st_size
    if unpacked > _MOST_UNPACKED and unpacked > _MOST_RATIO * packed:
        raise UserError(
            f"{file}: {packed} bytes unpack to {unpacked / 2**30:.1f} GiB or more, so this is no "
            "file of texts (a zip bomb, or damaged). Save the rows as CSV or JSON lines."
        )


class _Unpacked(io.RawIOBase):
    """What a compressed file holds, as a stream that counts its bytes."""

    def __init__(self, file: Path) -> None:
        self._file, self._count = file, 0
        self._stream = _decompressing(file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise UserError(
                f"{self._file}, after {self._count} unpacked bytes: not readable as "
                f"{self._file.suffix} ({first_line(error)}). The file is damaged or not whole."
            ) from error
        self._count += len(data)
        check_unpacked(self._file, self._count)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _decompressing(file: Path) -> Any:
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return gzip.open(file, "rb")
    if suffix == ".bz2":
        return bz2.open(file, "rb")
    if suffix == ".xz":
        return lzma.open(file, "rb")
    import pyarrow  # Python 3.11 has no zstandard of its own

    return pyarrow.input_stream(str(file), compression="zstd")


def first_line(error: Exception) -> str:
    """An error's message in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def decode(path: Path, line: bytes, where: str, *, first: bool) -> str:
    """A line as text, from UTF-8; a byte order mark of the `first` line is left out. Raises
    UserError that names the byte.
    """
    if first and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(
            f"{path} is UTF-16 (it begins with its byte order mark): expected UTF-8. Save it as "
            "UTF-8."
        )
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise UserError(
            f"{path}, {where}, byte {error.start + 1}: expected UTF-8 text, found 0x{byte:02x}. "
            "Save it as UTF-8."
        ) from error
    if first:
        return text.removeprefix("\ufeff")
    return text
