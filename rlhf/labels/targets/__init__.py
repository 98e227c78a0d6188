"""Tasks as the files of labelling tools, and labels read back. There is a module for each tool,
whose docstring says what it writes and how it reads.

A reader gives every judgement that a file holds, and an Unreadable for each row that is none, so
that no row is lost without a message. It does not know the export: the import checks whether a task
belongs to it, and whether its texts are those that were asked about.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from conf.choices import LabelTarget
from rlhf.data.files import SourceRow, check_file, scan
from rlhf.data.opening import kind_of
from rlhf.labels.ledger import OUT_FOLDER
from rlhf.labels.records import Export, Judgement, Unreadable
from rlhf.labels.targets import argilla, jsonl, label_studio, page, sheet
from rlhf.types import UserError

Labels = Iterator[Judgement | Unreadable]


class Target(NamedTuple):
    """One tool."""

    write: Callable[[Export, Path], list[Path]]  # files into a folder, which is made
    read: Callable[[Path], Labels]


LABEL_TOOLS: dict[LabelTarget, Target] = {
    LabelTarget.page: Target(page.write, page.read),
    LabelTarget.label_studio: Target(label_studio.write, label_studio.read),
    LabelTarget.argilla: Target(argilla.write, argilla.read),
    LabelTarget.csv: Target(sheet.write_csv, sheet.read),
    LabelTarget.xlsx: Target(sheet.write_xlsx, sheet.read),
    LabelTarget.jsonl: Target(jsonl.write, jsonl.read),
}
_EXPECTED = (
    "expected the labels that the page downloads, Label Studio's export of the type JSON, "
    "Argilla's records, or a sheet or JSON lines with pair_id "
    "and preference or ranking"
)


def detect(path: Path) -> LabelTarget:
    """The tool that a file of labels comes from, by its first row. Raises UserError for any other
    file, with the formats and with the export type to choose in Label Studio.
    """
    if path.suffix.lower() in (".html", ".htm"):
        raise UserError(
            f"label.files={path} is a page: {_EXPECTED}. The page's labels are the file that its "
            "download button saves."
        )
    file = check_file(path, "label.files")
    if _is_page(file):
        return LabelTarget.page
    first = next((row for row in scan(file, key="label.files") if row.problem is None), None)
    if first is None:
        raise UserError(f"label.files={path} holds no row that can be read: {_EXPECTED}.")
    target = _target(first, kind_of(file))
    if target is None:
        keys = ", ".join(map(str, islice(first.columns, 12))) or "none"
        raise UserError(f"label.files={path}: {_EXPECTED}; found the columns {keys}.")
    return target


def _is_page(path: Path) -> bool:
    """Whether a file is what the page downloads: one JSON object that names the format."""
    if path.suffix.lower() != ".json":
        return False
    try:
        with path.open(encoding="utf-8-sig") as source:
            head = source.read(64).lstrip()
            if not head.startswith("{"):  # an array of rows
                return False
            content = json.loads(head + source.read())
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("format") == page.FORMAT


def _target(row: SourceRow, ending: str | None) -> LabelTarget | None:
    columns = row.columns
    if isinstance(columns.get("data"), dict):
        return LabelTarget.label_studio
    if isinstance(columns.get("fields"), dict):
        return LabelTarget.argilla
    if "annotation_id" in columns and "lead_time" in columns:
        kind = "CSV" if ending == ".csv" else "JSON-MIN"
        raise UserError(
            f"{row.origin} is Label Studio's export of the type {kind}, which does not say what "
            "was skipped. Export it again with the type JSON."
        )
    if "pair_id" in columns and ("preference" in columns or "ranking" in columns):
        return {".csv": LabelTarget.csv, ".xlsx": LabelTarget.xlsx}.get(
            ending or "", LabelTarget.jsonl
        )
    return None


def read_labels(path: Path) -> tuple[LabelTarget, Labels]:
    """The tool that a file of labels comes from, and its judgements one by one. Raises UserError
    for a file that holds no labels or can't be read.
    """
    target = detect(path)
    return target, LABEL_TOOLS[target].read(path)


def write_files(
    export: Export, targets: Sequence[LabelTarget], folder: Path
) -> dict[LabelTarget, list[Path]]:
    """Write the files for annotators to out/ of the run directory `folder`; the files by target.

    A file that exists stays as it is: it may hold labels by now.
    """
    out, temporary = folder / OUT_FOLDER, folder / (OUT_FOLDER + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    files: dict[LabelTarget, list[Path]] = {}
    for target in targets:
        part = temporary / target.value
        part.mkdir(parents=True)
        files[target] = []
        for path in LABEL_TOOLS[target].write(export, part):
            final = out / path.relative_to(part)
            if not final.exists():
                final.parent.mkdir(parents=True, exist_ok=True)
                path.replace(final)
            files[target].append(final)
    shutil.rmtree(temporary, ignore_errors=True)
    return files
