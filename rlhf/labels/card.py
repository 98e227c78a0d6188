"""The data card of a version of labels: what it holds, who made it, from what, and how far to trust
it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.data.report.texts import safe
from rlhf.labels.checking import moment
from rlhf.labels.ledger import TASKS_FILE
from rlhf.labels.records import Export
from rlhf.labels.report import Situation
from rlhf.process.hashing import sha256

Card = dict[str, Any]


def export_entry(export: Export, ledger: Path) -> Card:
    """What annotators were asked."""
    return {
        "id": export.id,
        "created": export.created,
        "kind": export.kind.value,
        "title": export.title,
        "instructions": export.instructions,
        "tasks": len(export.tasks),
        "overlap": export.overlap,
        "ratings": export.ratings,
        "prelabel": export.prelabel,
        "tasks_sha256": sha256(ledger / TASKS_FILE),
        "details": export.details,
    }


def label_entry(situation: Situation) -> Card:
    """Counts and dates of the labels."""
    times = sorted((label.time for label in situation.labels if label.time is not None), key=moment)
    return {
        "labels": len(situation.labels),
        "superseded": sum(not one.counts for one in situation.stored),
        "without_time": len(situation.labels) - len(times),
        "first": times[0] if times else None,
        "last": times[-1] if times else None,
    }


def make_card(
    *,
    name: str,
    number: int,
    created: str,
    identity: str,
    situation: Situation,
    report: Mapping[str, Any],
    exports: Sequence[Card],
    settings: Mapping[str, Any],
    files: Mapping[str, Card],
    sources: Sequence[Card],
    previous: int | None,
) -> Card:
    """card.json. `files`: rows and sha256 by name; `sources`: name and sha256 of what was imported
    so far.
    """
    people = [
        {
            key: one[key]
            for key in (
                "annotator",
                "counts",
                "labels",
                "gold",
                "itself",
                "others",
                "reliability",
                "suspicions",
            )
        }
        for one in report["annotators"]
    ]
    agreement = {
        key: report["agreement"][key]
        for key in ("items", "judgements", "observed", "fleiss_kappa", "krippendorff_alpha")
    }
    return {
        "name": name,
        "version": number,
        "created": created,
        "identity": identity,
        "previous_version": previous,
        "labels": label_entry(situation),
        "pairs": report["pairs"],
        "agreement": agreement,
        "annotators": people,
        "exports": list(exports),
        "sources": list(sources),
        "settings": dict(settings),
        "files": dict(files),
        "ab": report.get("ab", []),
    }


def _value(found: Mapping[str, Any]) -> str:
    if found["value"] is None:
        return "undefined"
    interval = "" if found["low"] is None else f" ({found['low']:.3f} to {found['high']:.3f})"
    return f"{found['value']:.3f}{interval}, {found['items']} pairs"


def _share(found: Mapping[str, Any]) -> str:
    return "" if found["share"] is None else f"{found['share']:.0%} of {found['n']}"


def _plain(text: object) -> str:
    """In a cell of a Markdown table: on one line, and no markup."""
    flat = safe(str(text))
    for sign in "\\`*_[]<>|#":
        flat = flat.replace(sign, "\\" + sign)
    return flat


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return [*lines, *("| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows), ""]


def markdown(card: Card) -> str:
    """card.md."""
    labels, agreement = card["labels"], card["agreement"]
    lines = [f"# Preference labels {_plain(card['name'])}, version {card['version']}", ""]
    lines += [
        f"Made {card['created']}. Made from {labels['labels']} labels of "
        f"{len(card['annotators'])} annotators."
    ]
    if labels["first"] is not None:
        lines += [f"Labels made from {labels['first']} to {labels['last']}."]
    lines += ["", "## Files", ""]
    lines += _table(
        ("file", "rows", "sha256"),
        [(name, found["rows"], found["sha256"]) for name, found in card["files"].items()],
    )
    lines += [
        "## Pairs",
        "",
        *_table(("what became of them", "pairs"), list(card["pairs"].items())),
    ]
    lines += ["## Agreement", ""]
    names = (
        ("observed agreement", "observed"),
        ("Fleiss' kappa", "fleiss_kappa"),
        ("Krippendorff's alpha (ordinal)", "krippendorff_alpha"),
    )
    lines += _table(
        ("coefficient", "value (95 % interval)"),
        [(title, _value(agreement[key])) for title, key in names],
    )
    lines += ["## Annotators", ""]
    head = ("annotator", "labels", "counts", "gold", "itself", "others", "suspicions")
    rows = [
        (
            a["annotator"],
            a["labels"],
            "yes" if a["counts"] else "no",
            _share(a["gold"]),
            _share(a["itself"]),
            _share(a["others"]),
            "; ".join(a["suspicions"]),
        )
        for a in card["annotators"]
    ]
    lines += _table(head, rows)
    for result in card["ab"]:
        lines += [
            f"## A/B test of export {result['export']}",
            "",
            f"{_plain(result['b'])} against {_plain(result['a'])}: {result['decision']}.",
            "",
        ]
        lines += [result["rule"], ""]
    lines += [
        "## Imported from",
        "",
        *_table(
            ("file", "sha256"), [(source["name"], source["sha256"]) for source in card["sources"]]
        ),
    ]
    lines += [
        "## How verdicts were made",
        "",
        *_table(("setting", "value"), list(card["settings"].items())),
    ]
    for export in card["exports"]:
        lines += [
            f"## Export {export['id']}",
            "",
            f"{export['tasks']} tasks ({export['kind']}), made {export['created']}: "
            f"{_plain(export['title'])}",
            "",
        ]
        lines += [f"tasks.jsonl sha256 {export['tasks_sha256']}", ""]
        if export["instructions"]:
            lines += [
                "Instructions:",
                "",
                *("    " + line for line in export["instructions"].splitlines()),
                "",
            ]
    return "\n".join(lines)
