"""What each format with objects inside its columns reads of them. All else there is counted by
name, so that nothing of a row goes without a word.

A path names a key; `[]` steps into a list, `*` stands for any characters of a name. A key that ends
a path holds no object of its own, unless any name will do there.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

# of Label Studio: who made what, when and in which project says nothing about a pair
_BOOKKEEPING = ("id", "unique_id", "*created*", "*updated*", "task", "project", "import_id")
_RESULT = (
    "annotations[].result[].id",
    "annotations[].result[].from_name",
    "annotations[].result[].to_name",
    "annotations[].result[].type",
    "annotations[].result[].origin",
    "annotations[].result[].value.selected",
    "annotations[].result[].value.choices",
    "annotations[].result[].value.text",
    "annotations[].result[].value.ranker.*",
)
_ANNOTATION = (
    *(f"annotations[].{key}" for key in _BOOKKEEPING),
    "annotations[].result_count",
    *(f"annotations[].completed_by.{key}" for key in ("email", "username", "id", "*_name")),
    "annotations[].was_cancelled",
    "annotations[].lead_time",
    *_RESULT,
)
INSIDE: dict[str, tuple[str, ...]] = {
    "nectar": ("answers[].answer", "answers[].rank"),
    "mt_bench_answer": ("choices[].index", "choices[].turns"),
    "label_studio": ("data.*", *_ANNOTATION),
    "label_studio_ranker": (
        *(f"data.items[].{key}" for key in ("id", "title", "body", "html")),
        "data.*",
        *_ANNOTATION,
    ),
    "argilla": (
        "metadata.*",
        "fields.prompt",
        "fields.response?*",
        "responses.*[].value",
        "responses.*[].user_id",
        "responses.*[].status",
    ),
}
# columns that a format consumes as a whole, and reads nothing of
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "label_studio": ("predictions",),
    "label_studio_ranker": ("predictions",),
    "argilla": ("suggestions", "vectors"),
}


def unread(name: str, columns: Mapping[str, Any]) -> list[str]:
    """The keys of a row's `columns` that format `name` is made of and never reads; empty ones are
    not among them. A format without nested objects has none.
    """
    paths = INSIDE.get(name)
    if paths is None:
        return []
    found = {column: None for column in LEFT_OUT.get(name, ()) if columns.get(column)}
    for column, value in columns.items():
        inside = [path.replace("[]", "").split(".") for path in paths]
        onward = [path[1:] for path in inside if path[0] == column]
        if onward:
            _walk(value, onward, column, found)
    return list(found)


def _walk(value: Any, paths: list[list[str]], where: str, found: dict[str, None]) -> None:
    """Note the keys in `value` that begin no path; `paths` are those that lead on from it."""
    if isinstance(value, list):
        for item in value:
            _walk(item, paths, f"{where}[]", found)
        return
    if not isinstance(value, Mapping):
        return
    for key, inner in value.items():
        name = f"{where}.{key}"
        fitting = [path for path in paths if fnmatchcase(str(key), path[0])]
        onward = [path[1:] for path in fitting if len(path) > 1]
        object_at_end = isinstance(inner, Mapping) and not onward and ["*"] not in fitting
        if inner in (None, "", [], {}):
            continue
        if not fitting or object_at_end:
            found[name] = None
        elif onward:
            _walk(inner, onward, name, found)
