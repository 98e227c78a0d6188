"""What the people who judged say about the labels: agreement between them, accuracy against gold items."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.data.agreement import Agreement, Label, agreement
from rlhf.data.formats import Use
from rlhf.data.prepare.items import Item, joined, prompt_of
from rlhf.data.prepare.texts import normalised
from rlhf.data.report.pairs import sides
from rlhf.data.report.records import Section, Settings, Severity, Table, finding
from rlhf.data.report.remedies import REMEDIES
from rlhf.data.report.texts import wilson

ANNOTATOR = "annotator"
GOLD = ("gold", "gold_label")  # columns with the label that is known to be right
_IDS = ("item_id", "pair_id", "id")
_SIDES = {"chosen": True, "true": True, "1": True, "1.0": True, "rejected": False, "false": False, "0": False, "0.0": False}


def judged_item(item: Item, kind: Use) -> str:
    """What a row judges, the same for every annotator: its texts without the label, a pair's in either order."""
    if kind is not Use.preference:
        return normalised(joined(item.columns))
    prompt = normalised(prompt_of(item.columns)) if item.columns.get("prompt") else ""
    return json.dumps([prompt, *sorted(map(normalised, sides(item)))], ensure_ascii=False)


def judgement(item: Item, kind: Use) -> str | None:
    """The label that a row gives: of a pair whether the first of its two texts (in the order of `judged_item`) is better; else its column label."""
    if kind is Use.preference:
        chosen, rejected = map(normalised, sides(item))
        return None if chosen == rejected else str(chosen < rejected)
    value = item.columns.get("label")
    return str(value) if isinstance(value, (str, bool, int)) else None


def judgements(items: Sequence[Item], kind: Use) -> list[tuple[Label, Item]]:
    """Every label by a named annotator, with its row; of one annotator's several labels of an item the last counts."""
    found: dict[tuple[str, str], tuple[Label, Item]] = {}
    for item in items:
        annotator, label = item.columns.get(ANNOTATOR), judgement(item, kind)
        if annotator is None or annotator == "" or label is None:
            continue
        key = (judged_item(item, kind), str(annotator))
        found[key] = (Label(*key, label), item)
    return list(found.values())


def disputed(labels: Sequence[tuple[Label, Item]]) -> list[list[tuple[Item, str]]]:
    """The rows of each item that annotators label differently."""
    by_item: dict[str, list[tuple[Label, Item]]] = defaultdict(list)
    for label, item in labels:
        by_item[label.item].append((label, item))
    return [
        [(item, f"by {label.annotator}, against {len(members) - 1} other labels of this item") for label, item in members]
        for members in by_item.values()
        if len({label.label for label, _ in members}) > 1
    ]


def kappa_of(found: Agreement) -> tuple[str, float | None]:
    """The kappa that fits: Cohen's of two annotators, Fleiss' of more."""
    return ("Cohen's kappa", found.cohen) if found.annotators == 2 else ("Fleiss' kappa", found.fleiss.value)


def annotators(items: Sequence[Item], settings: Settings) -> Section:
    """Agreement of the annotators named in column `annotator`."""
    title = "Annotators"
    labels = judgements(items, settings.kind)
    found = agreement([label for label, _ in labels], seed=settings.seed) if labels else None
    if found is None or found.observed.items == 0:
        return Section("annotators", title, {}, unmeasured=f"no two rows hold labels of one item by different annotators (column {ANNOTATOR})")
    differing = disputed(labels)
    name, kappa = kappa_of(found)
    message = f"annotators differ on {len(differing)} of {found.observed.items} items"
    rows = [row for members in differing for row in members]
    findings = finding("disagreement", Severity.warn, message, REMEDIES["disagreement"], rows, settings.named)
    figures = {**found.figures(), "kappa": {"name": name, "value": kappa}}
    shown = (
        ("items with two labels or more", found.observed.items),
        ("annotators", found.annotators),
        ("observed agreement", found.observed.value),
        ("Cohen's kappa, mean over pairs", found.cohen),
        ("Fleiss' kappa", found.fleiss.value),
        ("Krippendorff's alpha", found.krippendorff.value),
    )
    return Section("annotators", title, figures, findings, (Table("Agreement", ("figure", "value"), shown),))


def gold_verdict(columns: Mapping[str, Any], kind: Use) -> bool | None:
    """Whether a row's label is what its gold column says; None without a gold label that can be compared.

    A pair's gold says which side is better: chosen or rejected (or true, false, 1, 0: whether the chosen one is).
    """
    gold = next((columns[key] for key in GOLD if columns.get(key) not in (None, "")), None)
    if gold is None:
        return None
    said = str(gold).strip().casefold()
    if kind is Use.preference:
        return _SIDES.get(said)
    label = columns.get("label")
    if label is None:
        return None
    given = str(label).strip().casefold()
    return _SIDES.get(given, given) == _SIDES.get(said, said)


def gold(items: Sequence[Item], settings: Settings) -> Section:
    """Accuracy of the labels against gold items."""
    title = "Gold items"
    verdicts = [(item, gold_verdict(item.columns, settings.kind)) for item in items]
    known = [(item, v) for item, v in verdicts if v is not None]
    if not known:
        return Section("gold", title, {}, unmeasured=f"no row has a label and a gold label ({' or '.join(GOLD)})")
    right = sum(v for _, v in known)
    low, high = wilson(right, len(known))
    wrong = [(item, "the label is not the gold one") for item, v in known if not v]
    message = f"{len(wrong)} of {len(known)} gold items have another label"
    findings = finding("wrong_labels", Severity.fail, message, REMEDIES["wrong_labels"], wrong, settings.named)
    figures = {"items": len(known), "right": right, "accuracy": right / len(known), "low": low, "high": high}
    table = Table(
        "Gold items", ("figure", "value"), (("items", len(known)), ("accuracy", right / len(known)), ("95 % interval", f"{low:.3f} to {high:.3f}"))
    )
    return Section("gold", title, figures, findings, (table,))
