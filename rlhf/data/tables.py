"""Tables: rows out of CSV, Parquet and Excel files; and texts in the cells of sheets, that is CSV
files that people open in spreadsheets, which take some texts for formulas, and Excel files, which
are XML and hold some characters as escapes only.
"""

import csv
import datetime
import logging
import re
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf.data.opening import SourceRow, check_unpacked, decode, first_line, open_bytes
from rlhf.process.libraries import require
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.data")
# full-width signs begin formulas where such are typed; a line end may be cut off before the rest is
# looked at
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # noqa: RUF001
CELL_LIMIT = 32_767  # what an Excel cell holds, in UTF-16 code units
# how Excel's files hold characters that XML can't (ECMA-376, ST_Xstring)
_ESCAPE = re.compile(r"_x([0-9A-Fa-f]{4})_")
_LIKE_ESCAPE = re.compile(r"_(?=x[0-9A-Fa-f]{4}_)")
_NOT_IN_XML = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")


# ---- rows ----


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
    with open_bytes(path) as source:
        header = source.readline().decode("utf-8", "ignore")
    found = next((each for each in (",", ";", "\t") if each in header), ",")
    if found != ",":
        LOG.info("%s: its header has no comma, so cells are taken as separated by %r", path, found)
    return found


def csv_header(path: Path) -> list[str]:
    """The cells of a CSV file's first line. Raises UserError where it is no CSV."""
    return next(csv.reader(_csv_lines(path), delimiter=_delimiter(path)), [])


def _csv_lines(path: Path) -> Iterator[str]:
    with open_bytes(path) as source:
        for at, line in enumerate(source, start=1):
            yield decode(path, line, f"line {at}", first=at == 1)


def csv_rows(path: Path, names: Sequence[str] | None = None) -> Iterator[SourceRow]:
    """Rows of a CSV file, read one by one. `names`: of the columns of a file without a header.
    Raises UserError where it is no CSV.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(_csv_lines(path), delimiter=_delimiter(path), strict=True)
    number, origin = 0, str(path)
    try:
        header = next(reader, []) if names is None else list(names)
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


def parquet_file(path: Path) -> Any:
    """A Parquet file, opened. Raises UserError for a damaged one."""
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    # of a damaged file Arrow's own errors and those of Unicode, sizes and memory
    except Exception as error:
        raise UserError(f"{path}: not a readable Parquet file ({first_line(error)}).") from error


def parquet_rows(path: Path) -> Iterator[SourceRow]:
    """Rows of a Parquet file, batch by batch. Raises UserError for a damaged one."""
    number, origin = 0, str(path)
    try:
        for batch in parquet_file(path).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield SourceRow(number, value, origin=origin)
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(
            f"{path}, after row {number}: not a readable Parquet file ({first_line(error)})."
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


def _check_archive(path: Path) -> None:
    """An Excel file is a zip archive. Raises UserError for one that is small and unpacks to more
    than a sheet could hold: a zip bomb.

    zipfile never gives more of a member than its header says.
    """
    with zipfile.ZipFile(path) as archive:
        check_unpacked(path, sum(member.file_size for member in archive.infolist()))


def excel_rows(path: Path) -> Iterator[SourceRow]:
    """Rows of the first sheet; wholly empty ones are not rows."""
    openpyxl = require("openpyxl", "data")
    number = 0
    try:
        _check_archive(path)
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


# ---- cells ----


def mark(text: str, starts: tuple[str, ...] = ()) -> str:
    """`text` after an apostrophe where it is empty, or begins with an apostrophe or with any of
    `starts`; `unmark` takes it off again.
    """
    if not text or text.startswith(("'", *starts)):
        return f"'{text}"
    return text


def unmark(cell: str) -> str:
    """The text that `mark` was given."""
    return cell.removeprefix("'")


def inert(text: str) -> str:
    """`text` after an apostrophe where a spreadsheet would take it for a formula; for readers that
    know the text and compare.
    """
    if text.startswith(FORMULA):
        return f"'{text}"
    return text


def bare(cell: str) -> str:
    """`cell` without the apostrophe that `inert` may have added; an apostrophe before anything else
    stays.
    """
    if cell.startswith("'") and cell[1:].startswith(FORMULA):
        return cell[1:]
    return cell


def excel_text(text: str) -> str:
    """`text` as an Excel cell holds it: what XML can't carry, a carriage return, and what looks
    like such an escape become _xHHHH_.
    """
    text = _LIKE_ESCAPE.sub("_x005F_", text)
    return _NOT_IN_XML.sub(lambda match: f"_x{ord(match[0]):04X}_", text)


def from_excel_text(cell: str) -> str:
    """The text that `excel_text` was given."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 16)), cell)


def cell_length(cell: str) -> int:
    """UTF-16 code units of a text as an Excel cell holds it, which `CELL_LIMIT` limits."""
    return len(cell.encode("utf-16-le", "surrogatepass")) // 2
