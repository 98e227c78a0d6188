"""Rows that repeat others: within a split duplicates, across the splits leakage."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.data.prepare.items import Item, joined, prompt_of
from rlhf.data.report.records import Finding, Section, Settings, Severity, Table, finding
from rlhf.data.report.remedies import REMEDIES
from rlhf.data.report.similar import Shingles, clusters, exact_key, near, row_shingles, shingles

_JUDGED_BY = ("label", "annotator")  # rows of the same texts that differ here are several judgements, not copies


@dataclass(frozen=True, slots=True)
class Compared:
    """Rows as they are compared: by key for equality, by shingles for likeness. Rows with an empty key repeat nothing."""

    items: Sequence[Item]
    keys: list[str]
    sets: list[Shingles]


def whole(items: Sequence[Item]) -> Compared:
    """All of a row's texts."""
    return Compared(items, [exact_key(joined(item.columns)) for item in items], [row_shingles(item) for item in items])


def asked(items: Sequence[Item]) -> Compared:
    """What a row asks, where it asks something."""
    texts = [prompt_of(item.columns) if item.columns.get("prompt") or item.columns.get("messages") else "" for item in items]
    return Compared(items, [exact_key(text) for text in texts], [shingles(text) for text in texts])


def copies(rows: Compared) -> list[tuple[int, int]]:
    """(row, the first one that it repeats): the same texts, judged the same way by the same person."""
    first: dict[tuple[str, ...], int] = {}
    out = []
    for index, (item, key) in enumerate(zip(rows.items, rows.keys, strict=True)):
        earlier = first.setdefault((key, *(str(item.columns.get(c)) for c in _JUDGED_BY)), index)
        if earlier != index and key:
            out.append((index, earlier))
    return out


def first_of_each(keys: Sequence[str]) -> list[int]:
    """The places at which a key that is not empty stands for the first time."""
    first: dict[str, int] = {}
    for index, key in enumerate(keys):
        first.setdefault(key, index)
    return sorted(index for key, index in first.items() if key)


def alike(rows: Compared, settings: Settings) -> list[tuple[int, str]]:
    """(row, which one it is like) of all rows but the first of each cluster of near-duplicates; a row that repeats another one is not among them."""
    firsts = first_of_each(rows.keys)
    found = near([rows.sets[i] for i in firsts], settings.near, settings.seed)
    nearest: dict[int, tuple[float, int]] = {}  # of the earlier rows
    for pair in found:
        nearest[pair.second] = max(nearest.get(pair.second, (0.0, 0)), (pair.similarity, -pair.first))
    out = []
    for members in clusters((pair.first, pair.second) for pair in found):
        for i in members[1:]:
            if i in nearest:
                said = f"{nearest[i][0]:.2f} alike to {rows.items[firsts[-nearest[i][1]]].place}"
            else:
                said = f"through a later row alike to {rows.items[firsts[members[0]]].place}"
            out.append((firsts[i], said))
    return sorted(out)


def duplicates(items: Sequence[Item], settings: Settings, split: str) -> Section:
    """Rows of one split that repeat an earlier one: what de-duplication would leave out."""
    rows, total = whole(items), len(items)
    exact = [(items[i], f"the same as {items[j].place}") for i, j in copies(rows)]
    surplus = [(items[i], said) for i, said in alike(rows, settings)]
    findings = (
        *_found("exact_duplicates", f"{len(exact)} of {total} {split} rows repeat an earlier row", exact, settings),
        *_found("near_duplicates", f"{len(surplus)} of {total} {split} rows are nearly the same as another row", surplus, settings),
    )
    figures = {"rows": total, "exact": len(exact), "near": len(surplus), "threshold": settings.near}
    counted = (("exact", len(exact), _share(exact, total)), ("near", len(surplus), _share(surplus, total)))
    table = Table(f"Duplicates, {split}", ("kind", "rows", "share"), counted)
    return Section(f"duplicates_{split}", f"Duplicates among {split} rows", figures, findings, (table,))


def crossing(train: Compared, held: Compared, settings: Settings) -> tuple[list[tuple[int, int]], list[tuple[int, int, float]]]:
    """(held-out row, training row) that are the same; and (held-out, training, similarity) of the others that are nearly so, each once."""
    firsts = first_of_each(train.keys)
    known = {train.keys[j]: j for j in firsts}
    exact = [(i, known[key]) for i, key in enumerate(held.keys) if key in known]
    leaked = {i for i, _ in exact}
    rest = [i for i in range(len(held.keys)) if i not in leaked and held.keys[i]]
    best: dict[int, tuple[float, int]] = {}
    for pair in near([*(train.sets[j] for j in firsts), *(held.sets[i] for i in rest)], settings.near, settings.seed):
        if pair.first < len(firsts) <= pair.second:
            i, j = rest[pair.second - len(firsts)], firsts[pair.first]
            best[i] = max(best.get(i, (0.0, 0)), (pair.similarity, -j))
    return exact, [(i, -j, s) for i, (s, j) in sorted(best.items())]


def leakage(train: Sequence[Item], held: Sequence[Item], settings: Settings) -> Section:
    """Held-out rows whose content, or whose prompt, training rows hold as well."""
    title = "Leakage between training and evaluation"
    if not train or not held:
        return Section("leakage", title, {}, unmeasured="there are no held-out rows" if train else "there are no training rows")
    figures: dict[str, int | None] = {"eval_rows": len(held), "prompt_exact": None, "prompt_near": None}  # null: not compared
    findings: tuple[Finding, ...] = ()
    rows: list[tuple[str, str, int, float]] = []
    compared = {"row": (whole(train), whole(held)), "prompt": (asked(train), asked(held))}
    if len({*compared["prompt"][0].keys, *compared["prompt"][1].keys}) == 1:
        compared.pop("prompt")  # no prompts, or one instruction for all rows, which leaks nothing
    for what, (first, second) in compared.items():
        exact, close = crossing(first, second, settings)
        same = [(held[i], f"the same {what} as {train[j].place}") for i, j in exact]
        like = [(held[i], f"{what} {s:.2f} alike to {train[j].place}") for i, j, s in close]
        figures |= {f"{what}_exact": len(same), f"{what}_near": len(like)}
        counted = f"of {len(held)} held-out rows"
        findings += _found(f"{what}_leakage_exact", f"{len(same)} {counted}: the same {what} trains", same, settings, Severity.fail)
        findings += _found(f"{what}_leakage_near", f"{len(like)} {counted}: a nearly equal {what} trains", like, settings)
        rows += [(f"{what}s", "exact", len(same), _share(same, len(held))), (f"{what}s", "near", len(like), _share(like, len(held)))]
    table = Table("Held-out rows that training has seen", ("compared", "kind", "held-out rows", "share"), tuple(rows))
    return Section("leakage", title, figures, findings, (table,))


def _share(rows: Sequence[object], total: int) -> float:
    return len(rows) / total if total else 0.0


def _found(check: str, message: str, rows: Sequence[tuple[Item, str]], settings: Settings, severity: Severity = Severity.warn) -> tuple[Finding, ...]:
    return finding(check, severity, message, REMEDIES[check], rows, settings.named)
