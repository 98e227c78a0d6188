"""JSON lines for other tools: a row for each task, and labels read back.

    {"pair_id", "export_id", "prompt", "tools", "response_a", "response_b", "preference": null,
    "rating_a": null, "rating_b": null, "annotator": "", "comment"}

or, for rankings, response_1, response_2 ... and "ranking". The columns are those of a sheet
(sheet.py), with the values of the sheet's cells; the prompt is a text or a list of messages as the
data has it, and so is the list of tools, where the prompt has some. With label.prelabel a row has a
"suggestion" with preference or ranking and its probability.

Labels come back in the same rows, or as rows with pair_id, preference or ranking, and what else is
known: annotator, comment, ratings, seconds, time, annotation. Several rows of one task are several
judgements.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from conf.choices import LabelKind
from rlhf.data.formats.sheet import SIDES, response_columns
from rlhf.data.rows import text_of
from rlhf.labels.files import write_text
from rlhf.labels.records import Export, Judgement, Task, Unreadable
from rlhf.labels.targets import sheet
from rlhf.labels.targets.shared import check_texts, guidance, suggestion_for

TASKS_FILE, GUIDE_FILE = "label_tasks.jsonl", "label_tasks.txt"


def write(export: Export, folder: Path) -> list[Path]:
    """Write tasks and instructions to `folder`; returns the files. Raises UserError for text that
    no encoding holds.
    """
    check_texts(export)
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(
        json.dumps(_row(task, export), ensure_ascii=False) + "\n" for task in export.tasks
    )
    guide = guidance(export, sheet.HOW[export.kind])
    return [write_text(folder / TASKS_FILE, lines), write_text(folder / GUIDE_FILE, guide)]


def _row(task: Task, export: Export) -> dict[str, Any]:
    column = sheet.answer_column(export.kind)
    texts = sheet.texts_of(task, export.kind) | {"prompt": task.prompt}
    if task.tools:
        texts["tools"] = task.tools
    row: dict[str, Any] = {"pair_id": task.id, "export_id": export.id, **texts, column: None}
    if export.ratings:
        row |= {name.replace("response", "rating"): None for name in response_columns(texts)}
    row["annotator"] = ""
    if export.comments:
        row["comment"] = ""
    suggested = suggestion_for(task, export)
    if suggested is not None:
        best = ">".join(str(slot + 1) for slot in suggested.order)
        if export.kind is LabelKind.pair:
            best = SIDES[suggested.order[0]]
        row["suggestion"] = {column: best, "probability": suggested.probability}
    return row


def read(path: Path) -> Iterator[Judgement | Unreadable]:
    """Every labelled row. Raises UserError where the file as a whole can't be read."""
    yield from sheet.judgements(path, _texts)


def _texts(row: Mapping[str, Any]) -> tuple[Any, tuple[str, ...] | None]:
    """Prompt and responses of a row, None where it has none."""
    names = response_columns(row)
    if not names:
        return row.get("prompt"), None
    return row.get("prompt"), tuple(text_of(row, name, empty=True) for name in names)
