"""labels.jsonl of a labels directory: every label that was ever imported, once, in the order in
which it came.

The file is only appended to. A label is of one annotator on one task of one export. When that
annotator judges the task again, that is a revision: the later label counts, by its own time where
both have one, else by when it came. The earlier one stays, superseded.

A label that repeats one of its key (same outcome, and no different ratings, comment or time) adds
nothing. So importing a file again, in parts, or the same labels in another tool's format changes
nothing. Where a format carries no time, an annotator's return to an earlier judgement can't be told
from the same label read twice, and is taken for that.

Killed at any moment, nothing is lost or doubled: a line counts when its line end is on the disk.
Half of a last line is cut off at the next opening, and the label that it was to hold is new to the
next import. One process writes at a time; a second one is refused.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.prepare.store import line
from rlhf.labels.checking import Checked, Outcome, Refused, moment
from rlhf.process.files import digest
from rlhf.types import UserError

LABELS_FILE, REFUSED_FILE = "labels.jsonl", "refused.jsonl"


@dataclass(frozen=True, slots=True)
class Stored:
    """One line of labels.jsonl."""

    label: Checked
    number: int  # of the import that brought it
    counts: bool  # False: superseded by a later label of the same key


@dataclass(slots=True)
class Added:
    """What an import did to the labels."""

    new: int = 0  # labels of a task that the annotator had not judged before
    revised: int = 0  # labels of a task that the annotator had judged
    known: int = 0  # labels that were stored already


def label_row(label: Checked, number: int) -> dict[str, Any]:
    """A line of labels.jsonl; `import` is the import's number."""
    row = dataclasses.asdict(label)
    row["outcome"] = label.outcome.value
    return {**row, "import": number}


def label_of(row: dict[str, Any]) -> Checked:
    """What `label_row` wrote. Raises KeyError, TypeError or ValueError for anything else."""
    content = {f.name: row[f.name] for f in dataclasses.fields(Checked)}
    content["outcome"] = Outcome(content["outcome"])
    content["ranking"] = tuple(tuple(group) for group in content["ranking"])
    content["ratings"] = tuple(content["ratings"])
    label = Checked(**content)
    if label.time is not None:
        moment(label.time)
    return label


def _same(a: Checked, b: Checked) -> bool:
    """Whether two labels with the same key are one label: what both have is equal."""
    if a.outcome is not b.outcome or a.ranking != b.ranking:
        return False
    if a.ratings != b.ratings and any(a.ratings) and any(b.ratings):
        return False
    if a.comment != b.comment and a.comment and b.comment:
        return False
    return a.time is None or b.time is None or moment(a.time) == moment(b.time)


def _supersedes(new: Checked, old: Checked) -> bool:
    """Whether `new` was made after `old`, or came after it where a time is missing."""
    return new.time is None or old.time is None or moment(new.time) >= moment(old.time)


class Lines:
    """A file of JSON lines that one process appends to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UserError(
                f"{path}: another import is writing it. Wait until that has ended, then run this "
                "one again."
            ) from None
        try:
            self.rows = list(self._read())
        except UserError:
            self.close()
            raise

    def _read(self) -> Iterator[dict[str, Any]]:
        self._file.seek(0)
        content = self._file.read()
        end = content.rfind(b"\n") + 1
        if end < len(content):  # a kill left half a line, which does not count
            self._file.truncate(end)
            os.fsync(self._file.fileno())
        for number, text in enumerate(content[:end].split(b"\n")[:-1], start=1):
            try:
                row = json.loads(text)
            except ValueError as error:
                raise UserError(
                    f"{self.path}, line {number} can't be read: {error}. Nothing but imports may "
                    "write this file; restore it."
                ) from error
            if not isinstance(row, dict):
                raise UserError(
                    f"{self.path}, line {number}: expected an object. Nothing but imports may "
                    "write this file; restore it."
                )
            yield row

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Append `rows`; all of them are on the disk when it returns."""
        if rows:
            self._file.write("".join(line(row) for row in rows).encode("utf-8"))
            self._file.flush()
            os.fsync(self._file.fileno())
            self.rows.extend(rows)

    def close(self) -> None:
        self._file.close()  # gives the lock back


class Store:
    """The labels of a labels directory, open for one import."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError where labels.jsonl is not what imports wrote, or another import is
        writing it.
        """
        self.path = folder / LABELS_FILE
        self._lines = Lines(self.path)
        self._stored: list[tuple[Checked, int]] = []
        self._by_key: dict[tuple[str, str, str], list[int]] = {}  # indices in _stored
        self._current: dict[tuple[str, str, str], int] = {}
        try:
            for number, row in enumerate(self._lines.rows, start=1):
                try:
                    self._take(label_of(row), int(row["import"]))
                except (KeyError, TypeError, ValueError) as error:
                    raise UserError(
                        f"{self.path}, line {number}: {type(error).__name__}: {error}. Nothing "
                        "but imports may write it."
                    ) from error
        except UserError:
            self.close()
            raise

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._lines.close()

    def _take(self, label: Checked, number: int) -> None:
        index = len(self._stored)
        self._stored.append((label, number))
        self._by_key.setdefault(label.key, []).append(index)
        before = self._current.get(label.key)
        if before is None or _supersedes(label, self._stored[before][0]):
            self._current[label.key] = index

    def add(self, labels: Iterable[Checked], number: int) -> Added:
        """Store the labels that are not stored yet; they are on the disk when it returns. `number`
        is the import's.
        """
        added, rows = Added(), []
        for label in labels:
            earlier = self._by_key.get(label.key, [])
            if any(_same(label, self._stored[index][0]) for index in earlier):
                added.known += 1
                continue
            if earlier:
                added.revised += 1
            else:
                added.new += 1
            self._take(label, number)
            rows.append(label_row(label, number))
        self._lines.append(rows)
        return added

    @property
    def stored(self) -> list[Stored]:
        """Every label, in the order in which they came."""
        counting = set(self._current.values())
        return [
            Stored(label, number, index in counting)
            for index, (label, number) in enumerate(self._stored)
        ]

    @property
    def labels(self) -> list[Checked]:
        """The labels that count, in an order that is the same however they came."""
        return sorted(
            (self._stored[index][0] for index in self._current.values()),
            key=lambda label: label.key,
        )


def keep_refused(folder: Path, refused: Iterable[Refused], number: int) -> int:
    """Append to refused.jsonl the rows that it does not hold yet; returns how many."""
    with contextlib.closing(Lines(folder / REFUSED_FILE)) as lines:
        known = {row.get("id") for row in lines.rows}
        rows: dict[str, dict[str, Any]] = {}
        for row in refused:
            if row.id not in known:
                rows[row.id] = {
                    "id": row.id,
                    "place": row.place,
                    "task": row.task,
                    "reason": row.reason,
                    "row": row.row,
                    "import": number,
                }
        lines.append(list(rows.values()))
        return len(rows)


def identity(labels: Iterable[Checked]) -> str:
    """A hash of the labels that count: of what they say, not of the files that they came from."""
    rows = [label_row(dataclasses.replace(label, place=""), 0) for label in labels]
    return digest(rows)
