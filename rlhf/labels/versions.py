"""Versions of a labels directory: what the labels came to at one time, never changed again.

    versions/<n>/train.jsonl   preference rows: prompt, chosen, rejected, margin or soft_label
                               (label.strength), confidence, annotators (how many), task, export
                 eval.jsonl    the same of the prompts that are held out (label.eval_fraction)
                 labels.jsonl  every label, with `counts`: false for those that a later one
                               supersedes, or whose annotator doesn't count
                 review.jsonl  tasks that go out again (rlhf.labels.review)
                 report.json   rlhf.labels.report's figures
                 card.json, card.md   the data card
    latest                     a relative link to the newest version's directory

A version is written beside its final folder and renamed when it is whole. `identity` in card.json
is a hash of what it was made from (labels, exports, settings): an import that changes none of
these makes no new version.
"""

import datetime
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.choices import Strength
from conf.labelling import LabelAggregate, LabelConfig
from rlhf.data.prepare.store import line
from rlhf.labels import store
from rlhf.labels.card import export_entry, make_card, markdown
from rlhf.labels.checking import Ledgers
from rlhf.labels.pairs import Fate, aggregate, collect, fate, held_out, preference_row
from rlhf.labels.report import Situation, below_gold, gold
from rlhf.labels.review import review_rows
from rlhf.process.files import digest, sha256
from rlhf.types import UserError

FOLDER, LATEST, CARD_FILE = "versions", "latest", "card.json"
_FORMAT = 1  # of the files; a change makes new versions of old labels
Rows = list[dict[str, Any]]


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
        """As JSON has it."""
        return {
            "aggregate": self.aggregate.value,
            "min_labels": self.min_labels,
            "min_confidence": self.min_confidence,
            "min_gold_accuracy": self.min_gold_accuracy,
            "strength": self.strength.value,
            "eval_fraction": self.eval_fraction,
        }


def settings_of(label: LabelConfig) -> Settings:
    """The settings that the options ask for."""
    return Settings(
        aggregate=label.aggregate,
        min_labels=label.min_labels,
        min_confidence=label.min_confidence,
        min_gold_accuracy=label.min_gold_accuracy,
        strength=label.strength,
        eval_fraction=label.eval_fraction,
    )


@dataclass(frozen=True, slots=True)
class Version:
    """One directory in versions/."""

    number: int
    folder: Path
    card: dict[str, Any]

    def file(self, name: str) -> Path:
        """The path of one of its files."""
        return self.folder / name

    def rows(self, name: str) -> int:
        """How many rows the file `name` has."""
        return int(self.card["files"][name]["rows"])

    @property
    def files(self) -> list[Path]:
        """All files, sorted."""
        return sorted(path for path in self.folder.iterdir() if path.is_file())


def settle(ledgers: Ledgers, stored: Sequence[store.Stored], settings: Settings) -> Situation:
    """Aggregate all labels, and decide what becomes of each pair."""
    labels = [entry.label for entry in stored if entry.counts]
    without = below_gold(gold(ledgers, labels), settings.min_gold_accuracy)
    votes = collect(ledgers, labels)
    counted = collect(ledgers, labels, without) if without else votes
    aggregated = aggregate(settings.aggregate, counted)
    fates = {
        result.pair.id: fate(
            result,
            min_labels=settings.min_labels,
            min_confidence=settings.min_confidence,
            strength=settings.strength,
        )
        for result in aggregated.results
    }
    return Situation(ledgers, stored, votes, aggregated, fates, without)


def preference_rows(situation: Situation, settings: Settings) -> dict[str, Rows]:
    """Rows of train.jsonl and eval.jsonl, in the order of their exports' tasks."""
    number = {task: i for i, task in enumerate(situation.ledgers.tasks)}
    results = sorted(
        situation.aggregated.results,
        key=lambda result: (result.pair.export, number[result.pair.task], result.pair.id),
    )
    rows: dict[str, Rows] = {"train": [], "eval": []}
    for result in results:
        if situation.fates[result.pair.id] is Fate.used:
            side = "eval" if held_out(result.pair.prompt, settings.eval_fraction) else "train"
            rows[side].append(preference_row(result, settings.strength))
    return rows


def identity(ledgers: Ledgers, stored: Sequence[store.Stored], settings: Settings) -> str:
    """A hash of all that a version is made from."""
    counting = sorted(
        (entry.label for entry in stored if entry.counts), key=lambda label: label.key
    )
    return digest([_FORMAT, store.identity(counting), sorted(ledgers.exports), settings.figures()])


def numbers(labels_folder: Path) -> list[int]:
    """The versions that exist, in order."""
    return sorted(
        int(path.name)
        for path in (labels_folder / FOLDER).glob("*")
        if path.name.isdecimal() and (path / CARD_FILE).is_file()
    )


def newest(labels_folder: Path) -> Version | None:
    """The last version; None before the first. Raises UserError where its card can't be read."""
    known = numbers(labels_folder)
    if not known:
        return None
    folder = labels_folder / FOLDER / str(known[-1])
    card_file = folder / CARD_FILE
    try:
        return Version(known[-1], folder, json.loads(card_file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(
            f"{card_file} can't be read: {error}. Restore it, or remove {folder}: the "
            "next import writes it again."
        ) from error


def newest_or_new(
    labels_folder: Path,
    name: str,
    situation: Situation,
    settings: Settings,
    report: Mapping[str, Any],
    exports: Mapping[str, Path],
    sources: Sequence[Mapping[str, Any]],
) -> tuple[Version, bool]:
    """The newest version where it was made from the same, else a new one; and whether it is new.
    The arguments are those of `write`.
    """
    before = newest(labels_folder)
    now = identity(situation.ledgers, situation.stored, settings)
    if before is not None and before.card["identity"] == now:
        # a kill may have come between the version and its link
        point(labels_folder, before.number)
        return before, False
    return write(labels_folder, name, situation, settings, report, exports, sources), True


def write(
    labels_folder: Path,
    name: str,
    situation: Situation,
    settings: Settings,
    report: Mapping[str, Any],
    exports: Mapping[str, Path],
    sources: Sequence[Mapping[str, Any]] = (),
) -> Version:
    """Write the next version, and the link `latest` to it.

    exports: each export's folder in the labels directory; sources: name and sha256 of what was
    imported so far, for the card.
    """
    before = newest(labels_folder)
    number = before.number + 1 if before is not None else 1
    final = labels_folder / FOLDER / str(number)
    temporary = labels_folder / FOLDER / f".{number}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed import left
    temporary.mkdir(parents=True)
    card = make_card(
        name=name,
        number=number,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        identity=identity(situation.ledgers, situation.stored, settings),
        situation=situation,
        report=report,
        exports=[
            export_entry(situation.ledgers.exports[export], ledger)
            for export, ledger in sorted(exports.items())
        ],
        settings=settings.figures(),
        files=_write_rows(temporary, situation, settings),
        sources=[dict(source) for source in sources],
        previous=before.number if before is not None else None,
    )
    _write_json(temporary / "report.json", report)
    (temporary / "card.md").write_text(markdown(card), encoding="utf-8", errors="replace")
    _write_json(temporary / CARD_FILE, card)
    shutil.rmtree(final, ignore_errors=True)  # a directory without a card is no version
    temporary.rename(final)
    point(labels_folder, number)
    return Version(number, final, card)


def _write_rows(folder: Path, situation: Situation, settings: Settings) -> dict[str, Any]:
    """Write a version's JSON lines; {"rows", "sha256"} of each file by name, for the card."""
    rows = preference_rows(situation, settings)
    labels = []
    for entry in situation.stored:
        counts = entry.counts and entry.label.annotator not in situation.without
        labels.append({**store.label_row(entry.label, entry.number), "counts": counts})
    content = {
        "train.jsonl": rows["train"],
        "eval.jsonl": rows["eval"],
        "labels.jsonl": labels,
        "review.jsonl": review_rows(situation),
    }
    entries = {}
    for name, lines in content.items():
        _write_lines(folder / name, lines)
        entries[name] = {"rows": len(lines), "sha256": sha256(folder / name)}
    return entries


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


def point(labels_folder: Path, number: int) -> None:
    """Make `latest` a link to the version `number`."""
    link, temporary = labels_folder / LATEST, labels_folder / (LATEST + ".tmp")
    target = f"{FOLDER}/{number}"
    if link.is_symlink() and os.readlink(link) == target:
        return
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
