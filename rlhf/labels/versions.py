"""Versions of a labels directory: what the labels came to at one time, never changed again.

    versions/<n>/train.jsonl   preference rows: prompt, chosen, rejected, margin or soft_label
    (label.strength), confidence, annotators (how many),
                               task, export
                 eval.jsonl    the same of the prompts that are held out (label.eval_fraction)
                 labels.jsonl  every label, with `counts`: false for those that a later one
                 supersedes, or whose annotator doesn't count
                 review.jsonl  tasks that go out again (rlhf.labels.review)
                 report.json   rlhf.labels.report's figures
                 card.json, card.md   the data card
    latest                     a relative link to the newest version's directory

A version is written beside its place and renamed when it is whole; `identity` in card.json is of
what it was made from (labels, exports, settings), so that an import which changes none of these
makes no new one.
"""

import datetime
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.choices import LabelAggregate, Strength
from rlhf.data.prepare.store import line
from rlhf.labels import store
from rlhf.labels.card import export_entry, make_card, markdown
from rlhf.labels.checking import Ledgers
from rlhf.labels.pairs import Fate, aggregate, collect, fate, held_out, preference_row
from rlhf.labels.report import Situation, below_gold, gold
from rlhf.labels.review import review_rows
from rlhf.process.hashing import digest, sha256
from rlhf.types import UserError

FOLDER, LATEST, CARD_FILE = "versions", "latest", "card.json"
_FORMAT = 1  # of the files; a change makes new versions of old labels


@dataclass(frozen=True, slots=True)
class Settings:
    """What results and rows depend on beside the labels (conf.labelling.LabelConfig)."""

    aggregate: LabelAggregate = LabelAggregate.majority
    min_labels: int = 1
    min_confidence: float = 0.0
    min_gold_accuracy: float | None = None
    strength: Strength = Strength.none
    eval_fraction: float = 0.1

    def figures(self) -> dict[str, Any]:
        return {
            "aggregate": self.aggregate.value,
            "min_labels": self.min_labels,
            "min_confidence": self.min_confidence,
            "min_gold_accuracy": self.min_gold_accuracy,
            "strength": self.strength.value,
            "eval_fraction": self.eval_fraction,
        }


@dataclass(frozen=True, slots=True)
class Version:
    """One directory under versions/."""

    number: int
    folder: Path
    card: dict[str, Any]

    def file(self, name: str) -> Path:
        return self.folder / name

    @property
    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.is_file())


def settle(ledgers: Ledgers, stored: Sequence[store.Stored], settings: Settings) -> Situation:
    """Results of all labels, and what becomes of each pair."""
    labels = [one.label for one in stored if one.counts]
    without = below_gold(gold(ledgers, labels), settings.min_gold_accuracy)
    everybody = collect(ledgers, labels)
    found = aggregate(
        settings.aggregate, collect(ledgers, labels, without) if without else everybody
    )
    fates = {
        result.pair.id: fate(
            result,
            min_labels=settings.min_labels,
            min_confidence=settings.min_confidence,
            strength=settings.strength,
        )
        for result in found.results
    }
    return Situation(ledgers, stored, everybody, found, fates, without)


def preference_rows(situation: Situation, settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """Rows of train.jsonl and eval.jsonl, in the order of their exports' tasks."""
    place = {task: i for i, task in enumerate(situation.ledgers.tasks)}
    out: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    for result in sorted(
        situation.aggregated.results, key=lambda v: (v.pair.export, place[v.pair.task], v.pair.id)
    ):
        if situation.fates[result.pair.id] is Fate.used:
            side = "eval" if held_out(result.pair.prompt, settings.eval_fraction) else "train"
            out[side].append(preference_row(result, settings.strength))
    return out


def identity(ledgers: Ledgers, stored: Sequence[store.Stored], settings: Settings) -> str:
    """Of all that a version is made from."""
    counting = sorted((one.label for one in stored if one.counts), key=lambda label: label.key)
    return digest([_FORMAT, store.identity(counting), sorted(ledgers.exports), settings.figures()])


def numbers(folder: Path) -> list[int]:
    """The versions there are, in order."""
    return sorted(
        int(path.name)
        for path in (folder / FOLDER).glob("*")
        if path.name.isdecimal() and (path / CARD_FILE).is_file()
    )


def newest(folder: Path) -> Version | None:
    """The last version that was written. Raises UserError where its card can't be read."""
    found = numbers(folder)
    if not found:
        return None
    place = folder / FOLDER / str(found[-1])
    try:
        return Version(
            found[-1], place, json.loads((place / CARD_FILE).read_text(encoding="utf-8"))
        )
    except ValueError as error:
        raise UserError(
            f"{place / CARD_FILE} can't be read: {error}. Restore it, or remove {place}: the "
            "next import writes it again."
        ) from error


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as out:
        out.writelines(line(row) for row in rows)
        out.flush()
        os.fsync(out.fileno())


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a comment or a name with half of a surrogate pair
        text = json.dumps(content, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def write(
    folder: Path,
    name: str,
    situation: Situation,
    settings: Settings,
    report: Mapping[str, Any],
    ledgers: Mapping[str, Path],
    sources: Sequence[Mapping[str, Any]] = (),
) -> Version:
    """The next version, and the link `latest` to it.

    ledgers: each export's folder in the labels directory; sources: name and sha256 of what was
    imported so far, for the card.
    """
    before = newest(folder)
    number = before.number + 1 if before is not None else 1
    place, beside = folder / FOLDER / str(number), folder / FOLDER / f".{number}.tmp"
    shutil.rmtree(beside, ignore_errors=True)  # what a killed import left
    beside.mkdir(parents=True)
    rows = preference_rows(situation, settings)
    labels = [
        {
            **store.label_row(one.label, one.number),
            "counts": one.counts and one.label.annotator not in situation.without,
        }
        for one in situation.stored
    ]
    content = {
        "train.jsonl": rows["train"],
        "eval.jsonl": rows["eval"],
        "labels.jsonl": labels,
        "review.jsonl": review_rows(situation),
    }
    for file, lines in content.items():
        _write_lines(beside / file, lines)
    _write_json(beside / "report.json", report)
    card = make_card(
        name=name,
        number=number,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        identity=identity(situation.ledgers, situation.stored, settings),
        situation=situation,
        report=report,
        exports=[
            export_entry(situation.ledgers.exports[export], ledger)
            for export, ledger in sorted(ledgers.items())
        ],
        settings=settings.figures(),
        files={
            file: {"rows": len(lines), "sha256": sha256(beside / file)}
            for file, lines in content.items()
        },
        sources=[dict(source) for source in sources],
        previous=before.number if before is not None else None,
    )
    (beside / "card.md").write_text(markdown(card), encoding="utf-8", errors="replace")
    _write_json(beside / CARD_FILE, card)
    shutil.rmtree(place, ignore_errors=True)  # a directory without a card is no version
    beside.rename(place)
    point(folder, number)
    return Version(number, place, card)


def point(folder: Path, number: int) -> None:
    """Make `latest` a link to a version."""
    link, beside = folder / LATEST, folder / (LATEST + ".tmp")
    target = f"{FOLDER}/{number}"
    if link.is_symlink() and os.readlink(link) == target:
        return
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    beside.replace(link)
