"""The data card of a version of labels: what it holds, who made it, what it was made from, and how
far it can be trusted.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.data.report.texts import safe
from rlhf.labels.checking import moment
from rlhf.labels.ledger import TASKS_FILE
from rlhf.labels.records import Export
from rlhf.labels.report import Situation
from rlhf.process.files import sha256

Card = dict[str, Any]
# what card.json takes from the report
_OF_ANNOTATOR = (
    "annotator",
    "counts",
    "labels",
    "gold",
    "itself",
    "others",
    "reliability",
    "suspicions",
)
_OF_AGREEMENT = ("items", "judgements", "observed", "fleiss_kappa", "krippendorff_alpha")


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
        "superseded": sum(not entry.counts for entry in situation.stored),
        "without_time": len(situation.labels) - len(times),
        "first": times[0] if times else None,
        "last": times[-1] if times else None,
    }


def _annotator_entry(figures: Mapping[str, Any]) -> Card:
    return {key: figures[key] for key in _OF_ANNOTATOR}


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
    people = [_annotator_entry(figures) for figures in report["annotators"]]
    agreement = {key: report["agreement"][key] for key in _OF_AGREEMENT}
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


# ---- card.md ----


def _estimate(figures: Mapping[str, Any]) -> str:
    if figures["value"] is None:
        return "undefined"
    interval = ""
    if figures["low"] is not None:
        interval = f" ({figures['low']:.3f} to {figures['high']:.3f})"
    return f"{figures['value']:.3f}{interval}, {figures['items']} pairs"


def _share(figures: Mapping[str, Any]) -> str:
    if figures["share"] is None:
        return ""
    return f"{figures['share']:.0%} of {figures['n']}"


def _plain(text: object) -> str:
    """For a cell of a Markdown table: on one line, and without markup."""
    flat = safe(str(text))
    for sign in "\\`*_[]<>|#":
        flat = flat.replace(sign, "\\" + sign)
    return flat


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        cells = [_plain(cell) for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def markdown(card: Card) -> str:
    """card.md: the card as Markdown."""
    lines = [
        *_heading(card),
        *_files(card["files"]),
        "## Pairs",
        "",
        *_table(("what became of them", "pairs"), list(card["pairs"].items())),
        *_agreement(card["agreement"]),
        *_annotators(card["annotators"]),
    ]
    for comparison in card["ab"]:
        lines += _comparison(comparison)
    sources = [(source["name"], source["sha256"]) for source in card["sources"]]
    lines += ["## Imported from", "", *_table(("file", "sha256"), sources)]
    settings = list(card["settings"].items())
    lines += ["## How verdicts were made", "", *_table(("setting", "value"), settings)]
    for export in card["exports"]:
        lines += _export(export)
    return "\n".join(lines)


def _heading(card: Card) -> list[str]:
    labels = card["labels"]
    lines = [
        f"# Preference labels {_plain(card['name'])}, version {card['version']}",
        "",
        f"Made {card['created']}. Made from {labels['labels']} labels of "
        f"{len(card['annotators'])} annotators.",
    ]
    if labels["first"] is not None:
        lines.append(f"Labels made from {labels['first']} to {labels['last']}.")
    return [*lines, ""]


def _files(files: Mapping[str, Card]) -> list[str]:
    rows = [(name, entry["rows"], entry["sha256"]) for name, entry in files.items()]
    return ["## Files", "", *_table(("file", "rows", "sha256"), rows)]


def _agreement(agreement: Card) -> list[str]:
    rows = [
        ("observed agreement", _estimate(agreement["observed"])),
        ("Fleiss' kappa", _estimate(agreement["fleiss_kappa"])),
        ("Krippendorff's alpha (ordinal)", _estimate(agreement["krippendorff_alpha"])),
    ]
    return ["## Agreement", "", *_table(("coefficient", "value (95 % interval)"), rows)]


def _annotators(annotators: Sequence[Card]) -> list[str]:
    head = ("annotator", "labels", "counts", "gold", "itself", "others", "suspicions")
    rows = []
    for figures in annotators:
        row = (
            figures["annotator"],
            figures["labels"],
            "yes" if figures["counts"] else "no",
            _share(figures["gold"]),
            _share(figures["itself"]),
            _share(figures["others"]),
            "; ".join(figures["suspicions"]),
        )
        rows.append(row)
    return ["## Annotators", "", *_table(head, rows)]


def _comparison(result: Card) -> list[str]:
    return [
        f"## A/B test of export {result['export']}",
        "",
        f"{_plain(result['b'])} against {_plain(result['a'])}: {result['decision']}.",
        "",
        result["rule"],
        "",
    ]


def _export(export: Card) -> list[str]:
    lines = [
        f"## Export {export['id']}",
        "",
        f"{export['tasks']} tasks ({export['kind']}), made {export['created']}: "
        f"{_plain(export['title'])}",
        "",
        f"tasks.jsonl sha256 {export['tasks_sha256']}",
        "",
    ]
    if export["instructions"]:
        lines += ["Instructions:", ""]
        lines += ["    " + line for line in export["instructions"].splitlines()]
        lines.append("")
    return lines
