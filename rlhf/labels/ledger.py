"""An export in its run directory.

    tasks.jsonl   a line a task with all that is hidden: whose answers, scores, order shown, gold,
    repeats. Annotators must not get it
    export.json   the export's id, kind, instructions, hash of tasks.jsonl, and how it was made
    out/          the files for annotators: nothing in it tells who wrote an answer
    server.json   where the tasks were pushed to, if they were

The import reads both and refuses them when tasks.jsonl is not the one that export.json was written
with.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.choices import LabelKind
from rlhf.labels.files import write_text
from rlhf.labels.records import Answer, Export, Role, Task
from rlhf.process.files import sha256, write_json
from rlhf.types import UserError

TASKS_FILE, EXPORT_FILE, OUT_FOLDER = "tasks.jsonl", "export.json", "out"
# {"url", "project"} of a Label Studio server that the tasks were pushed to
SERVER_FILE = "server.json"
_VERSION = 1
# fields of Export that export.json has as they are
_HEADER = tuple(f.name for f in dataclasses.fields(Export) if f.name not in ("tasks", "kind"))


def task_row(task: Task) -> dict[str, Any]:
    """A task as a line of tasks.jsonl."""
    return {
        "id": task.id,
        "role": task.role.value,
        "prompt": task.prompt,
        "tools": task.tools,
        "answers": [dataclasses.asdict(answer) for answer in task.answers],
        "order": list(task.order),
        "chosen_by": task.chosen_by,
        "best": task.best,
        "repeats": task.repeats,
    }


def task_of(row: dict[str, Any]) -> Task:
    """What `task_row` wrote. Raises KeyError, TypeError or ValueError for anything else."""
    task = Task(
        id=row["id"],
        prompt=row["prompt"],
        answers=tuple(Answer(**answer) for answer in row["answers"]),
        order=tuple(row["order"]),
        role=Role(row["role"]),
        chosen_by=row["chosen_by"],
        best=row["best"],
        repeats=row["repeats"],
        tools=row.get("tools"),  # older ledgers have none
    )
    if sorted(task.order) != list(range(len(task.answers))) or len(task.answers) < 2:
        raise ValueError(f"order {list(task.order)} of {len(task.answers)} answers")
    return task


def write_export(export: Export, folder: Path) -> None:
    """Write tasks.jsonl and export.json."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(task_row(task), ensure_ascii=False) + "\n" for task in export.tasks]
    tasks_file = write_text(folder / TASKS_FILE, "".join(lines))
    header = {"version": _VERSION, **{name: getattr(export, name) for name in _HEADER}}
    header |= {"kind": export.kind.value, "tasks": len(export.tasks), "sha256": sha256(tasks_file)}
    write_json(folder / EXPORT_FILE, header)


def read_export(folder: Path) -> Export:
    """Raises UserError where the folder holds no export, or one whose ledger was changed."""
    header_file, tasks_file = folder / EXPORT_FILE, folder / TASKS_FILE
    for path in (header_file, tasks_file):
        if not path.is_file():
            raise UserError(
                f"{path}: no such file. Expected the run directory of stage=label "
                "label.mode=export; name it with label.export=DIRECTORY."
            )
    try:
        header = json.loads(header_file.read_text(encoding="utf-8"))
        if header["version"] != _VERSION:
            raise UserError(f"{header_file}: version {header['version']}, expected {_VERSION}.")
        if header["sha256"] != sha256(tasks_file):
            raise UserError(
                f"{tasks_file} was changed since {header_file.name} was written. Restore it: "
                "without it no label can be trusted."
            )
        with tasks_file.open(encoding="utf-8") as source:
            tasks = tuple(task_of(json.loads(line)) for line in source)
        fields = {name: header[name] for name in _HEADER}
        return Export(tasks=tasks, kind=LabelKind(header["kind"]), **fields)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise UserError(
            f"{folder}: its {TASKS_FILE} and {EXPORT_FILE} can't be read: "
            f"{type(error).__name__}: {error}."
        ) from error


def read_resumable(folder: Path, options: Mapping[str, Any]) -> Export | None:
    """The export that an earlier start wrote to `folder`; None where there is none.

    `options`: those that decide what is in an export, by key, where they are not the defaults.
    Raises UserError where the earlier start had others.
    """
    if not (folder / EXPORT_FILE).is_file():
        return None
    export = read_export(folder)
    old, new = export.details.get("options", {}), json.loads(json.dumps(options))
    changed = [
        f"{key}: {old.get(key, 'default')!r} -> {new.get(key, 'default')!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise UserError(
            f"{folder / EXPORT_FILE} was made with other options ({'; '.join(changed)}), and "
            "people may be labelling it. Go on with the options that "
            "it was made with (label.targets and label.push may change), or choose another "
            "run.name."
        )
    return export
