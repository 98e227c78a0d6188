"""Our own labelling page: one HTML file for a person with a browser and no server, and the labels
file that it downloads.

The page holds what annotators may know and nothing else: the export's id, kind, title and
instructions, and each task's id, prompt and answers' texts in the order shown. To the page a text
is data: in the file it is JSON in which no markup can begin, it reaches the screen through
`textContent` alone, and a content security policy lets nothing run or load but the page's own
script and style.

Labels file (JSON): {"format": "rlhf-labels", "version": 1, "export", "annotator", "saved",
"labels": [{"task", "verdict", "ranking", "ratings", "comment", "seconds", "time", "prompt",
"tools" of a prompt that has some, "shown"}]}; a label's fields are those of `Judgement`. The page's
sources are in web/.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from conf.choices import LabelKind
from rlhf.labels.files import write_text
from rlhf.labels.records import Export, Judgement, Ranking, Unreadable, Verdict
from rlhf.types import UserError

FORMAT, VERSION = "rlhf-labels", 1
# in this order: each script uses those before it
_SCRIPTS = ("labels.js", "view.js", "prompt.js", "page.js", "keys.js")
# keys.js begins, so that what it begins with comes before
_SCRIPTS_SERVED = (*_SCRIPTS[:-1], "server.js", _SCRIPTS[-1])
# What could end or open an element or a comment, what old JavaScript took for line ends, and lone
# surrogates, which UTF-8 can't hold.
_UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")
_VERDICTS = {
    verdict.value: verdict
    for verdict in (Verdict.left, Verdict.right, Verdict.tie, Verdict.skip, Verdict.ranked)
}


@dataclass(frozen=True, slots=True)
class Served:
    """Where a server gives the page to one annotator and keeps the labels."""

    annotator: str
    post: str  # path that takes the labels file
    kept: dict[str, Any] | None  # the labels file that the server has


# What the page says about where labels go, by itself and from a server.
_TEXTS = {
    "promise": (
        "Nothing that it does leaves your computer.",
        "Your labels are saved on the server that it came from.",
    ),
    "name_hint": (
        "It is written into your labels file. Use the same one each time.",
        "Your link is for this name. It is written into your labels file.",
    ),
    "saved": (
        "Your labels are saved in this browser after each step. Nothing is sent anywhere: download "
        "the labels file and hand it over yourself.",
        "Your labels are saved in this browser and on the server after each step. There is nothing "
        "to hand over.",
    ),
}


def write(export: Export, folder: Path) -> list[Path]:
    """Write label-<export>.html to `folder`. Raises UserError for a prompt that is neither a text
    nor a list of messages with texts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [write_text(folder / f"label-{export.id}.html", render(export))]


def render(export: Export, served: Served | None = None) -> str:
    """The page as HTML, of `served` for one annotator. Raises UserError as `write`."""
    data = page_data(export)
    if served is not None:
        data["server"] = {
            "annotator": served.annotator,
            "post": served.post,
            "kept": served.kept,
        }
    which = 0 if served is None else 1
    parts = {
        "policy": policy(served),
        "style": _source("page.css"),
        "script": _script(served),
        "data": embedded(data),
        **{name: texts[which] for name, texts in _TEXTS.items()},
    }
    return Template(_source("page.html")).substitute(parts)


def _script(served: Served | None) -> str:
    names = _SCRIPTS if served is None else _SCRIPTS_SERVED
    return "\n".join(_source(name) for name in names)


def policy(served: Served | None = None) -> str:
    """The page's content security policy; of `served` with leave to send its labels."""
    parts = {
        "default-src": "'none'",  # no request of any kind
        "script-src": f"'sha256-{_hash(_script(served))}'",
        "style-src": f"'sha256-{_hash(_source('page.css'))}'",
        "base-uri": "'none'",
        "form-action": "'none'",
        # a text can't be assigned where it would be read as markup or code
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    if served is not None:
        parts["connect-src"] = "'self'"
    return "; ".join(f"{name} {value}" for name, value in parts.items())


def page_data(export: Export) -> dict[str, Any]:
    """All that the page holds. Raises UserError as `write`."""
    tasks = []
    for task in export.tasks:
        if not isinstance(task.prompt, str) and not _is_chat(task.prompt):
            raise UserError(
                f"task {task.id}: its prompt must be a text or a list of {{role, content}} texts "
                f"to be shown; found {task.prompt!r}."
            )
        functions = {"tools": task.tools} if task.tools else {}
        shown = list(task.shown)
        tasks.append({"id": task.id, "prompt": task.prompt, **functions, "shown": shown})
    return {
        "export": export.id,
        "kind": LabelKind(export.kind).value,
        "title": export.title,
        "instructions": export.instructions,
        "ratings": export.ratings,
        "comments": export.comments,
        "tasks": tasks,
    }


def embedded(value: Any) -> str:
    """`value` as JSON that may be put inside a script element: nothing in it is markup, and parsing
    gives `value` again.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def read(path: Path) -> Iterator[Judgement | Unreadable]:
    """The labels of a file that the page downloaded. Raises UserError at once, before the first
    label is read, for a file of another format or version.
    """
    file = _labels_file(path)
    return _judgements(path, file["annotator"], file["labels"])


def _judgements(
    path: Path, annotator: str, labels: Sequence[Any]
) -> Iterator[Judgement | Unreadable]:
    for number, entry in enumerate(labels, start=1):
        place = f"{path}, label {number}"
        try:
            yield _judgement(entry, annotator, place)
        except ValueError as error:
            task = entry.get("task") if isinstance(entry, dict) else None
            yield Unreadable(place, task if isinstance(task, str) else "", str(error))


def _labels_file(path: Path) -> dict[str, Any]:
    expected = "Expected a labels file as the labelling page downloads it"
    try:
        file = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}. {expected}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON: {error}. {expected}.") from error
    if not isinstance(file, dict):
        raise UserError(f"{path}: holds a {type(file).__name__}. {expected}: format {FORMAT!r}.")
    if file.get("format") != FORMAT:
        raise UserError(f"{path}: format {file.get('format')!r}. {expected}: format {FORMAT!r}.")
    if type(file.get("version")) is not int or file["version"] != VERSION:
        raise UserError(
            f"{path}: version {file.get('version')!r}, expected {VERSION}. Make the labels file "
            "with the page of this toolkit's version."
        )
    if not isinstance(file.get("annotator"), str) or not file["annotator"].strip():
        raise UserError(
            f"{path}: annotator {file.get('annotator')!r}. {expected}: with the annotator's name."
        )
    if not isinstance(file.get("labels"), list):
        raise UserError(
            f"{path}: labels is {type(file.get('labels')).__name__}. {expected}: with a list of "
            "labels."
        )
    return file


def _judgement(entry: Any, annotator: str, place: str) -> Judgement:
    """An entry of a labels file. Raises ValueError, with what does not fit."""
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, found {type(entry).__name__}")
    task, verdict, comment = entry.get("task"), entry.get("verdict"), entry.get("comment", "")
    if not isinstance(task, str) or not task:
        raise ValueError(f"task: expected an id, found {task!r}")
    if not isinstance(verdict, str) or verdict not in _VERDICTS:
        raise ValueError(f"verdict: expected one of {', '.join(_VERDICTS)}, found {verdict!r}")
    if not isinstance(comment, str):
        raise ValueError(f"comment: expected a text, found {comment!r}")
    prompt, tools, shown = entry.get("prompt"), entry.get("tools"), entry.get("shown")
    if prompt is not None and not isinstance(prompt, str) and not _is_chat(prompt):
        raise ValueError(f"prompt: expected a text or messages, found {prompt!r}")
    if tools is not None and not _is_list(tools, dict):
        raise ValueError(f"tools: expected a list of functions, found {tools!r}")
    if shown is not None and not _is_list(shown, str):
        raise ValueError(f"shown: expected a list of texts, found {shown!r}")
    return Judgement(
        task=task,
        annotator=annotator,
        verdict=_VERDICTS[verdict],
        ranking=_ranking(entry.get("ranking", []), _VERDICTS[verdict], shown),
        ratings=_ratings(entry.get("ratings", []), shown),
        comment=comment,
        seconds=_seconds(entry.get("seconds")),
        time=_time(entry.get("time")),
        place=place,
        prompt=prompt,
        shown=None if shown is None else tuple(shown),
        tools=tools,
    )


def _ranking(value: Any, verdict: Verdict, shown: list[str] | None) -> Ranking:
    """Raises ValueError."""
    if not isinstance(value, list) or not all(group and _is_list(group, int) for group in value):
        raise ValueError(f"ranking: expected lists of places, the best first, found {value!r}")
    slots = [slot for group in value for slot in group]
    if (verdict is Verdict.ranked) != bool(slots):
        raise ValueError(f"ranking: {value!r} does not go with verdict {verdict.value}")
    last = math.inf if shown is None else len(shown) - 1
    if len(set(slots)) < len(slots) or not all(0 <= slot <= last for slot in slots):
        raise ValueError(
            f"ranking: expected each place, counted from 0, at most once, found {value!r}"
        )
    return tuple(map(tuple, value))


def _ratings(value: Any, shown: list[str] | None) -> tuple[int | None, ...]:
    """Raises ValueError."""
    fits = isinstance(value, list) and all(
        rating is None or (type(rating) is int and 1 <= rating <= 5) for rating in value
    )
    if not fits or (value and shown is not None and len(value) != len(shown)):
        raise ValueError(f"ratings: expected 1 to 5 or null of each answer, found {value!r}")
    return tuple(value)


def _seconds(value: Any) -> float | None:
    """Raises ValueError."""
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"seconds: expected a number from 0, found {value!r}")
    return float(value)


def _time(value: Any) -> str | None:
    """Raises ValueError."""
    if value is not None:
        try:
            datetime.fromisoformat(value)
        except (TypeError, ValueError):
            raise ValueError(f"time: expected ISO 8601, found {value!r}") from None
    return value


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(part) is kind for part in value)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _source(name: str) -> str:
    """One of the page's sources. Its line ends are LF, as browsers hash them."""
    source = resources.files(__package__).joinpath("web", name)
    return source.read_text(encoding="utf-8").strip()


def _hash(text: str) -> str:
    """A hash for a content security policy."""
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
