"""Feedback as rows for training, in formats that stage=data and the training stages read:

    kto.jsonl      prompt, completion, label           thumbs (format unpaired)
    pairs.jsonl    prompt, chosen, rejected            choices between two, and an edit against the
                                                       answer that it mends (format preference)
    sft.jsonl      messages                            edits (format messages)

Each row has `registry_version`, the version whose answer was judged, and `feedback`, the numbers of
the feedback that it is made of. No row has a user. What became of no row is counted with the
reason.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KTO, PAIRS, SFT = "kto.jsonl", "pairs.jsonl", "sft.jsonl"
Row = dict[str, Any]


@dataclass
class Rows:
    """Rows by their files, and why other feedback became none, with the first one's number."""

    files: dict[str, list[Row]] = field(default_factory=lambda: {KTO: [], PAIRS: [], SFT: []})
    left: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)

    def leave(self, reason: str, feedback: int) -> None:
        """Count feedback that becomes no row."""
        self.left[reason] += 1
        self.first.setdefault(reason, feedback)

    @property
    def versions(self) -> list[str]:
        """The versions whose answers the rows judge."""
        found = {row["registry_version"] for rows in self.files.values() for row in rows}
        return sorted(found)


def rows_of(said: Sequence[Mapping[str, Any]]) -> Rows:
    """Rows out of feedback with consent, the oldest first (`keeping.consented`). Of several thumbs
    about one choice the last counts, and so of several edits.
    """
    out = Rows()
    last: dict[tuple[str, int, str], int] = {}
    for each in said:
        for kind in ("thumb", "edit"):
            if each[kind] is not None:
                last[(each["answer"], each["place"], kind)] = each["id"]
    for each in said:
        if each["thumb"] is None and each["edit"] is None and each["over_answer"] is None:
            out.leave("a reason alone", each["id"])
            continue
        if each["messages"] is None:
            out.leave("its answer's texts are not kept", each["id"])
            continue
        place = (each["answer"], each["place"])
        if each["thumb"] is not None:
            _add_thumb(out, each, last[(*place, "thumb")])
        if each["edit"] is not None:
            _add_edit(out, each, last[(*place, "edit")])
        if each["over_answer"] is not None:
            _add_choice(out, each)
    return out


def _shared(each: Mapping[str, Any]) -> Row:
    row: Row = {"registry_version": each["label"], "feedback": [each["id"]]}
    if each["reason"] is not None:
        row["reason"] = each["reason"]
    return row


def _with_tools(each: Mapping[str, Any], row: Row) -> Row:
    tools = None if each["tools"] is None else json.loads(each["tools"])
    return row if not tools else {**row, "tools": tools}


def _turn(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _answer(each: Mapping[str, Any], prefix: str = "") -> str:
    place = each["over_place"] if prefix else each["place"]
    return str(json.loads(each[f"{prefix}choices"])[place])


def _add_thumb(out: Rows, each: Mapping[str, Any], last: int) -> None:
    if each["id"] != last:
        out.leave("a later thumb about the same answer", each["id"])
        return
    if not each["whole"]:
        out.leave("the answer was cut or calls functions", each["id"])
        return
    row = {
        "prompt": json.loads(each["messages"]),
        "completion": _turn(_answer(each)),
        "label": bool(each["thumb"]),
        **_shared(each),
    }
    out.files[KTO].append(_with_tools(each, row))


def _add_edit(out: Rows, each: Mapping[str, Any], last: int) -> None:
    if each["id"] != last:
        out.leave("a later edit of the same answer", each["id"])
        return
    prompt = json.loads(each["messages"])
    row = {"messages": [*prompt, *_turn(each["edit"])], **_shared(each)}
    out.files[SFT].append(_with_tools(each, row))
    if each["whole"] and each["edit"].strip() != _answer(each).strip():
        pair = {
            "prompt": prompt,
            "chosen": _turn(each["edit"]),
            "rejected": _turn(_answer(each)),
            **_shared(each),
        }
        out.files[PAIRS].append(_with_tools(each, pair))


def _add_choice(out: Rows, each: Mapping[str, Any]) -> None:
    if each["over_choices"] is None:
        out.leave("the other answer's texts are not kept", each["id"])
        return
    if each["messages"] != each["over_messages"]:
        out.leave("the two answers are to different prompts", each["id"])
        return
    if not each["whole"] or not each["over_whole"]:
        out.leave("the answer was cut or calls functions", each["id"])
        return
    chosen, rejected = _answer(each), _answer(each, "over_")
    if chosen == rejected:
        out.leave("both answers are the same", each["id"])
        return
    row = {
        "prompt": json.loads(each["messages"]),
        "chosen": _turn(chosen),
        "rejected": _turn(rejected),
        **_shared(each),
    }
    out.files[PAIRS].append(_with_tools(each, row))


def write(rows: Rows, folder: Path) -> dict[str, Path]:
    """Write the files that have rows; returns them by name."""
    folder.mkdir(parents=True, exist_ok=True)
    out = {}
    for name, listed in rows.files.items():
        path = folder / name
        if not listed:
            path.unlink(missing_ok=True)  # of an earlier export, which said more
            continue
        beside = path.with_suffix(".tmp")
        beside.write_text("".join(map(_line, listed)), encoding="utf-8")
        beside.replace(path)
        out[name] = path
    return out


def _line(row: Row) -> str:
    """A line of JSON, readable where all of its characters are whole."""
    text = json.dumps(row, ensure_ascii=False)
    half = any("\ud800" <= character <= "\udfff" for character in text)
    return f"{json.dumps(row) if half else text}\n"
