"""The step `review`: items that annotators disagree on, as a queue file for a person to decide, and
its decisions read back.

Queue files, CSV (opens in a spreadsheet, so what one would take for a formula has an apostrophe
before it) and JSON lines with the same rows:

    id          of the item; a hash of its texts where no column names it
    prompt, a, b, ...   the texts that were judged; conversations as one text
    labels      who said what
    decision    empty, for the person: a label, or drop
    comment     free

A decided item leaves the step as one row with that label and `reviewed: true`; the step `aggregate`
after it takes the decision as it is. Reading decisions changes nothing but what they name, so
reading them twice gives the same rows.
"""

import csv
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.preparation.annotation import Review
from rlhf.data.aggregation import votes_by_item
from rlhf.data.agreement import sorted_labels
from rlhf.data.files import read_rows
from rlhf.data.prepare.items import Context, Item
from rlhf.data.prepare.judgements import (
    REVIEWED,
    SIDES,
    Subject,
    by_side,
    reject,
    settled,
    subjects,
    typed,
)
from rlhf.data.tables import bare, inert
from rlhf.models.encoding import turn_text
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.data")
DROP = "drop"  # the decision that leaves an item out
REVIEWER = "review"  # who a decided row's annotator is
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Decision:
    """One filled-in row of a queue file."""

    label: Any  # DROP leaves the item out
    comment: str


def readable(value: Any) -> str:
    """A content column as one text: messages with their roles."""
    if isinstance(value, str):
        return value
    return "\n\n".join(f"{message['role']}: {turn_text(message)}" for message in value)


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def disputed(subject: Subject, agreed: float) -> bool:
    """Whether the most frequent label has a smaller share than `agreed`. An item that a person has
    decided is never disputed.
    """
    if subject.reviewed:
        return False
    votes = votes_by_item(subject.labels())[subject.id]
    return max(votes.values()) / votes.total() < agreed


def queue_row(subject: Subject, decision: Decision | None) -> Row:
    """A subject as a row of the queue file."""
    labels = "; ".join(f"{j.annotator}: {j.label}" for j in subject.judgements)
    texts = {key: readable(value) for key, value in subject.texts.items()}
    label, comment = (decision.label, decision.comment) if decision else ("", "")
    return {"id": subject.id, **texts, "labels": labels, "decision": label, "comment": comment}


def write_queue(rows: Sequence[Row], stem: Path) -> None:
    """Write `stem`.csv and `stem`.jsonl, each replaced whole."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(key for row in rows for key in row))
    if not names:
        names = ["id", "labels", "decision", "comment"]
    table, lines = stem.with_name(stem.name + ".csv"), stem.with_name(stem.name + ".jsonl")
    beside = stem.with_name(stem.name + ".tmp")
    # the byte order mark tells spreadsheets that it is UTF-8
    with beside.open("w", encoding="utf-8-sig", newline="") as out:
        writer = csv.DictWriter(out, names)
        writer.writeheader()
        writer.writerows(map(_inert_row, rows))
    beside.replace(table)
    beside.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    beside.replace(lines)


def _inert_row(row: Row) -> Row:
    """A row that no spreadsheet takes for formulas."""
    return {key: inert(value) if isinstance(value, str) else value for key, value in row.items()}


def _filled(path: Path) -> bool:
    """Whether somebody has written decisions into an existing queue file."""
    if not path.is_file():
        return False
    try:
        return any(str(row.get("decision") or "").strip() for row in read_rows(path))
    # half-edited, or without rows: nobody's decisions are lost by reading on, but they would be by
    # writing
    except UserError:
        return path.stat().st_size > 0 and len(path.read_bytes().splitlines()) > 1


def read_decisions(
    path: str, judged: Sequence[Subject], labels: Sequence[Any]
) -> dict[str, Decision]:
    """Decisions by id; rows with an empty decision are passed over.

    Raises UserError naming file and row: no id, an item that the data doesn't have, texts that were
    edited, a decision that is no label, and two different decisions for an item.
    """
    known = {subject.id: subject for subject in judged}
    out: dict[str, Decision] = {}
    for number, row in enumerate(read_rows(path, key="step review: decisions"), start=1):
        where = f"{path}, row {number}"
        lacking = [key for key in ("id", "decision") if key not in row]
        if lacking:
            raise UserError(
                f"{where}: expected the columns of a queue file that the step review wrote, "
                f"found none called {lacking[0]!r}."
            )
        key, text = str(row["id"]), str("" if row["decision"] is None else row["decision"]).strip()
        if not text:
            continue
        key = key if key in known else bare(key)
        subject = known.get(key)
        if subject is None:
            raise UserError(
                f"{where}: the data has no item {key!r}. Expected the queue file of the same "
                "rows; take the row out if they are gone."
            )
        _check_same_texts(row, subject, where)
        label = _decided_label(text, labels, where)
        if key in out and out[key].label != label:
            raise UserError(
                f"{where}: item {key!r} is decided twice, as {out[key].label!r} and as "
                f"{label!r}: expected one decision."
            )
        out[key] = Decision(label, bare(str(row.get("comment") or "")))
    return out


def _check_same_texts(row: Row, subject: Subject, where: str) -> None:
    """Raises UserError for a row whose texts aren't those of the data."""
    for column, value in subject.texts.items():
        text = readable(value)
        if column in row and _lines(str(row[column])) in (_lines(text), _lines(inert(text))):
            continue
        raise UserError(
            f"{where}: item {subject.id!r} was judged with another text in {column!r} than the "
            "data has: the queue file was edited there, or "
            "the data changed. Decide it again in a fresh queue file."
        )


def _decided_label(text: str, labels: Sequence[Any], where: str) -> Any:
    """The label that a decision's text is, or DROP. Raises UserError for anything else."""
    if text.lower() == DROP and DROP not in map(str, labels):
        return DROP
    for candidate in (text, bare(text)):
        label = typed(candidate, labels)
        if label == DROP or label in labels:
            return label
    raise UserError(
        f"{where}: decision {text!r}: expected one of {', '.join(map(str, labels))}, or {DROP}."
    )


def review(options: Review, items: Iterator[Item], context: Context) -> Iterator[Item]:
    """Rows pass as they are; items that `decisions` decides become one row each, and dropped items
    are rejected.

    Writes the queue of the items that are disputed, with the decisions that were read. Raises
    UserError as `subjects` and `read_decisions`, and where a queue file would replace another that
    holds decisions which are not read.
    """
    rows = list(items)
    judged = subjects(rows, options, context)
    stem = context.folder / options.queue
    decisions: dict[str, Decision] = {}
    if options.decisions is None:
        _check_not_filled(stem)
    else:
        decisions = read_decisions(options.decisions, judged, _labels(judged, options, context))
    queued = [
        subject
        for subject in judged
        if subject.id in decisions or disputed(subject, options.agreed)
    ]
    write_queue([queue_row(subject, decisions.get(subject.id)) for subject in queued], stem)
    dropped = sum(decision.label == DROP for decision in decisions.values())
    counts = {
        "items": len(judged),
        "queued": len(queued),
        "decided": len(decisions) - dropped,
        "dropped": dropped,
    }
    context.figures.update(counts, queue=f"{options.queue}.csv")
    waiting = len(queued) - len(decisions)
    if waiting:
        LOG.info(
            "review: %d items wait for a decision in %s.csv: fill in a copy outside the run "
            "directory, name it as decisions",
            waiting,
            stem,
        )
    yield from _decided_rows(rows, judged, decisions, options, context)


def _labels(judged: Sequence[Subject], options: Review, context: Context) -> Sequence[Any]:
    """The labels that a decision may be."""
    if by_side(options, context.kind):
        return SIDES
    return sorted_labels(j.label for subject in judged for j in subject.judgements)


def _check_not_filled(stem: Path) -> None:
    """Raises UserError where an existing queue file holds decisions."""
    for suffix in (".csv", ".jsonl"):
        path = stem.with_name(stem.name + suffix)
        if _filled(path):
            raise UserError(
                f"step review: {path} holds decisions that would be lost. Name it as "
                "decisions, or set another queue."
            )


def _decided_rows(
    rows: Sequence[Item],
    judged: Sequence[Subject],
    decisions: Mapping[str, Decision],
    options: Review,
    context: Context,
) -> Iterator[Item]:
    """The rows, where those of a decided item become one row, or none."""
    subject_of = {id(row): subject for subject in judged for row in subject.rows}
    done: set[str] = set()
    for row in rows:
        subject = subject_of.get(id(row))
        if subject is None:  # rejected by `subjects`
            continue
        decision = decisions.get(subject.id)
        if decision is None:
            yield row
        elif subject.id not in done:
            done.add(subject.id)
            yield from _decided(subject, decision, options, context)


def _decided(
    subject: Subject, decision: Decision, options: Review, context: Context
) -> Iterator[Item]:
    """The row of a decided item; a dropped item is rejected."""
    if decision.label == DROP:
        comment = f": {decision.comment!r}" if decision.comment else ""
        reject(subject, f"dropped in review{comment}", context)
        return
    for other in subject.rows[1:]:
        context.rejected(other, f"decided in review, with '{subject.rows[0].place}'")
    reviewed = {REVIEWED: True, options.annotator: REVIEWER}
    yield settled(subject, decision.label, options, context.kind, reviewed)
