"""What a step left behind: its rows, the rows that it rejected and its figures, in a directory that
appears when all of it is written.

steps/<number>-<name>/items.jsonl      [origin, row, split, columns] of each row that came out
(where rows are kept)
                      rejected.jsonl   step, reason, file, row, content of each row that it left out
                      step.json        the report, with the key of what it stands for
"""

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from rlhf.data.prepare.items import Item

FOLDER, ITEMS, REJECTED, REPORT = "steps", "items.jsonl", "rejected.jsonl", "step.json"
# json.dumps would make an encoder for each row
_ENCODE = json.JSONEncoder(ensure_ascii=False).encode
_MOST_REASONS = 20  # different reasons counted apart
_NUMBERS = re.compile(r"\d+(?:[.,]\d+)*")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")


@dataclass(slots=True)
class StepReport:
    """What one step did."""

    number: int  # from 1; 0 is the reading
    step: str
    options: dict[str, Any]
    key: str | None  # of what the result stands for; None: of nothing that could be found again
    rows_in: int = 0
    rows_out: int = 0
    rejected: int = 0
    seconds: float = 0.0  # its own, without the steps before it
    reused: bool = False  # taken from an earlier run
    # rejected rows by reason, numbers and quotes left out
    reasons: dict[str, int] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    def count(self, reason: str) -> None:
        """Count one more rejected row."""
        self.rejected += 1
        kind = _NUMBERS.sub("N", _QUOTED.sub("'...'", reason))
        if kind not in self.reasons and len(self.reasons) >= _MOST_REASONS:
            kind = "other reasons"
        self.reasons[kind] = self.reasons.get(kind, 0) + 1


def line(value: Any) -> str:
    """One line of JSON lines; text that UTF-8 can't hold (a lone surrogate) is escaped."""
    text = _encodable(value)
    if text is None:
        text = json.dumps(value)
    return text + "\n"


def columns_line(item: Item) -> str:
    """A row's columns as a line."""
    text = _columns(item)
    if text is None:
        return line(item.columns)
    return f"{text}\n"


def item_line(item: Item) -> str:
    """A row as a line of items.jsonl."""
    text, head = _columns(item), _head(item.origin)
    if text is None or head is None:
        return line([item.origin, item.number, item.split, item.columns])
    return f'[{head}, {item.number}, "{item.split}", {text}]\n'


def _columns(item: Item) -> str | None:
    """A row's columns as JSON, made once for all steps that leave them as they are; None where
    UTF-8 can't hold it.
    """
    if item.written is not None and item.written[0] is item.columns:
        return item.written[1]
    text = _encodable(item.columns)
    if text is not None:
        item.written = item.columns, text
    return text


@cache
def _head(origin: str) -> str | None:
    """A file's name as JSON; None where UTF-8 can't hold it."""
    return _encodable(origin)


def _encodable(value: Any) -> str | None:
    text = _ENCODE(value)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return None
    return text


def plain(value: Any) -> Any:
    """`value` as JSON can hold it and give it back: dates, decimals and bytes of a table as text,
    tuples as lists, NaN as null.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return None
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        return plain(value.tolist())
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


def rejected_row(step: str, reason: str, file: str, row: int, content: Any) -> dict[str, Any]:
    """A line of rejected.jsonl."""
    return {"step": step, "reason": reason, "file": file, "row": row, "content": content}


def step_folder(folder: Path, number: int, name: str) -> Path:
    """The directory of a step's results in the run directory `folder`."""
    return folder / FOLDER / f"{number:02d}-{name}"


class Writer:
    """Writes the directory of a step under another name, which `close` replaces by its own. What a
    killed run leaves keeps that other name and is never read.
    """

    def __init__(self, target: Path, *, items: bool) -> None:
        self._target, self._beside = target, target.with_name(target.name + ".tmp")
        shutil.rmtree(self._beside, ignore_errors=True)
        self._beside.mkdir(parents=True)
        self._rejected: TextIO = (self._beside / REJECTED).open("w", encoding="utf-8")
        self._items: TextIO | None = (
            (self._beside / ITEMS).open("w", encoding="utf-8") if items else None
        )

    def item(self, item: Item) -> None:
        if self._items is not None:
            self._items.write(item_line(item))

    def reject(self, row: dict[str, Any]) -> None:
        self._rejected.write(line(row))

    def lines(self, items: Sequence[str], rejected: str) -> None:
        """Lines that were made elsewhere, as `item_line` and `line` make them."""
        if self._items is not None:
            self._items.writelines(items)
        self._rejected.write(rejected)

    def close(self, report: StepReport) -> None:
        """Everything is written: the directory gets its name."""
        for handle in (self._rejected, self._items):
            if handle is not None:
                handle.flush()
                os.fsync(handle.fileno())
                handle.close()
        (self._beside / REPORT).write_text(
            json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )
        shutil.rmtree(self._target, ignore_errors=True)
        os.replace(self._beside, self._target)

    def abandon(self) -> None:
        """The step failed: nothing of it stays."""
        for handle in (self._rejected, self._items):
            if handle is not None:
                handle.close()
        shutil.rmtree(self._beside, ignore_errors=True)


def read_report(target: Path) -> StepReport | None:
    """The report in a step's directory, or None where there is none."""
    path = target / REPORT
    if path.is_file():
        return StepReport(**json.loads(path.read_text(encoding="utf-8")))
    return None


def read_items(target: Path) -> Iterator[Item]:
    """The rows in a step's directory, one by one."""
    with (target / ITEMS).open(encoding="utf-8") as source:
        for text in source:
            origin, number, split, columns = json.loads(text)
            yield Item(columns, origin, number, split)


def reusable(targets: Sequence[Path], keys: Sequence[str]) -> int:
    """How many steps (the reading, step 0, not counted) need not run: those up to the last step
    whose rows are kept under the same key. Every step before it must have left its report and
    rejected rows, too.
    """
    known = 0
    for number, (target, key) in enumerate(zip(targets, keys, strict=True)):
        report = read_report(target)
        if report is None or report.key != key:
            break
        if number > 0 and (target / ITEMS).is_file():
            known = number
    return known


def remove_others(folder: Path, keep: Sequence[Path]) -> None:
    """Remove what earlier pipelines left in the steps' folder."""
    root = folder / FOLDER
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if path not in keep and path.is_dir():
            shutil.rmtree(path)


def gather_rejected(targets: Sequence[Path], path: Path) -> Path:
    """One file of all steps' rejected rows, in the order of the steps."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as out:
        for target in targets:
            with (target / REJECTED).open("rb") as source:
                shutil.copyfileobj(source, out)
    os.replace(beside, path)
    return path
