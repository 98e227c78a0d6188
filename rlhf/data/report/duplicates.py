"""Rows that repeat others: within a split duplicates, across the splits leakage.

What counts as the same and as nearly the same is what the steps exact_duplicates, near_duplicates
and split of data.pipeline mean by it.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from conf.preparation.base import Part
from rlhf.data.formats import Use
from rlhf.data.prepare.clusters import beside_pictures
from rlhf.data.prepare.held import Mapped
from rlhf.data.prepare.items import Item, prompt_of, shown_in
from rlhf.data.prepare.minhash import Sides
from rlhf.data.prepare.near import Signed, clusters_of, key_of
from rlhf.data.prepare.texts import sides
from rlhf.data.report.looked import over
from rlhf.data.report.records import Finding, Marked, Section, Settings, Severity, Table, finding
from rlhf.data.report.remedies import REMEDIES

Key = bytes  # of the normalised text, and apart from it what is judged bad
_NOTHING: Key = key_of(("", ""))


@dataclass(frozen=True, slots=True)
class Whole:
    """All of a row's texts; a pair with its sides exchanged is another row."""

    kind: Use

    def __call__(self, item: Item) -> Sides:
        return sides(item.columns, Part.whole, self.kind)


def prompt(item: Item) -> Sides:
    """What a row asks, where it asks something."""
    asks = item.columns.get("prompt") or item.columns.get("messages")
    return (prompt_of(item.columns) if asks else "", "")


@dataclass(frozen=True, slots=True)
class SignedRows:
    """What a process does to some rows: their splits, their pictures, and what near duplicates are
    told by.
    """

    text: Callable[[Item], Sides]
    seed: int

    def __call__(self, items: list[Item]) -> tuple[list[str], list[tuple[str, ...]], Any]:
        texts = list(map(self.text, items))
        splits = [item.split for item in items]
        shown = [shown_in(item.columns) for item in items]
        return splits, shown, Signed(self.seed)(texts)


@dataclass(frozen=True, slots=True)
class Compared:
    """Rows, and the texts of theirs that are compared. Lists have the rows' length; a row with
    nothing to compare has the key _NOTHING.
    """

    items: Sequence[Item]
    splits: list[str]  # train, eval
    keys: list[Key]  # equal for equal rows
    clusters: list[int]  # equal for near-duplicates (connected components)


def _compared(
    items: Sequence[Item],
    text: Callable[[Item], Sides],
    settings: Settings,
    *,
    numbers: bool,
) -> Compared:
    splits: list[str] = []
    shown: list[tuple[str, ...]] = []

    def signed() -> Iterator[Any]:
        for own, pictures, part in over(SignedRows(text, settings.seed), items):
            splits.extend(map(sys.intern, own))
            shown.extend(pictures)
            yield part

    keys, clusters = clusters_of(
        signed(), Mapped(text, items), threshold=settings.near, numbers=numbers
    )
    if any(shown):
        keys = [_beside(key, own) for key, own in zip(keys, shown, strict=True)]
        labels = beside_pictures(shown, lambda some: [int(clusters[row]) for row in some])
        return Compared(items, splits, keys, labels)
    return Compared(items, splits, keys, clusters.tolist())


def _beside(key: Key, shown: tuple[str, ...]) -> Key:
    """The key of a text beside pictures: of rows of one text those with the same ones are equal."""
    if not shown:
        return key
    return key_of((key.hex(), " ".join(shown)))


def whole(items: Sequence[Item], settings: Settings) -> Compared:
    """Rows by all of their texts; a pair with its sides exchanged is another row, and so is one
    problem with other numbers.
    """
    return _compared(items, Whole(settings.kind), settings, numbers=True)


def asked(items: Sequence[Item], settings: Settings) -> Compared:
    """Rows by what they ask, where they ask something."""
    return _compared(items, prompt, settings, numbers=False)


def copies(rows: Compared, split: str) -> list[tuple[int, int]]:
    """(row, the first row of the split that it repeats). No copies: the judgement of another
    annotator, and one row drawn again by step balance.
    """
    first: dict[tuple[Key, str], int] = {}
    keys: set[tuple[str, int, Key]] = set()
    out = []
    often = Counter(rows.keys)
    for index, key in enumerate(rows.keys):
        if often[key] < 2 or key == _NOTHING:
            continue
        if rows.splits[index] != split:
            continue
        item = rows.items[index]
        if (item.origin, item.number, key) in keys:
            continue
        keys.add((item.origin, item.number, key))
        earlier = first.setdefault((key, str(item.columns.get("annotator"))), index)
        if earlier != index:
            out.append((index, earlier))
    return out


def alike(rows: Compared, split: str) -> list[tuple[int, int, int]]:
    """(row, the first row of its cluster, different texts in the cluster) of the split's
    near-duplicates. Equal rows count once.
    """
    members: dict[int, dict[Key, int]] = defaultdict(dict)
    for index, (own, key) in enumerate(zip(rows.splits, rows.keys, strict=True)):
        if own == split and key != _NOTHING:
            members[rows.clusters[index]].setdefault(key, index)
    pairs = [
        (i, min(texts.values()), len(texts)) for texts in members.values() for i in texts.values()
    ]
    return sorted((i, first, count) for i, first, count in pairs if i != first)


def duplicates(rows: Compared, settings: Settings, split: str) -> Section:
    """Rows of one split that repeat an earlier one: what de-duplication would leave out."""
    total = rows.splits.count(split)
    items = rows.items
    same = ((items[i], f"the same as {items[j].place}") for i, j in copies(rows, split))
    like = (
        (items[i], f"nearly the same as {items[j].place} (cluster of {n})")
        for i, j, n in alike(rows, split)
    )
    exact, near = Marked(settings.named, same), Marked(settings.named, like)
    findings = (
        *_finding(
            "exact_duplicates",
            f"{len(exact)} of {total} {split} rows repeat an earlier row",
            exact,
        ),
        *_finding(
            "near_duplicates",
            f"{len(near)} of {total} {split} rows are nearly the same as an earlier row",
            near,
        ),
    )
    figures = {"rows": total, "exact": len(exact), "near": len(near), "threshold": settings.near}
    counted = (
        ("exact", len(exact), _share(exact, total)),
        ("near", len(near), _share(near, total)),
    )
    table = Table(f"Duplicates, {split}", ("kind", "rows", "share"), counted)
    return Section(
        f"duplicates_{split}", f"Duplicates among {split} rows", figures, findings, (table,)
    )


def crossing(rows: Compared) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(held-out row, the first training row that is the same); and (held-out row, the first
    training row of its cluster) of the others.
    """
    same: dict[Key, int] = {}
    like: dict[int, int] = {}
    for index, split in enumerate(rows.splits):
        if split == "train" and rows.keys[index] != _NOTHING:
            same.setdefault(rows.keys[index], index)
            like.setdefault(rows.clusters[index], index)
    held = [
        i for i, split in enumerate(rows.splits) if split == "eval" and rows.keys[i] != _NOTHING
    ]
    exact = [(i, same[rows.keys[i]]) for i in held if rows.keys[i] in same]
    near = [
        (i, like[rows.clusters[i]])
        for i in held
        if rows.keys[i] not in same and rows.clusters[i] in like
    ]
    return exact, near


def leakage(rows: Compared, prompts: Compared, settings: Settings) -> Section:
    """Held-out rows whose content, or whose prompt, training rows hold as well. Both arguments are
    about the same rows.
    """
    title = "Leakage between training and evaluation"
    held = rows.splits.count("eval")
    if held in (0, len(rows.items)):
        return Section(
            "leakage",
            title,
            {},
            unmeasured="there are no held-out rows" if not held else "there are no training rows",
        )
    # null: not compared
    figures: dict[str, int | None] = {"eval_rows": held, "prompt_exact": None, "prompt_near": None}
    findings: tuple[Finding, ...] = ()
    shown: list[tuple[str, str, int, float]] = []
    compared = {"row": rows}
    if len(set(prompts.keys)) > 1:
        compared["prompt"] = prompts  # one instruction for all rows leaks nothing
    for what, pairs in compared.items():
        exact, near = crossing(pairs)
        same = Marked(settings.named, _with_places(pairs, exact, f"the same {what} as"))
        like = Marked(settings.named, _with_places(pairs, near, f"nearly the same {what} as"))
        figures |= {f"{what}_exact": len(same), f"{what}_near": len(like)}
        counted = f"of {held} held-out rows"
        findings += _finding(
            f"{what}_leakage_exact",
            f"{len(same)} {counted}: the same {what} trains",
            same,
            Severity.fail,
        )
        findings += _finding(
            f"{what}_leakage_near",
            f"{len(like)} {counted}: a nearly equal {what} trains",
            like,
        )
        shown += [
            (f"{what}s", "exact", len(same), _share(same, held)),
            (f"{what}s", "near", len(like), _share(like, held)),
        ]
    table = Table(
        "Held-out rows that training has seen",
        ("compared", "kind", "held-out rows", "share"),
        tuple(shown),
    )
    return Section("leakage", title, figures, findings, (table,))


def _with_places(
    rows: Compared, pairs: Iterable[tuple[int, int]], note: str
) -> Iterator[tuple[Item, str]]:
    """The first row of each pair, with the place of the second."""
    for one, other in pairs:
        yield rows.items[one], f"{note} {rows.items[other].place}"


def _share(rows: Marked, total: int) -> float:
    if total:
        return len(rows) / total
    return 0.0


def _finding(
    check: str,
    message: str,
    rows: Marked,
    severity: Severity = Severity.warn,
) -> tuple[Finding, ...]:
    return finding(check, severity, message, REMEDIES[check], rows)
