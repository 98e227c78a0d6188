"""Rows out of JSON, JSON lines, CSV, Parquet and Excel files, with their row numbers and what is
wrong with them.
"""

import codecs
import csv
import datetime
import difflib
import json
import logging
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf.data.cells import from_excel_text
from rlhf.process.extras import require
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.data")
SUFFIXES = {
    ".json": "JSON",
    ".jsonl": "JSON lines",
    ".ndjson": "JSON lines",
    ".csv": "CSV",
    ".parquet": "Parquet",
    ".xlsx": "Excel",
}
# bytes, and times its size; deflate comes to 1030 for zeros, texts to 20
_MOST_UNPACKED, _MOST_RATIO = 2**30, 200


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

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.origin}, row {self.number}"


def check_file(path: str | Path, key: str = "data.path") -> Path:
    """The file of `path`, `key` being the option that names it. Raises UserError: no such file, not
    a file, unknown suffix, empty.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        files = sorted(p.name for p in file.iterdir() if p.suffix.lower() in SUFFIXES)
        hint = f" Files in it: {', '.join(files[:8])}." if files else ""
        raise UserError(f"{key}={path} is a directory: expected a file.{hint}")
    if not file.exists():
        raise UserError(f"{key}={path}: no such file.{_near(file)}")
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{key}={path}: expected a file that ends with {', '.join(SUFFIXES)}; found "
            f"{file.suffix or 'no suffix'!r}."
        )
    if file.stat().st_size == 0:
        raise UserError(f"{key}={path} is empty (0 bytes): expected at least one row.")
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


def scan(
    path: str | Path, max_rows: int | None = None, key: str = "data.path"
) -> Iterator[SourceRow]:
    """The first `max_rows` rows (all when None), one by one; a row that can't be read comes with
    its `problem`.

    JSON lines, CSV, Parquet and Excel files are never held whole; a JSON array is. Raises UserError
    where the file as a whole can't be read: see `check_file`, and text that isn't UTF-8.
    """
    file = check_file(path, key)
    read = {".parquet": _parquet, ".csv": _csv, ".xlsx": _excel}.get(file.suffix.lower(), _json)
    return islice(read(file), max_rows)


def count_rows(path: str | Path, key: str = "data.path") -> int:
    """How many rows `scan` gives, those that can't be read included; without parsing them where
    that is possible.
    """
    file = check_file(path, key)
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return _parquet_file(file).metadata.num_rows
    if suffix in (".json", ".jsonl", ".ndjson") and not _holds_array(file):
        with file.open("rb") as source:
            return sum(not line.isspace() for line in source)
    return sum(1 for _ in scan(file, key=key))


def read_rows(
    path: str | Path, max_rows: int | None = None, key: str = "data.path"
) -> list[dict[str, Any]]:
    """Every row as a dictionary. Raises UserError naming file and row for one that can't be read,
    and for a file without rows.
    """
    rows = []
    for row in scan(path, max_rows, key):
        if row.problem is not None:
            raise UserError(f"{row.place}: {row.problem}.")
        rows.append(row.columns)
    if not rows:
        raise UserError(f"{key}={path} holds no rows: expected at least one.")
    return rows


def _decode(path: Path, line: bytes, where: str, *, first: bool) -> str:
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


def _kind(value: Any) -> str:
    return {
        list: "an array",
        dict: "an object",
        str: "text",
        bool: "true/false",
        type(None): "null",
    }.get(type(value), "a number")


def _row(origin: str, number: int, value: Any) -> SourceRow:
    if isinstance(value, dict):
        return SourceRow(number, value, origin=origin)
    return SourceRow(
        number, {}, f"expected an object of columns, found {_kind(value)}", value, origin
    )


def _holds_array(path: Path) -> bool:
    with path.open("rb") as source:
        start = source.read(4096).decode("utf-8", "ignore")
    return start.removeprefix("\ufeff").lstrip().startswith("[")


def _json(path: Path) -> Iterator[SourceRow]:
    if _holds_array(path):
        return _json_array(path)
    return _json_lines(path)


def _unreadable(error: ValueError | RecursionError) -> str:
    """What json.loads complains of: syntax, a number of too many digits, or too many brackets."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error)


def _json_array(path: Path) -> Iterator[SourceRow]:
    text = _decode(path, path.read_bytes(), "the file", first=True)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        hint = ""
        first, _, rest = text.partition("\n")
        if error.msg == "Extra data" and rest.strip() and _is_json(first):
            hint = " (a row a line wants objects {...}, not arrays)"
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); "
            f"expected an array of rows{hint}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not valid JSON ({_unreadable(error)}); expected an array of rows."
        ) from error
    for number, value in enumerate(values, start=1):
        yield _row(str(path), number, value)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _json_lines(path: Path) -> Iterator[SourceRow]:
    number, origin = 0, str(path)
    with path.open("rb") as source:
        for at, line in enumerate(source, start=1):
            text = _decode(path, line, f"line {at}", first=at == 1).strip()
            if not text:
                continue
            number += 1
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                column = (
                    f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                )
                problem = (
                    f"not valid JSON at line {at}{column} ({_unreadable(error)}); expected "
                    "one whole object a line, or an array of objects"
                )
                yield SourceRow(number, {}, problem, text, origin)
                continue
            yield _row(origin, number, value)


def _check_header(path: Path, header: list[str]) -> None:
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise UserError(
            f"{path}: the header names {', '.join(map(repr, doubled))} more than once; expected "
            "a column each."
        )


def _delimiter(path: Path) -> str:
    """The comma, unless the header has none and has semicolons or tabs, as spreadsheets of some
    countries write them.
    """
    with path.open("rb") as source:
        header = source.readline().decode("utf-8", "ignore")
    mark = next((mark for mark in (",", ";", "\t") if mark in header), ",")
    if mark != ",":
        LOG.info("%s: its header has no comma, so cells are taken as separated by %r", path, mark)
    return mark


def _csv(path: Path) -> Iterator[SourceRow]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))

    def lines() -> Iterator[str]:
        with path.open("rb") as source:
            for at, line in enumerate(source, start=1):
                yield _decode(path, line, f"line {at}", first=at == 1)

    reader = csv.reader(lines(), delimiter=_delimiter(path), strict=True)
    number, origin = 0, str(path)
    try:
        header = next(reader, [])
        _check_header(path, header)
        for cells in reader:
            if not cells:
                continue
            number += 1
            if len(cells) == len(header):
                yield SourceRow(number, dict(zip(header, cells, strict=True)), origin=origin)
                continue
            problem = f"expected {len(header)} cells as in the header, found {len(cells)}"
            yield SourceRow(number, {}, problem, cells, origin)
    except csv.Error as error:
        raise UserError(
            f"{path}, row {number + 1}, line {reader.line_num}: not valid CSV ({error})."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _parquet_file(path: Path) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    # of a damaged file Arrow's own errors and those of Unicode, sizes and memory
    except Exception as error:
        raise UserError(f"{path}: not a readable Parquet file ({_first_line(error)}).") from error


def _parquet(path: Path) -> Iterator[SourceRow]:
    number, origin = 0, str(path)
    try:
        for batch in _parquet_file(path).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield SourceRow(number, value, origin=origin)
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(
            f"{path}, after row {number}: not a readable Parquet file ({_first_line(error)})."
        ) from error


def _excel_cell(value: Any) -> str:
    """A cell as text, as CSV would hold it: a whole number without a point, nothing as ""."""
    if value is None:
        return ""
    if isinstance(value, bool):
        if value:
            return "true"
        return "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    return from_excel_text(str(value))


def _check_unpacked(path: Path) -> None:
    """An Excel file is a zip archive. Raises UserError for one that is small and unpacks to more
    than a sheet could hold: a zip bomb.

    zipfile never gives more of a member than its header says.
    """
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    packed = path.stat().st_size
    if unpacked > _MOST_UNPACKED and unpacked > _MOST_RATIO * packed:
        raise UserError(
            f"{path}: {packed} bytes unpack to {unpacked / 2**30:.1f} GiB, so this is no sheet "
            "of texts. Save the rows as CSV or JSON lines."
        )


def _excel(path: Path) -> Iterator[SourceRow]:
    """Rows of the first sheet; wholly empty ones are not rows."""
    openpyxl = require("openpyxl", "data")
    number = 0
    try:
        _check_unpacked(path)
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        if len(book.sheetnames) > 1:
            LOG.warning(
                "%s has the sheets %s: only the first is read.", path, ", ".join(book.sheetnames)
            )
        rows = book.worksheets[0].iter_rows(values_only=True)
        header = [_excel_cell(cell) for cell in next(rows, ())]
        while header and not header[-1]:
            header.pop()
        _check_header(path, header)
        for cells in rows:
            texts = [_excel_cell(cell) for cell in cells]
            if any(texts):
                number += 1
                yield _excel_row(str(path), number, header, texts)
        book.close()
    except UserError:
        raise
    # of a damaged workbook openpyxl raises whatever zip, zlib, XML and its own classes raise
    except Exception as error:
        raise UserError(
            f"{path}, after row {number}: not a readable Excel file ({type(error).__name__}: "
            f"{error})."
        ) from error


def _excel_row(origin: str, number: int, header: list[str], texts: list[str]) -> SourceRow:
    extra = next((text for text in texts[len(header) :] if text), None)
    if extra is not None:
        problem = f"expected {len(header)} cells as in the header, found {extra!r} beyond them"
        return SourceRow(number, {}, problem, texts, origin)
    cells = [*texts, *[""] * (len(header) - len(texts))][: len(header)]
    return SourceRow(number, dict(zip(header, cells, strict=True)), origin=origin)
