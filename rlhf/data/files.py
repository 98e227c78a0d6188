"""Rows out of JSON, JSON lines, CSV and Parquet files, with their row numbers and what is wrong with them."""

import codecs
import csv
import difflib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf.types import UserError

SUFFIXES = {".json": "JSON", ".jsonl": "JSON lines", ".ndjson": "JSON lines", ".csv": "CSV", ".parquet": "Parquet"}


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row of a file: its number from 1 (a CSV's header not counted), and its columns or why they could not be read."""

    number: int
    columns: dict[str, Any]
    problem: str | None = None
    raw: object = None  # what stood there, when there is a problem


def check_file(path: str | Path, key: str = "data.path") -> Path:
    """The file of `path`, `key` being the option that names it. Raises UserError: no such file, not a file, unknown suffix, empty."""
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(p.name for p in place.iterdir() if p.suffix.lower() in SUFFIXES)
        raise UserError(f"{key}={path} is a directory: expected a file.{' Files in it: ' + ', '.join(files[:8]) + '.' if files else ''}")
    if not place.exists():
        names = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
        near = difflib.get_close_matches(place.name, names, n=1)
        where = f" Nearest in {place.parent}: {near[0]}." if near else ""
        if not place.parent.is_dir():
            where = f" There is no directory {place.parent} either."
        raise UserError(f"{key}={path}: no such file.{where}")
    if place.suffix.lower() not in SUFFIXES:
        raise UserError(f"{key}={path}: expected a file that ends with {', '.join(SUFFIXES)}; found {place.suffix or 'no suffix'!r}.")
    if place.stat().st_size == 0:
        raise UserError(f"{key}={path} is empty (0 bytes): expected at least one row.")
    return place


def scan(path: str | Path, max_rows: int | None = None, key: str = "data.path") -> Iterator[SourceRow]:
    """The first `max_rows` rows (all when None), one by one; a row that can't be read comes with its `problem`.

    Raises UserError where the file as a whole can't be read: see `check_file`, and text that isn't UTF-8.
    """
    place = check_file(path, key)
    suffix = place.suffix.lower()
    if suffix == ".parquet":
        rows = _parquet(place)
    elif suffix == ".csv":
        rows = _csv(place)
    else:
        rows = _json(place)
    return islice(rows, max_rows)


def read_rows(path: str | Path, max_rows: int | None = None, key: str = "data.path") -> list[dict[str, Any]]:
    """Every row as a dictionary. Raises UserError naming file and row for one that can't be read, and for a file without rows."""
    rows = []
    for row in scan(path, max_rows, key):
        if row.problem is not None:
            raise UserError(f"{path}, row {row.number}: {row.problem}.")
        rows.append(row.columns)
    if not rows:
        raise UserError(f"{key}={path} holds no rows: expected at least one.")
    return rows


def _decode(path: Path, line: bytes, place: str) -> str:
    """UTF-8, a byte order mark left out. Raises UserError naming the byte."""
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path} is UTF-16 (it begins with its byte order mark): expected UTF-8. Save it as UTF-8.")
    try:
        return line.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise UserError(f"{path}, {place}, byte {error.start + 1}: expected UTF-8 text, found 0x{byte:02x}. Save it as UTF-8.") from error


def _kind(value: Any) -> str:
    return {list: "an array", dict: "an object", str: "text", bool: "true/false", type(None): "null"}.get(type(value), "a number")


def _row(number: int, value: Any) -> SourceRow:
    if isinstance(value, dict):
        return SourceRow(number, value)
    return SourceRow(number, {}, f"expected an object of columns, found {_kind(value)}", value)


def _json(path: Path) -> Iterator[SourceRow]:
    with path.open("rb") as source:
        start = source.read(4096).decode("utf-8", "ignore").removeprefix("\ufeff").lstrip()
    return _json_array(path) if start.startswith("[") else _json_lines(path)


def _json_array(path: Path) -> Iterator[SourceRow]:
    try:
        values = json.loads(_decode(path, path.read_bytes(), "the file"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); expected an array of rows.") from error
    for number, value in enumerate(values, start=1):
        yield _row(number, value)


def _json_lines(path: Path) -> Iterator[SourceRow]:
    number = 0
    with path.open("rb") as source:
        for at, line in enumerate(source, start=1):
            text = _decode(path, line, f"line {at}").strip()
            if not text:
                continue
            number += 1
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                problem = f"not valid JSON at line {at}, column {error.colno} ({error.msg}); expected one whole object a line, or an array of objects"
                yield SourceRow(number, {}, problem, text)
                continue
            yield _row(number, value)


def _csv(path: Path) -> Iterator[SourceRow]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))

    def lines() -> Iterator[str]:
        with path.open("rb") as source:
            for at, line in enumerate(source, start=1):
                yield _decode(path, line, f"line {at}")

    reader = csv.reader(lines())
    header = next(reader, [])
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise UserError(f"{path}: the header names {', '.join(map(repr, doubled))} more than once; expected a column each.")
    number = 0
    for cells in reader:
        if not cells:
            continue
        number += 1
        if len(cells) == len(header):
            yield SourceRow(number, dict(zip(header, cells, strict=True)))
        else:
            yield SourceRow(number, {}, f"expected {len(header)} cells as in the header, found {len(cells)}", cells)


def _parquet(path: Path) -> Iterator[SourceRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield SourceRow(number, value)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}).") from error
