"""What is written into the gateway's file and read from it; each function is a piece of work for
`Store.submit` or `Store.read`.
"""

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.gateway.records import Answered, Outcome, Refused, Said

Db = sqlite3.Connection
_DAY_S = 86_400.0
DONE, AWAY = "done", "away"  # of a user in a test: counted; answered by another arm once


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value)


# ---- users and tests ----


def pins(db: Db) -> dict[str, str]:
    """The arm of every user that was assigned."""
    return dict(db.execute("SELECT user, arm FROM users"))


def pin(db: Db, user: str, arm: str, weights: Mapping[str, float]) -> None:
    """A user stays with an arm from now on."""
    db.execute(
        "INSERT INTO users VALUES (?, ?, ?, ?) ON CONFLICT (user) DO UPDATE SET "
        "arm = excluded.arm, weights = excluded.weights, time = excluded.time",
        (user, arm, _json(dict(weights)), time.time()),
    )


def begin_epoch(db: Db, labels: Mapping[str, str]) -> int:
    """The test between these versions by arm: the one that runs, or a new one where an arm came,
    went, or has another version.
    """
    text = json.dumps(dict(labels), sort_keys=True)
    last = db.execute("SELECT id, labels FROM epochs ORDER BY id DESC LIMIT 1").fetchone()
    if last is not None and last[1] == text:
        return int(last[0])
    return int(
        db.execute("INSERT INTO epochs (labels, time) VALUES (?, ?)", (text, time.time())).lastrowid
        or 0
    )


def outcomes(db: Db, epoch: int) -> list[Outcome]:
    """The outcomes of a test, in the order in which users became complete."""
    rows = db.execute(
        "SELECT arm, weights, value FROM outcomes WHERE epoch = ? ORDER BY id", (epoch,)
    )
    return [Outcome(arm, json.loads(weights), value) for arm, weights, value in rows]


def decide(db: Db, epoch: int, b: str, text: str) -> None:
    """Keep that a test was decided; the first decision stays."""
    db.execute("INSERT OR IGNORE INTO decisions VALUES (?, ?, ?, ?)", (epoch, b, text, time.time()))


def count(db: Db, name: str, arm: str) -> None:
    """One more of something that happened."""
    db.execute(
        "INSERT INTO counts VALUES (?, ?, 1) ON CONFLICT (name, arm) DO UPDATE SET "
        "number = number + 1",
        (name, arm),
    )


def note(db: Db, text: str) -> None:
    """What the operator changed, or what could not be done."""
    db.execute("INSERT INTO events (time, text) VALUES (?, ?)", (time.time(), text))


# ---- answers and feedback ----


def keep_answer(db: Db, answered: Answered, removed: Mapping[str, int] | None = None) -> None:
    """An answer that was given; its texts where they may be kept."""
    db.execute(
        "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (id) DO UPDATE SET messages = excluded.messages, choices = excluded.choices, "
        "tools = excluded.tools, removed = excluded.removed",
        (
            answered.id,
            answered.user,
            answered.arm,
            answered.label,
            answered.epoch,
            answered.away,
            answered.count,
            answered.whole,
            _json(answered.messages),
            _json(answered.choices),
            _json(answered.tools),
            _json(removed),
            time.time(),
        ),
    )
    if answered.away:
        db.execute(
            "INSERT OR IGNORE INTO parts VALUES (?, ?, ?)", (answered.user, answered.epoch, AWAY)
        )


def answer(db: Db, name: str) -> Answered | None:
    """An answer by its id."""
    row = db.execute(
        "SELECT id, user, arm, label, epoch, away, count, messages, choices, tools, whole "
        "FROM answers WHERE id = ?",
        (name,),
    ).fetchone()
    if row is None:
        return None
    own, user, arm, label, epoch, away, choices = row[:7]
    texts = [None if text is None else json.loads(text) for text in row[7:10]]
    return Answered(
        id=own,
        user=user,
        arm=arm,
        label=label,
        epoch=epoch,
        away=bool(away),
        count=choices,
        messages=texts[0],
        choices=texts[1],
        tools=texts[2],
        whole=bool(row[10]),
    )


def keep_feedback(db: Db, said: Said, removed: Mapping[str, int], votes: int) -> int:
    """Feedback about an answer that is kept; counted once its user has `votes` thumbs in the test.
    Raises Refused where the answer was deleted meanwhile.
    """
    if answer(db, said.answer) is None:
        raise Refused(404, "the answer is no longer kept")
    over = said.over or (None, None)
    row = db.execute(
        "INSERT INTO feedback (answer, place, user, consent, thumb, over_answer, over_place, edit, "
        "reason, removed, time) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            said.answer,
            said.index,
            said.user,
            said.consent,
            said.thumb,
            *over,
            said.edit,
            said.reason,
            _json(dict(removed)),
            time.time(),
        ),
    )
    if said.thumb is not None:
        _count_user(db, said, votes)
    return int(row.lastrowid or 0)


def _count_user(db: Db, said: Said, votes: int) -> None:
    """A user whose thumbs are complete becomes an outcome, without a name."""
    found = answer(db, said.answer)
    assert found is not None
    part = (said.user, found.epoch)
    if db.execute("SELECT 1 FROM parts WHERE user = ? AND epoch = ?", part).fetchone():
        return
    # of several thumbs about one answer the first
    thumbs = db.execute(
        "SELECT f.thumb FROM feedback f JOIN answers a ON a.id = f.answer "
        "WHERE f.user = ? AND a.epoch = ? AND f.thumb IS NOT NULL AND NOT EXISTS ("
        "SELECT 1 FROM feedback e WHERE e.answer = f.answer AND e.place = f.place "
        "AND e.thumb IS NOT NULL AND e.id < f.id) ORDER BY f.id LIMIT ?",
        (*part, votes),
    ).fetchall()
    assigned = db.execute("SELECT arm, weights FROM users WHERE user = ?", (said.user,)).fetchone()
    if len(thumbs) < votes or assigned is None or assigned[0] != found.arm:
        return
    mean = sum(thumb for (thumb,) in thumbs) / votes
    db.execute("INSERT INTO parts VALUES (?, ?, ?)", (*part, DONE))
    db.execute(
        "INSERT INTO outcomes (epoch, arm, weights, value) VALUES (?, ?, ?, ?)",
        (found.epoch, assigned[0], assigned[1], mean),
    )


# ---- deletion ----


def forget(db: Db, user: str) -> dict[str, int]:
    """Delete all that is kept of a user; how many rows of each table. Outcomes have no user and
    stay.
    """
    gone = {}
    for table in ("answers", "feedback", "parts", "users"):
        gone[table] = db.execute(f"DELETE FROM {table} WHERE user = ?", (user,)).rowcount
    if any(gone.values()):
        count(db, "users forgotten", "")
    return gone


def expire(db: Db, days: float) -> int:
    """Delete answers and feedback that are older; how many rows. The assignment stays, so that
    nobody changes arms.
    """
    before = time.time() - days * _DAY_S
    gone = db.execute("DELETE FROM feedback WHERE time < ?", (before,)).rowcount
    return gone + db.execute("DELETE FROM answers WHERE time < ?", (before,)).rowcount


# ---- figures ----


def figures(db: Db, epoch: int) -> dict[str, Any]:
    """Counts for the operator's page."""
    out: dict[str, Any] = {}
    for name, statement in _COUNTED.items():
        out[name] = dict(db.execute(statement, {"epoch": epoch}).fetchall())
    out["events"] = db.execute("SELECT time, text FROM events ORDER BY id DESC LIMIT 20").fetchall()
    out["decisions"] = db.execute(
        "SELECT epoch, b, text, time FROM decisions ORDER BY time DESC LIMIT 20"
    ).fetchall()
    counted = db.execute("SELECT name, arm, number FROM counts").fetchall()
    out["counts"] = [[name, arm, number] for name, arm, number in counted]
    return out


_COUNTED = {
    "assigned": "SELECT arm, count(*) FROM users GROUP BY arm",
    "answers": "SELECT arm, count(*) FROM answers WHERE epoch = :epoch GROUP BY arm",
    "feedback": "SELECT a.arm, count(*) FROM feedback f JOIN answers a ON a.id = f.answer "
    "WHERE a.epoch = :epoch GROUP BY a.arm",
    "with consent": "SELECT a.arm, count(*) FROM feedback f JOIN answers a ON a.id = f.answer "
    "WHERE a.epoch = :epoch AND f.consent GROUP BY a.arm",
    "users away": "SELECT state, count(*) FROM parts WHERE epoch = :epoch GROUP BY state",
}


def consented(db: Db) -> list[dict[str, Any]]:
    """All feedback with consent whose answer's texts are kept, the oldest first; that of one user
    about one choice is joined, the newest word of each kind counting.
    """
    db.row_factory = sqlite3.Row
    try:
        rows = db.execute(
            "SELECT f.id, f.answer, f.place, f.thumb, f.over_answer, f.over_place, f.edit, "
            "f.reason, f.removed AS said_removed, a.label, a.messages, a.choices, a.tools, a.whole,"
            " a.removed, o.choices AS over_choices, o.whole AS over_whole, "
            "o.messages AS over_messages "
            "FROM feedback f JOIN answers a ON a.id = f.answer "
            "LEFT JOIN answers o ON o.id = f.over_answer WHERE f.consent ORDER BY f.id"
        ).fetchall()
    finally:
        db.row_factory = None
    return [dict(row) for row in rows]


def removed_counts(rows: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """Personal data that was taken out of rows, by kind; an answer's once."""
    out: Counter[str] = Counter()
    seen = set()
    for row in rows:
        texts = [row["said_removed"]]
        if row["answer"] not in seen:
            texts.append(row["removed"])
        seen.add(row["answer"])
        for text in filter(None, texts):
            out.update(json.loads(text))
    return out
