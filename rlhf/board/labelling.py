"""Labels of an export, kept on the server: who may label, by a link of their own each, and what
they said so far.

    .board/labels/<export>/annotators.json   {"run", "stage", "annotators": [{"token", "name"}]}
    .board/labels/<export>/files/1.json      the labels file of the first annotator, and so on
"""

import hmac
import json
import os
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.board import OWN
from rlhf.board.app import Place
from rlhf.board.guard import ANNOTATE
from rlhf.board.paths import NotHere, lies_inside, plain_name, run_directories, stage_folder
from rlhf.labels.ledger import EXPORT_FILE, read_export
from rlhf.labels.records import Export, Judgement
from rlhf.labels.targets import page as label_page
from rlhf.types import UserError

FOLDER = f"{OWN}/labels"
MOST = 64 << 20  # bytes of a labels file
MOST_ANNOTATORS = 100
_LONGEST_NAME = 100
_LOCK = threading.Lock()  # of annotators.json and the files


@dataclass(frozen=True, slots=True)
class Known:
    """An export in a run's directory, by its header alone."""

    run: str
    stage: str
    id: str
    title: str
    kind: str
    tasks: int
    time: float  # seconds since 1970


@dataclass(frozen=True, slots=True)
class Annotator:
    """Somebody with a link."""

    number: int  # from 1
    token: str
    name: str
    labels: int = 0  # tasks that they labelled
    time: float | None = None  # of their last label; seconds since 1970

    @property
    def link(self) -> str:
        """The path that opens their page."""
        return ANNOTATE + self.token


def exports(runs: Path) -> list[Known]:
    """Every export of stage=label below `runs`, the newest first."""
    found = []
    for run, stage, folder in run_directories(runs):
        known = _known(run, stage, folder / EXPORT_FILE)
        if known is not None:
            found.append(known)
    return sorted(found, key=lambda known: known.time, reverse=True)


def _known(run: str, stage: str, path: Path) -> Known | None:
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        return Known(
            run,
            stage,
            str(header["id"]),
            str(header["title"]),
            str(header["kind"]),
            int(header["tasks"]),
            path.stat().st_mtime,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None  # another program's export.json


class Desk:
    """An export, its annotators and their files."""

    def __init__(self, place: Place, run: str, stage: str) -> None:
        """Raises NotHere where there is no such export, UserError where it was changed."""
        folder = stage_folder(place, run, stage)
        if not (folder / EXPORT_FILE).is_file() or not lies_inside(
            folder / EXPORT_FILE, place.runs
        ):
            raise NotHere
        self.run, self.stage = run, stage
        self.export: Export = read_export(folder)
        self.folder = place.runs / FOLDER / plain_name(self.export.id)
        self.files = self.folder / "files"

    @property
    def list_file(self) -> Path:
        """Who may label."""
        return self.folder / "annotators.json"

    def annotators(self) -> list[Annotator]:
        """Everybody with a link, and how far they are."""
        entries = _entries(self.list_file)
        return [self._with_progress(number, entry) for number, entry in enumerate(entries, 1)]

    def _with_progress(self, number: int, entry: dict[str, str]) -> Annotator:
        path = self.file(number)
        count, time = 0, None
        kept = kept_labels(path)
        if kept is not None:
            count, time = len(kept["labels"]), path.stat().st_mtime
        return Annotator(number, entry["token"], entry["name"], count, time)

    def file(self, number: int) -> Path:
        """The labels file of an annotator."""
        return self.files / f"{number}.json"

    def add(self, name: str) -> None:
        """Another annotator, with a link. Raises ValueError, with the key of the words, for a name
        that does not fit.
        """
        name = " ".join(name.split())
        with _LOCK:
            entries = _entries(self.list_file)
            if not name or len(name) > _LONGEST_NAME:
                raise ValueError("labels.name.missing")
            if any(entry["name"] == name for entry in entries):
                raise ValueError("labels.name.twice")
            if len(entries) >= MOST_ANNOTATORS:
                raise ValueError("labels.name.many")
            entries.append({"token": secrets.token_urlsafe(24), "name": name})
            self._write(entries)

    def renew(self, number: int) -> None:
        """Another link for an annotator: the old one opens nothing any more. Raises NotHere."""
        with _LOCK:
            entries = _entries(self.list_file)
            if not 1 <= number <= len(entries):
                raise NotHere
            entries[number - 1]["token"] = secrets.token_urlsafe(24)
            self._write(entries)

    def _write(self, entries: list[dict[str, str]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"run": self.run, "stage": self.stage, "annotators": entries}
        _write_private(self.list_file, json.dumps(content, ensure_ascii=False))


def _entries(path: Path) -> list[dict[str, str]]:
    return list(_content(path).get("annotators", []))


def _content(path: Path) -> dict[str, Any]:
    """annotators.json; {} where there is none."""
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write_private(path: Path, text: str) -> None:
    """Whole or not at all, and for this user alone."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    with os.fdopen(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as out:
        out.write(text)
    beside.replace(path)


# ---- an annotator's link ----


def by_token(place: Place, token: str) -> tuple[Desk, Annotator]:
    """The export and the annotator whose link has the token. Raises NotHere."""
    for path, number, entry in _all_entries(place.runs):
        if hmac.compare_digest(entry["token"].encode(), token.encode("utf-8", "replace")):
            content = _content(path)
            desk = Desk(place, content["run"], content["stage"])
            if desk.list_file != path:  # the run was replaced by one with another export
                raise NotHere
            return desk, Annotator(number, entry["token"], entry["name"])
    raise NotHere


def _all_entries(runs: Path) -> Iterator[tuple[Path, int, dict[str, str]]]:
    for path in sorted((runs / FOLDER).glob("*/annotators.json")):
        for number, entry in enumerate(_entries(path), 1):
            yield path, number, entry


def kept_labels(path: Path) -> dict[str, Any] | None:
    """A labels file that was saved before; None where there is none."""
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def save(desk: Desk, annotator: Annotator, text: bytes, known: str) -> dict[str, Any] | None:
    """Keep what the annotator's page sent, a whole labels file. known: when the file was saved that
    the page goes on from, "" for none; where another was saved since, nothing changes and that one
    is returned. Raises UserError for anything but labels of this export by this annotator.
    """
    desk.files.mkdir(parents=True, exist_ok=True)
    path = desk.file(annotator.number)
    part = desk.files / f".{annotator.number}.{secrets.token_hex(4)}.part"
    try:
        part.write_bytes(text)
        _check(part, desk.export, annotator)
        with _LOCK:
            kept = kept_labels(path)
            if kept is not None and kept["saved"] != known:
                return kept
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return None


def _check(part: Path, export: Export, annotator: Annotator) -> None:
    """Raises UserError where the file is not what the annotator's page writes."""
    try:
        read = list(label_page.read(part))
        content = kept_labels(part) or {}
    except UserError as error:
        raise UserError(str(error).replace(str(part), "labels")) from error
    if content.get("export") != export.id or content.get("annotator") != annotator.name:
        raise UserError("these are the labels of another export, or of somebody else.")
    if not isinstance(content.get("saved"), str):
        raise UserError("the labels don't say when they were saved.")
    tasks = {task.id for task in export.tasks}
    for row in read:
        if not isinstance(row, Judgement) or row.task not in tasks:
            raise UserError("a label does not fit the tasks of this export.")
