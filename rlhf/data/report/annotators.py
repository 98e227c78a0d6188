"""What the people who judged say about the labels: agreement between them, accuracy against gold
items.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from conf.preparation.annotation import Aggregate, Repeats
from rlhf.data.agreement import Agreement, agreement
from rlhf.data.formats import Use
from rlhf.data.prepare.held import picked
from rlhf.data.prepare.items import Context, Item
from rlhf.data.prepare.judgements import Subject, subjects
from rlhf.data.report.looked import by_row
from rlhf.data.report.records import Marked, Section, Settings, Severity, Table, finding
from rlhf.data.report.remedies import REMEDIES
from rlhf.data.report.texts import wilson

ANNOTATOR = "annotator"  # column that names who judged: what the steps aggregate and review expect
GOLD = ("gold", "gold_label")  # columns with the label that is known to be right
_SIDES = {
    "chosen": True,
    "true": True,
    "1": True,
    "1.0": True,
    "rejected": False,
    "false": False,
    "0": False,
    "0.0": False,
}


def annotated(items: Sequence[Item], settings: Settings) -> list[Subject]:
    """What the rows with an annotator and a label judge, as the steps aggregate and review see it;
    of one annotator's several labels the last counts.
    """
    own = judges(settings.kind)
    rows = [row for row, labelled in by_row(named_rows, items) if own or labelled]
    named = list(picked(items, rows))
    options = Aggregate(annotator=ANNOTATOR, label=None if own else "label", repeats=Repeats.last)
    return subjects(named, options, Context(kind=settings.kind, seed=settings.seed, folder=Path()))


def judges(kind: Use) -> bool:
    """Whether such rows are judgements by themselves."""
    return kind in (Use.preference, Use.unpaired)


def named_rows(items: list[Item]) -> list[tuple[int, bool]]:
    """(row, whether it has a label) of those of some rows that say who judged."""
    out = []
    for number, item in enumerate(items):
        if _is_named(item):
            out.append((number, _is_labelled(item)))
    return out


def _is_named(item: Item) -> bool:
    name = item.columns.get(ANNOTATOR)
    return name is not None and bool(str(name).strip())


def _is_labelled(item: Item) -> bool:
    label = item.columns.get("label")
    return isinstance(label, (str, bool, int, float)) and label != ""


def disputed(judged: Sequence[Subject]) -> list[list[tuple[Item, str]]]:
    """The rows of each item that annotators label differently."""
    out = []
    for subject in judged:
        if len({str(judgement.label) for judgement in subject.judgements}) < 2:
            continue
        others = f"who differs from another of {len(subject.judgements)} annotators"
        out.append([(j.item, f"by {j.annotator}, {others}") for j in subject.judgements])
    return out


def kappa_of(result: Agreement) -> tuple[str, float | None]:
    """The kappa that fits: Cohen's of two annotators, Fleiss' of more."""
    if result.annotators == 2:
        return "Cohen's kappa", result.cohen
    return "Fleiss' kappa", result.fleiss.value


def annotators(items: Sequence[Item], settings: Settings) -> Section:
    """Agreement of the annotators named in column `annotator`."""
    title = "Annotators"
    judged = annotated(items, settings)
    labels = [label for subject in judged for label in subject.labels()]
    result = agreement(labels, seed=settings.seed) if labels else None
    if result is None or result.observed.items == 0:
        return Section(
            "annotators",
            title,
            {},
            unmeasured="no two rows hold labels of one item by different annotators (column "
            f"{ANNOTATOR})",
        )
    differing = disputed(judged)
    name, kappa = kappa_of(result)
    message = f"annotators differ on {len(differing)} of {result.observed.items} items"
    rows = Marked(settings.named, chain.from_iterable(differing))
    findings = finding("disagreement", Severity.warn, message, REMEDIES["disagreement"], rows)
    figures = {**result.figures(), "kappa": {"name": name, "value": kappa}}
    shown = (
        ("items with two labels or more", result.observed.items),
        ("annotators", result.annotators),
        ("observed agreement", result.observed.value),
        ("Cohen's kappa, mean over pairs", result.cohen),
        ("Fleiss' kappa", result.fleiss.value),
        ("Krippendorff's alpha", result.krippendorff.value),
    )
    return Section(
        "annotators", title, figures, findings, (Table("Agreement", ("figure", "value"), shown),)
    )


def gold_verdict(columns: Mapping[str, Any], kind: Use) -> bool | None:
    """Whether a row's label is what its gold column says; None without a gold label that can be
    compared.

    A pair's gold says which side is better: chosen or rejected (or true, false, 1, 0: whether the
    chosen one is).
    """
    gold = next((columns[key] for key in GOLD if columns.get(key) not in (None, "")), None)
    if gold is None:
        return None
    text = str(gold).strip().casefold()
    if kind is Use.preference:
        return _SIDES.get(text)
    label = columns.get("label")
    if label is None:
        return None
    given = str(label).strip().casefold()
    return _SIDES.get(given, given) == _SIDES.get(text, text)


@dataclass(frozen=True, slots=True)
class GoldVerdicts:
    """(row, whether its label is the gold one) of those of some rows that have both."""

    kind: Use

    def __call__(self, items: list[Item]) -> list[tuple[int, bool]]:
        out = []
        for number, item in enumerate(items):
            verdict = gold_verdict(item.columns, self.kind)
            if verdict is not None:
                out.append((number, verdict))
        return out


def gold(items: Sequence[Item], settings: Settings) -> Section:
    """Accuracy of the labels against gold items."""
    title = "Gold items"
    known: list[bool] = []
    wrong = Marked(settings.named)
    for row, verdict in by_row(GoldVerdicts(settings.kind), items):
        known.append(verdict)
        if not verdict:
            wrong.add(items[row], "the label is not the gold one")
    if not known:
        return Section(
            "gold",
            title,
            {},
            unmeasured=f"no row has a label and a gold label ({' or '.join(GOLD)})",
        )
    right = sum(known)
    low, high = wilson(right, len(known))
    message = f"{len(wrong)} of {len(known)} gold items have another label"
    findings = finding("wrong_labels", Severity.fail, message, REMEDIES["wrong_labels"], wrong)
    figures = {
        "items": len(known),
        "right": right,
        "accuracy": right / len(known),
        "low": low,
        "high": high,
    }
    table = Table(
        "Gold items",
        ("figure", "value"),
        (
            ("items", len(known)),
            ("accuracy", right / len(known)),
            ("95 % interval", f"{low:.3f} to {high:.3f}"),
        ),
    )
    return Section("gold", title, figures, findings, (table,))
