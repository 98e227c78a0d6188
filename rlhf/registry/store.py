"""The registry's file: SQLite with two tables, versions and history, to which rows can only be
added. Who holds an alias is read from the history, so nothing is ever written over.

Triggers refuse every change and removal, also by other programs that open the file. Whoever may
write the file can remove the triggers; then the chain of hashes over the history tells that a line
was changed or taken out (`Registry.broken`), unless all later hashes were made anew too.

Processes may write at once: each writes in a transaction that begins by taking the lock.
"""

import contextlib
import datetime
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.registry.gate import Finding, Gate
from rlhf.registry.records import MOVES, Action, Draft, Event, Figure, ModelFile, Version, Why
from rlhf.types import UserError

FILE = "registry.sqlite"  # in run.dir
_LAYOUT = 1  # user_version of the file
_WAIT_S = 60.0  # for another process's transaction
_MAKE = """
CREATE TABLE versions (
    name TEXT NOT NULL, number INTEGER NOT NULL, digest TEXT NOT NULL, path TEXT NOT NULL,
    files TEXT NOT NULL, weights TEXT, lineage TEXT NOT NULL, card TEXT, time TEXT NOT NULL,
    who TEXT NOT NULL, PRIMARY KEY (name, number), UNIQUE (name, digest)
);
CREATE TABLE history (
    id INTEGER PRIMARY KEY, time TEXT NOT NULL, who TEXT NOT NULL, reason TEXT NOT NULL,
    action TEXT NOT NULL, name TEXT NOT NULL, number INTEGER NOT NULL, alias TEXT,
    detail TEXT NOT NULL, chain TEXT NOT NULL
);
"""
# INSERT OR REPLACE removes rows without asking a DELETE trigger, hence the guards before an insert.
_GUARDS = """
CREATE TRIGGER {table}_stay BEFORE UPDATE ON {table}
BEGIN SELECT RAISE(ABORT, 'the {table} of a registry can not be changed'); END;
CREATE TRIGGER {table}_remain BEFORE DELETE ON {table}
BEGIN SELECT RAISE(ABORT, 'the {table} of a registry can not be removed'); END;
CREATE TRIGGER {table}_once BEFORE INSERT ON {table} WHEN {taken}
BEGIN SELECT RAISE(ABORT, 'the {table} of a registry can not be replaced'); END;
"""
_TAKEN = {
    "versions": "EXISTS (SELECT 1 FROM versions WHERE name = NEW.name"
    " AND (number = NEW.number OR digest = NEW.digest))",
    "history": "NEW.id IS NOT (SELECT coalesce(max(id), 0) + 1 FROM history)",
}


def now() -> str:
    """The time as the registry writes it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class Registry:
    """An open registry. Close it, or use it as a context manager."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Raises UserError where there is no registry (unless `create`), or another file."""
        if not create and not path.is_file():
            raise UserError(
                f"{path}: there is no registry. stage=registry stage.action=register makes one."
            )
        self.path = path
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None)
            self._open()
        except sqlite3.Error as error:
            raise UserError(
                f"{path} can't be used as a registry ({error}). Expected the SQLite file that "
                "stage=registry wrote, which can be written."
            ) from error

    def _open(self) -> None:
        self._db.execute("PRAGMA synchronous = FULL")
        if self._layout() == 0:
            with self._writing():
                if self._layout() == 0:  # no other process was quicker
                    self._make()
        if self._layout() != _LAYOUT:
            raise UserError(
                f"{self.path} has layout {self._layout()}: this version of the toolkit knows "
                f"{_LAYOUT}. Use a newer one."
            )

    def _layout(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    def _make(self) -> None:
        if self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise sqlite3.DatabaseError("it holds other tables")
        statements = [*_MAKE.split(";\n")]
        for table, taken in _TAKEN.items():
            statements += _GUARDS.format(table=table, taken=taken).split("END;\n")
        for statement in filter(str.strip, statements):
            end = " END" if "TRIGGER" in statement else ""
            self._db.execute(statement + end)
        self._db.execute(f"PRAGMA user_version = {_LAYOUT}")

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> "Registry":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A transaction that no other process writes in."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    # ---- reading ----

    def names(self) -> list[str]:
        """The models there are."""
        rows = self._db.execute("SELECT DISTINCT name FROM versions ORDER BY name")
        return [row[0] for row in rows]

    def versions(self, name: str) -> list[Version]:
        """All versions of a model, the first one first."""
        rows = self._db.execute(f"{_VERSION} WHERE name = ? ORDER BY number", (name,))
        return [_version(row) for row in rows]

    def version(self, name: str, which: str | None = None) -> Version:
        """A version by its number or alias; None: the newest. Raises UserError."""
        found = self.versions(name)
        if not found:
            known = ", ".join(self.names()) or "none"
            raise UserError(f"{self.path} has no model {name!r}. There are: {known}.")
        if which is None:
            return found[-1]
        number = int(which) if which.isdigit() else self.holders(name).get(which)
        for version in found:
            if version.number == number:
                return version
        holding = ", ".join(f"{alias} ({held})" for alias, held in self.holders(name).items())
        raise UserError(
            f"{self.path}: {name} has no version or alias {which!r}. Versions: 1 to "
            f"{found[-1].number}; aliases: {holding or 'none'}."
        )

    def known_by(self, weights: str) -> list[str]:
        """The versions, as NAME@NUMBER, whose weights have that fingerprint."""
        rows = self._db.execute(
            "SELECT name, number FROM versions WHERE weights = ? ORDER BY name, number", (weights,)
        )
        return [f"{name}@{number}" for name, number in rows]

    def history(self, name: str | None = None) -> list[Event]:
        """What happened, the oldest first; None: of all models."""
        rows = self._db.execute(f"{_EVENT} ORDER BY id")
        events = [_event(row) for row in rows]
        return [event for event in events if name in (None, event.name)]

    def holders(self, name: str) -> dict[str, int]:
        """The number of the version that holds each alias."""
        return {alias: line[-1] for alias, line in _lines(self.history(name)).items()}

    def figures(self, name: str, number: int) -> dict[str, Figure]:
        """What was measured of a version; of a figure that was measured twice the newest."""
        out: dict[str, Figure] = {}
        for event in self.history(name):
            if event.number == number and event.action is Action.measure:
                source = str(event.detail["source"])
                for figure, value in event.detail["figures"].items():
                    out[figure] = Figure(float(value), source)
        return out

    def broken(self) -> list[str]:
        """Where the chain over the history breaks, a sentence each; empty where it is whole."""
        out = []
        before, last = "", 0
        for row in self._db.execute(f"{_EVENT} ORDER BY id"):
            event = _event(row)
            if event.id != last + 1:
                out.append(f"before event {event.id} some are missing")
            elif event.chain != _link(before, row[:-1]):
                out.append(f"event {event.id} ({event.action.value} {event.name}) was changed")
            before, last = event.chain, event.id
        for name in self.names():
            out += self._unlike(name)
        return out

    def _unlike(self, name: str) -> list[str]:
        """Versions that are not what their registration says."""
        said = {
            event.number: event.detail.get("record")
            for event in self.history(name)
            if event.action is Action.register
        }
        out = []
        for version in self.versions(name):
            if said.get(version.number) != _record(version.draft):
                out.append(f"version {version.label} was changed")
        return out

    # ---- writing ----

    def register(
        self, draft: Draft, why: Why, figures: Sequence[tuple[str, Mapping[str, float]]] = ()
    ) -> tuple[Version, bool]:
        """The model as a version, with its figures by where they come from; and whether it is new:
        the same files under the same name are the version that there is.
        """
        with self._writing():
            for version in self.versions(draft.name):
                if version.draft.digest == draft.digest:
                    return version, False
            found = self._db.execute(
                "SELECT coalesce(max(number), 0) FROM versions WHERE name = ?", (draft.name,)
            )
            version = Version(draft, int(found.fetchone()[0]) + 1, now(), why.who)
            self._db.execute(
                "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", _row(version)
            )
            detail = {"digest": draft.digest, "record": _record(draft)}
            self._add(why, Action.register, version, None, detail)
            self._measure(version, why, figures)
            return version, True

    def measure(
        self, version: Version, why: Why, figures: Sequence[tuple[str, Mapping[str, float]]]
    ) -> None:
        """Further figures of a version, by where they come from."""
        with self._writing():
            self._measure(version, why, figures)

    def _measure(
        self, version: Version, why: Why, figures: Sequence[tuple[str, Mapping[str, float]]]
    ) -> None:
        for source, values in figures:
            detail = {"source": source, "figures": dict(values)}
            self._add(why, Action.measure, version, None, detail)

    def promote(
        self, version: Version, alias: str, why: Why, gate: Gate, *, force: bool = False
    ) -> tuple[bool, int | None, list[Finding]]:
        """Give an alias to a version, if the gate lets it or with `force`. Returns whether it did,
        the number of the version that held the alias before, and what the gate found. What was
        withheld stands in the history too.

        Raises UserError where the version holds it already.
        """
        name = version.draft.name
        with self._writing():
            before = self.holders(name).get(alias)
            if before == version.number:
                raise UserError(f"{version.label} holds {alias} already.")
            holder = None if before is None else self.figures(name, before)
            findings = gate.findings(self.figures(name, version.number), holder)
            passed = all(finding.passed for finding in findings)
            done = passed or force
            detail = {
                "previous": before,
                "gate": [finding.as_json() for finding in findings],
                "forced": done and not passed,
            }
            action = Action.promote if done else Action.withheld
            self._add(why, action, version, alias, detail)
        return done, before, findings

    def target(self, name: str, alias: str) -> Version:
        """The version to which a rollback of an alias goes. Raises UserError."""
        line = _lines(self.history(name)).get(alias, [])
        if len(line) < 2:
            raise UserError(
                f"{name}: no version held {alias} before "
                f"{f'version {line[-1]}' if line else 'now'}, so there is nothing to go back to."
            )
        return self.version(name, str(line[-2]))

    def rollback(self, name: str, alias: str, why: Why, to: Version) -> int:
        """Give an alias back to `to`, which held it before. Returns the number of the version that
        loses it. Raises UserError where the alias moved since `to` was looked up.
        """
        with self._writing():
            target = self.target(name, alias)
            if target.number != to.number:
                raise UserError(
                    f"{name}: {alias} was moved by someone else meanwhile. Look (stage.action="
                    "show), and roll back again if it is still wanted."
                )
            before = self.holders(name)[alias]
            self._add(why, Action.rollback, target, alias, {"previous": before})
        return before

    def _add(
        self, why: Why, action: Action, version: Version, alias: str | None, detail: Any
    ) -> None:
        last = self._db.execute("SELECT id, chain FROM history ORDER BY id DESC LIMIT 1").fetchone()
        number, before = last if last is not None else (0, "")
        text = json.dumps(detail, sort_keys=True)
        said: tuple[Any, ...] = (number + 1, now(), why.who, why.reason, action.value)
        row = (*said, version.draft.name, version.number, alias, text)
        marks = ", ".join("?" * (len(row) + 1))
        self._db.execute(f"INSERT INTO history VALUES ({marks})", (*row, _link(before, row)))


_VERSION = (
    "SELECT name, number, digest, path, files, weights, lineage, card, time, who FROM versions"
)
_EVENT = "SELECT id, time, who, reason, action, name, number, alias, detail, chain FROM history"


def _lines(history: Sequence[Event]) -> dict[str, list[int]]:
    """Of each alias the versions that held it and were not rolled back from, the holder last."""
    out: dict[str, list[int]] = {}
    for event in history:
        if event.action not in MOVES or event.alias is None:
            continue
        line = out.setdefault(event.alias, [])
        if event.action is Action.rollback:
            line.pop()
        else:
            line.append(event.number)
    return out


def _link(before: str, row: Sequence[Any]) -> str:
    """The hash of an event that follows one with the hash `before`."""
    return hashlib.sha256(json.dumps([before, *row]).encode()).hexdigest()


def _record(draft: Draft) -> str:
    """A hash of all that a version says of its model."""
    rows = [[file.path, file.sha256, file.bytes] for file in draft.files]
    content = [draft.name, draft.path, draft.digest, rows, draft.weights, draft.lineage, draft.card]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _row(version: Version) -> tuple[Any, ...]:
    draft = version.draft
    files = [[file.path, file.sha256, file.bytes] for file in draft.files]
    texts = json.dumps(files), draft.weights, json.dumps(draft.lineage, sort_keys=True)
    return (
        draft.name,
        version.number,
        draft.digest,
        draft.path,
        *texts,
        draft.card,
        version.time,
        version.who,
    )


def _version(row: Sequence[Any]) -> Version:
    name, number, digest, path, files, weights, lineage, card, time, who = row
    listed = tuple(ModelFile(*file) for file in json.loads(files))
    draft = Draft(name, path, listed, digest, weights, json.loads(lineage), card)
    return Version(draft, number, time, who)


def _event(row: Sequence[Any]) -> Event:
    number, time, who, reason, action, name, version, alias, detail, chain = row
    why = Why(who, reason)
    said = json.loads(detail)
    return Event(number, time, why, Action(action), name, version, alias, said, chain)
