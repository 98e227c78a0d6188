"""The gateway's file: SQLite with a write-ahead log, written by one thread.

Work that waits is done in one transaction, and nobody is told that it is done before it is on the
disk (synchronous = FULL): feedback that was acknowledged survives kill -9 and a power cut.
"""

import contextlib
import fcntl
import logging
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from rlhf.types import UserError

LOG = logging.getLogger("rlhf.gateway")
FILE = "feedback.sqlite"
_LAYOUT = 1  # user_version of the file
_MOST = 256  # pieces of work in a transaction
_WAIT_S = 30.0
_MAKE = """
CREATE TABLE users (user TEXT PRIMARY KEY, arm TEXT NOT NULL, weights TEXT NOT NULL, time REAL);
CREATE TABLE epochs (id INTEGER PRIMARY KEY, labels TEXT NOT NULL, time REAL NOT NULL);
CREATE TABLE answers (
    id TEXT PRIMARY KEY, user TEXT NOT NULL, arm TEXT NOT NULL, label TEXT NOT NULL,
    epoch INTEGER NOT NULL, away INTEGER NOT NULL, count INTEGER NOT NULL, whole INTEGER NOT NULL,
    messages TEXT, choices TEXT, tools TEXT, removed TEXT, time REAL NOT NULL
);
CREATE INDEX answers_of ON answers (user);
CREATE TABLE feedback (
    id INTEGER PRIMARY KEY AUTOINCREMENT, answer TEXT NOT NULL, place INTEGER NOT NULL,
    user TEXT NOT NULL, consent INTEGER NOT NULL, thumb INTEGER, over_answer TEXT,
    over_place INTEGER, edit TEXT, reason TEXT, removed TEXT, time REAL NOT NULL
);
CREATE INDEX feedback_of ON feedback (user);
CREATE TABLE parts (
    user TEXT NOT NULL, epoch INTEGER NOT NULL, state TEXT NOT NULL, PRIMARY KEY (user, epoch)
);
CREATE TABLE outcomes (
    id INTEGER PRIMARY KEY AUTOINCREMENT, epoch INTEGER NOT NULL, arm TEXT NOT NULL,
    weights TEXT NOT NULL, value REAL NOT NULL
);
CREATE TABLE decisions (
    epoch INTEGER NOT NULL, b TEXT NOT NULL, text TEXT NOT NULL, time REAL NOT NULL,
    PRIMARY KEY (epoch, b)
);
CREATE TABLE counts (name TEXT NOT NULL, arm TEXT NOT NULL, number INTEGER NOT NULL,
    PRIMARY KEY (name, arm));
CREATE TABLE events (id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, text TEXT NOT NULL);
"""

_LOCK = "lock"  # held by the gateway that runs in a folder

Result = TypeVar("Result")
Work = Callable[[sqlite3.Connection], Any]
_Item = tuple[Work, "Future[Any]", bool]  # the last: what it deletes goes from the log too


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While inside, this is the one gateway of a folder; a lock that ends with its process. Raises
    UserError where another one runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{folder}: another gateway runs here. Stop it, ask it (POST /v1/forget), or "
                "choose another run.name."
            ) from error
        yield


class Store:
    """An open file."""

    def __init__(self, path: Path) -> None:
        """Open or make it, readable by its user alone. Raises UserError."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        try:
            self._readers = self._connect()
            self._prepare()
        except sqlite3.Error as error:
            raise UserError(
                f"{path} can't be used ({error}). Expected the file that stage=gateway wrote; move "
                "it away to begin anew."
            ) from error
        self._reading = threading.Lock()
        self._closed = False
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="gateway-store", daemon=True)
        self._thread.start()

    def _connect(self) -> sqlite3.Connection:
        made = sqlite3.connect(
            self.path, timeout=_WAIT_S, isolation_level=None, check_same_thread=False
        )
        made.execute("PRAGMA journal_mode = WAL")
        made.execute("PRAGMA synchronous = FULL")
        made.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten
        return made

    def _prepare(self) -> None:
        db = self._readers
        if db.execute("PRAGMA user_version").fetchone()[0] == 0:
            db.executescript(f"BEGIN IMMEDIATE; {_MAKE} PRAGMA user_version = {_LAYOUT}; COMMIT;")
        layout = db.execute("PRAGMA user_version").fetchone()[0]
        if layout != _LAYOUT:
            raise sqlite3.DatabaseError(f"it has layout {layout}, not {_LAYOUT}")

    def read(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """What `work` reads, as it stands now; any thread may ask."""
        with self._reading:
            if self._closed:
                raise sqlite3.ProgrammingError("the store is closed")
            return work(self._readers)

    def submit(
        self, work: Callable[[sqlite3.Connection], Result], *, wipe: bool = False
    ) -> "Future[Result]":
        """Let the writing thread do `work`; its result is there once it is on the disk. wipe: what
        it deletes is overwritten in the write-ahead log too.
        """
        done: Future[Result] = Future()
        self._queue.put((work, done, wipe))
        return done

    def close(self) -> None:
        """Do what waits, then close."""
        self._queue.put(None)
        self._thread.join()
        with self._reading:
            self._closed = True
            self._readers.close()

    def _write(self) -> None:
        db = self._connect()
        try:
            goes_on = True
            while goes_on:
                items, goes_on = self._next()
                if items:
                    self._transaction(db, items)
        finally:
            db.close()

    def _next(self) -> tuple[list[_Item], bool]:
        """The work that waits, at least one piece; and whether there may be more."""
        items = []
        item = self._queue.get()
        while item is not None:
            items.append(item)
            if len(items) == _MOST:
                return items, True
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return items, True
        return items, False

    def _transaction(self, db: sqlite3.Connection, items: list[_Item]) -> None:
        done = []
        try:
            db.execute("BEGIN IMMEDIATE")
            for work, future, _ in items:
                done.append((future, *_attempt(db, work)))
            db.execute("COMMIT")
            if any(wipe for _, _, wipe in items):
                with self._reading:  # a reader would keep the log as it is
                    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error as error:  # a full disk: nobody is told that it was kept
            LOG.error("%s: %s", self.path, error)
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            for _, future, _ in items:
                future.set_exception(error)
            return
        for future, result, failure in done:
            if failure is not None:
                future.set_exception(failure)
            else:
                future.set_result(result)


def _attempt(db: sqlite3.Connection, work: Work) -> tuple[Any, Exception | None]:
    """What one piece of work gives, and why it failed; then it alone is undone."""
    db.execute("SAVEPOINT one")
    try:
        result = work(db)
    except Exception as error:  # noqa: BLE001 - told to whoever asked
        db.execute("ROLLBACK TO one")
        db.execute("RELEASE one")
        return None, error
    db.execute("RELEASE one")
    return result, None
