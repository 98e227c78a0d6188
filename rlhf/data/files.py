"""Rows out of JSON, JSON lines, text, CSV, Parquet and Excel files, compressed or not, with their
row numbers and what is wrong with them.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf.data.json_text import Repeated, decoder, repeated_key
from rlhf.data.opening import SourceRow, check_file, decode, kind_of, open_bytes
from rlhf.data.tables import csv_rows, excel_rows, parquet_file, parquet_rows
from rlhf.types import UserError

__all__ = ["SourceRow", "check_file", "count_rows", "read_rows", "scan"]

Line = tuple[int, str]  # number from 1, text
_JSON = (".json", ".jsonl", ".ndjson")


def scan(
    path: str | Path, max_rows: int | None = None, key: str = "data.path"
) -> Iterator[SourceRow]:
    """The first `max_rows` rows (all when None), one by one; a row that can't be read comes with
    its `problem`.

    Files are never held whole, except JSON arrays. Raises UserError where the file as a whole can't
    be read: see `check_file`, and text that isn't UTF-8.
    """
    file = check_file(path, key)
    read = {
        ".parquet": parquet_rows,
        ".csv": csv_rows,
        ".xlsx": excel_rows,
        ".txt": _text_lines,
    }.get(kind_of(file) or "", _json)
    return islice(read(file), max_rows)


def count_rows(path: str | Path, key: str = "data.path") -> int:
    """How many rows `scan` gives, those that can't be read included; without parsing them where
    that is possible.
    """
    file = check_file(path, key)
    kind = kind_of(file)
    if kind == ".parquet":
        return int(parquet_file(file).metadata.num_rows)
    if kind == ".txt" or (kind in _JSON and not _holds_array(file) and not _spans_lines(file)):
        with open_bytes(file) as source:
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


def _lines(path: Path) -> Iterator[Line]:
    """The lines of a file that hold something."""
    with open_bytes(path) as source:
        for at, line in enumerate(source, start=1):
            if not line.isspace():
                yield at, decode(path, line, f"line {at}", first=at == 1)


def _text_lines(path: Path) -> Iterator[SourceRow]:
    """Each line is one text, as datasets and LLaMA-Factory read such files; a blank one is none."""
    for number, (_, text) in enumerate(_lines(path), start=1):
        yield SourceRow(number, {"text": text.rstrip("\r\n")}, origin=str(path))


# ---- JSON ----


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
    problem = f"expected an object of columns, found {_kind(value)}"
    if isinstance(value, str):
        problem += ' (texts alone are read from a .txt file, a text a line, or as {"text": ...})'
    return SourceRow(number, {}, problem, value, origin)


def _holds_array(path: Path) -> bool:
    with open_bytes(path) as source:
        start = source.read(4096).decode("utf-8", "ignore")
    return start.removeprefix("\ufeff").lstrip().startswith("[")


def _json(path: Path) -> Iterator[SourceRow]:
    if _holds_array(path):
        return _json_array(path)
    if _spans_lines(path):
        return _json_objects(path)
    return _json_lines(path)


def _unreadable(error: ValueError | RecursionError) -> str:
    """What json.loads complains of: syntax, a number of too many digits, or too many brackets."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error)


def _json_array(path: Path) -> Iterator[SourceRow]:
    with open_bytes(path) as source:
        text = decode(path, source.read(), "the file", first=True)
    found: list[Repeated] = []
    try:
        values = decoder(found).decode(text)
    except json.JSONDecodeError as error:
        hint = ""
        first, _, rest = text.partition("\n")
        if error.msg == "Extra data" and rest.strip() and _parsed(first) is not None:
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
        trouble = repeated_key(value) if found else None
        if trouble is None:
            yield _row(str(path), number, value)
        else:
            yield SourceRow(number, {}, trouble, value, str(path))


def _parsed(text: str) -> Any:
    """The value of a JSON text; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json_lines(path: Path) -> Iterator[SourceRow]:
    origin = str(path)
    found: list[Repeated] = []
    parse = decoder(found).decode
    for number, (at, text) in enumerate(_lines(path), start=1):
        try:
            value = parse(text.strip())
        except (ValueError, RecursionError) as error:
            column = ""
            if isinstance(error, json.JSONDecodeError):
                column = f", column {error.colno}"
            problem = (
                f"not valid JSON at line {at}{column} ({_unreadable(error)}); expected "
                "one whole object a line, or an array of objects"
            )
            yield SourceRow(number, {}, problem, text.strip(), origin)
            found.clear()
            continue
        if found:
            found.clear()
            yield SourceRow(number, {}, repeated_key(value), text.strip(), origin)
            continue
        yield _row(origin, number, value)


# ---- objects over several lines ----


def _goes_on(text: str, error: ValueError | RecursionError) -> bool:
    """Whether a JSON text that can't be parsed is right so far, and may go on in a further line. A
    text in quotes ends in its own line.
    """
    if not isinstance(error, json.JSONDecodeError):
        return False
    inside_quotes = error.msg.startswith(("Unterminated", "Invalid control"))
    return error.pos >= len(text.rstrip()) and not inside_quotes


def _is_begun(text: str) -> bool:
    """Whether a line is the beginning of a JSON text, and not the whole of it."""
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        return _goes_on(text, error)
    return False


def _spans_lines(path: Path) -> bool:
    """Whether a file's objects go over several lines: its first line is the beginning of one, and
    its second no object by itself (as after a line that was cut off).
    """
    first, second = [*islice(_lines(path), 2), (0, ""), (0, "")][:2]
    whole = isinstance(_parsed(second[1]), dict)
    return _is_begun(first[1]) and bool(second[1]) and not whole


def _json_objects(path: Path) -> Iterator[SourceRow]:
    """Rows of JSON objects over several lines, one after another. After one that can't be read the
    next begins with the next line that begins with a brace.
    """
    lines, number, origin = _lines(path), 0, str(path)
    waiting: list[Line] = []
    for at, text in lines:
        waiting.append((at, text.lstrip()))
        while waiting:
            number += 1
            value, waiting, problem = _next_object(waiting, lines)
            if problem is None:
                yield _row(origin, number, value)
            else:
                yield SourceRow(number, {}, problem, value, origin)


def _next_object(begun: list[Line], more: Iterator[Line]) -> tuple[Any, list[Line], str | None]:
    """The value at the beginning of the lines `begun` and, as far as it needs them, `more`; the
    lines that were read beyond it; and what is wrong with it (then its text stands for it).
    """
    lines = list(begun)
    while True:
        text = "".join(line for _, line in lines)
        found: list[Repeated] = []
        try:
            value, end = decoder(found).raw_decode(text)
        except (ValueError, RecursionError) as error:
            further = list(islice(more, len(lines))) if _goes_on(text, error) else []
            if not further:
                return _broken(lines, more, error)
            lines += further  # twice as many each time
        else:
            trouble = repeated_key(value) if found else None
            return value, _beyond(lines, end), trouble


def _beyond(lines: list[Line], end: int) -> list[Line]:
    """What the lines hold after their first `end` characters."""
    for index, (at, line) in enumerate(lines):
        if end < len(line):
            rest = line[end:].lstrip()
            begun = [(at, rest)] if rest else []
            return [*begun, *lines[index + 1 :]]
        end -= len(line)
    return []


def _broken(
    lines: list[Line], more: Iterator[Line], error: ValueError | RecursionError
) -> tuple[str, list[Line], str]:
    """The text up to the next line that begins with a brace, what follows, and the trouble."""
    where = f"in the object that begins at line {lines[0][0]}"
    if isinstance(error, json.JSONDecodeError):
        index = min(error.doc[: error.pos].count("\n"), len(lines) - 1)
        where = f"at line {lines[index][0]}, column {error.colno}, {where}"
    held, rest = lines[:1], lines[1:]
    while rest and not rest[0][1].startswith("{"):
        held.append(rest.pop(0))
    for line in more if not rest else ():
        if line[1].startswith("{"):
            rest = [line]
            break
        held.append(line)
    problem = (
        f"not valid JSON {where} ({_unreadable(error)}); expected whole objects, one after "
        "another, or an array of them"
    )
    return "".join(text for _, text in held).strip(), rest, problem
