"""Rows in the toolkit's own columns into a file of any kind and format: `write_items` converts them
(rlhf/data/targets.py), `write_rows` writes the rows of a format.
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from conf.choices import FileKind
from conf.data import DataTarget
from rlhf.data.formats import Use
from rlhf.data.formats.draft import Row
from rlhf.data.prepare.items import Item
from rlhf.data.rows import RowError
from rlhf.data.tables import CELL_LIMIT, cell_length, excel_text
from rlhf.data.targets import check_target, convert
from rlhf.process.libraries import require
from rlhf.process.wording import describe
from rlhf.types import UserError

# columns whose lists and objects are a row's content, in whatever format
_NESTED = (
    "prompt",
    "completion",
    "messages",
    "rejected_messages",
    "chosen",
    "rejected",
    "conversations",
    "history",
    "data",
    "annotations",
    "fields",
    "responses",
    "answers",
    "images",
)
_BATCH = 1024  # rows of a Parquet row group


def file_kind(to: DataTarget, wanted: FileKind | None) -> FileKind:
    """The kind of file of data.file; without it that which the target is named after, else JSON
    lines.
    """
    if wanted is not None:
        return wanted
    return {DataTarget.csv: FileKind.csv, DataTarget.xlsx: FileKind.xlsx}.get(to, FileKind.jsonl)


@dataclass(slots=True)
class Written:
    """What was written, and how many rows have each note on what reads back otherwise."""

    path: Path
    rows: int = 0
    notes: Counter[str] = field(default_factory=Counter)


def write_items(
    items: Iterable[Item],
    kind: Use,
    to: DataTarget,
    path: Path,
    rejected: Callable[[Item, str], None],
    file: FileKind | None = None,
) -> Written:
    """Write items as rows of `to` into `path`; an item that the format or the file can't hold goes
    to `rejected` with the reason.

    Nothing is held in memory. Raises UserError for a kind that `to` can't hold.
    """
    check_target(to, kind)
    container = file_kind(to, file)
    out = Written(path)

    def rows() -> Iterator[Row]:
        for item in items:
            try:
                made, notes = convert(kind, item.columns, to)
                if container in (FileKind.csv, FileKind.xlsx):
                    made = [_cells(row, notes, container) for row in made]
                elif container is FileKind.parquet:
                    made = [_columnar(row) for row in made]
            except RowError as error:
                rejected(item, f"data.to={to.value}: {error}")
                continue
            out.notes.update(set(notes))
            yield from made

    out.rows = write_rows(rows(), path, container)
    return out


def _columnar(row: Row) -> Row:
    """A row with functions and the arguments of calls as JSON texts, which readers parse: in a
    Parquet column each object would get the keys of all others.
    """
    out: Row = {}
    for key, value in row.items():
        if key == "tools" and not isinstance(value, str):
            out[key] = json.dumps(value, ensure_ascii=False)
        elif key in _NESTED and isinstance(value, list):
            out[key] = [_columnar_message(part) for part in value]
        else:
            out[key] = _columnar_message(value) if key in _NESTED else value
    return out


def _columnar_message(message: Any) -> Any:
    if not isinstance(message, dict) or not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        if value:
            return "true"
        return "false"
    if value is None:
        return ""
    return str(value)


def _cells(row: Row, notes: list[str], container: FileKind) -> Row:
    """A row as texts, which is all that a table's cells hold. Raises RowError for content that is
    none.
    """
    out: Row = {}
    for key, value in row.items():
        if isinstance(value, (list, dict)):
            if key in _NESTED and value:
                raise RowError(
                    f"key {key!r}: a {container.value} cell holds text, found {describe(value)}. "
                    "data.file=jsonl or parquet holds it"
                )
            notes.append(f"{key} is not carried: a {container.value} cell holds text")
            continue
        text = value if isinstance(value, str) else _in_words(value)
        if text is not value:
            notes.append(f"{key} becomes text")
        if container is FileKind.xlsx and cell_length(excel_text(text)) > CELL_LIMIT:
            raise RowError(
                f"key {key!r}: an Excel cell holds at most {CELL_LIMIT} characters, found "
                f"{len(text)}. data.file=csv holds more"
            )
        out[key] = text
    return out


def write_rows(rows: Iterable[Row], path: Path, kind: FileKind) -> int:
    """Write rows, one at a time, through a file of JSON lines beside `path`, and return how many
    there were. A table has every column that some row has.

    Raises UserError where a file of this kind can't hold the rows together.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    spool = path.with_name(path.name + ".tmp")
    count, columns = 0, dict[str, None]()
    with spool.open("w", encoding="utf-8") as out:
        for row in rows:
            columns.update(dict.fromkeys(row))
            out.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            count += 1
    if kind is FileKind.jsonl:
        os.replace(spool, path)
        return count
    {
        FileKind.json: _write_json,
        FileKind.csv: _write_csv,
        FileKind.xlsx: _write_xlsx,
        FileKind.parquet: _write_parquet,
    }[kind](spool, path, list(columns))
    spool.unlink()
    return count


def _spooled(spool: Path) -> Iterator[Row]:
    with spool.open("rb") as source:
        for line in source:
            yield json.loads(line)


def _write_json(spool: Path, path: Path, columns: list[str]) -> None:
    with path.open("w", encoding="utf-8") as out:
        out.write("[")
        for at, row in enumerate(_spooled(spool)):
            out.write((",\n" if at else "\n") + json.dumps(row, ensure_ascii=False))
        out.write("\n]\n")


def _write_csv(spool: Path, path: Path, columns: list[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(
            out, columns, restval="", quoting=csv.QUOTE_ALL, lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(_spooled(spool))


def _write_xlsx(spool: Path, path: Path, columns: list[str]) -> None:
    """One sheet; every cell is text, so that nothing becomes a formula, a date or a number."""
    openpyxl = require("openpyxl", "data")
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("rows")

    def cell(text: str) -> Any:
        out = openpyxl.cell.WriteOnlyCell(sheet, excel_text(text))
        out.data_type = "s"
        return out

    sheet.append([cell(name) for name in columns])
    for row in _spooled(spool):
        sheet.append([cell(_in_words(row.get(name, ""))) for name in columns])
    book.save(path)


def _write_parquet(spool: Path, path: Path, columns: list[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    def batches() -> Iterator[list[Row]]:
        rows = _spooled(spool)
        while batch := list(islice(rows, _BATCH)):
            yield batch

    column = "found"
    try:
        schemas = []
        for batch in batches():
            arrays = {}
            for name in columns:
                column = f"found in column {name!r}"
                arrays[name] = pyarrow.array([row.get(name) for row in batch])
            schemas.append(pyarrow.table(arrays).schema)
        column = "found in its columns"
        schema = pyarrow.schema([])
        if schemas:
            schema = pyarrow.unify_schemas(schemas, promote_options="permissive")
        with pyarrow.parquet.ParquetWriter(path, schema) as writer:
            for batch in batches():
                writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{path}: a Parquet column holds values of one type, but {column}: "
            f"{str(error).splitlines()[0]}. Set data.file=jsonl."
        ) from error
