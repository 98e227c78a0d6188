"""Preference pairs: sides that are equal, judgements that contradict each other, and whether length
decides.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from rlhf.data.prepare.items import Item, answers_of, joined, prompt_of
from rlhf.data.prepare.near import key_of, plainly
from rlhf.data.prepare.texts import normalised
from rlhf.data.report.records import (
    Finding,
    Histogram,
    Marked,
    Section,
    Settings,
    Severity,
    Table,
    finding,
)
from rlhf.data.report.remedies import REMEDIES
from rlhf.data.report.texts import wilson, words

# share of pairs with the longer side chosen (or the shorter one) from which length is worth a
# warning
BIASED = 0.6


def sides(item: Item) -> tuple[str, str]:
    """The texts of the chosen and of the rejected answer."""
    answers = answers_of(item.columns)
    return answers["chosen"], answers["rejected"]


def contradicting(items: Sequence[Item]) -> list[tuple[int, int]]:
    """(row, the first row that judges the same two answers to the same prompt the other way), for
    every row of such a pair of two texts.
    """
    # first row by chosen text, of each prompt with two answers
    firsts: dict[tuple[bytes, frozenset[bytes]], dict[bytes, int]] = defaultdict(dict)
    pairs = []
    for index, item in enumerate(items):
        asks = prompt_of(item.columns) if item.columns.get("prompt") else ""
        prompt, chosen, rejected = (key_of(plainly((text, ""))) for text in (asks, *sides(item)))
        key = prompt, frozenset((chosen, rejected))
        pairs.append((chosen, key))
        if chosen != rejected:
            firsts[key].setdefault(chosen, index)
    out = []
    for index, (chosen, key) in enumerate(pairs):
        others = [first for winner, first in firsts.get(key, {}).items() if winner != chosen]
        out += [(index, other) for other in others]
    return out


def length_preference(differences: Sequence[float]) -> tuple[float, float, float, float]:
    """What length says about preference, from the differences chosen - rejected in length.

    Returns the share of pairs with the longer side chosen among those that differ, its 95 %
    interval, and the correlation of the length difference with being chosen, each pair taken both
    ways round: x = +d, y = +1 and x = -d, y = -1, so both means are 0 and it is mean(d) /
    sqrt(mean(d^2)). Without a pair that differs: (0.5, 0, 1, 0).
    """
    differing = [d for d in differences if d]
    if not differing:
        return 0.5, 0.0, 1.0, 0.0
    longer = sum(d > 0 for d in differing)
    low, high = wilson(longer, len(differing))
    mean = sum(differences) / len(differences)
    mean_square = sum(d * d for d in differences) / len(differences)
    return longer / len(differing), low, high, mean / math.sqrt(mean_square)


def pairs(items: Sequence[Item], settings: Settings) -> Section:
    """Every check of pairs."""
    title = "Pairs"
    if not items:
        return Section("pairs", title, {}, unmeasured="there are no rows")
    equal, lengths = Marked(settings.named), []
    for item in items:
        chosen, rejected = sides(item)
        lengths.append((len(words(chosen)), len(words(rejected))))
        if normalised(chosen) == normalised(rejected):
            equal.add(item, "both sides are the same")
    opposite = (
        (items[i], f"{items[j].place} judges the same two answers the other way")
        for i, j in contradicting(items)
    )
    against = Marked(settings.named, opposite)
    share, low, high, correlation = length_preference([a - b for a, b in lengths])
    findings = [
        *finding(
            "equal_sides",
            Severity.fail,
            f"{len(equal)} pairs have the same text on both sides",
            REMEDIES["equal_sides"],
            equal,
        ),
        *finding(
            "contradictions",
            Severity.fail,
            f"{len(against)} rows judge the same two answers to the same prompt in opposite ways",
            REMEDIES["contradictions"],
            against,
        ),
    ]
    if (low > 0.5 and share >= BIASED) or (high < 0.5 and share <= 1 - BIASED):
        findings += _length_bias(items, lengths, share, settings.named)
    figures = {
        "pairs": len(items),
        "equal_sides": len(equal),
        "contradicting_rows": len(against),
        "longer_chosen": share,
        "longer_chosen_low": low,
        "longer_chosen_high": high,
        "length_correlation": correlation,
        "equal_length": sum(a == b for a, b in lengths),
    }
    table, plot = _table(figures), _length_plot(lengths)
    return Section("pairs", title, figures, tuple(findings), (table,), (plot,))


def _length_bias(
    items: Sequence[Item], lengths: Sequence[tuple[int, int]], share: float, named: int
) -> tuple[Finding, ...]:
    """The finding that length decides, `share` being that of the longer sides chosen."""
    longer = share > 0.5
    marked = Marked(named)
    for item, (a, b) in zip(items, lengths, strict=True):
        if a != b and (a > b) == longer:
            marked.add(item, f"{a} against {b} words")
    side = "longer" if longer else "shorter"
    message = (
        f"the {side} side is chosen in "
        f"{max(share, 1 - share):.0%} of the pairs whose lengths differ"
    )
    return finding("length_bias", Severity.warn, message, REMEDIES["length_bias"], marked)


def _table(figures: dict[str, Any]) -> Table:
    interval = f"{figures['longer_chosen_low']:.3f} to {figures['longer_chosen_high']:.3f}"
    rows = (
        ("pairs", figures["pairs"]),
        ("equal sides", figures["equal_sides"]),
        ("rows that another one contradicts", figures["contradicting_rows"]),
        ("longer side chosen, share", figures["longer_chosen"]),
        ("its 95 % interval", interval),
        (
            "correlation of length difference (words) and preference",
            figures["length_correlation"],
        ),
    )
    return Table("Pairs", ("figure", "value"), rows)


def _length_plot(lengths: Sequence[tuple[int, int]]) -> Histogram:
    return Histogram(
        "Length of the chosen side minus the rejected one",
        "words",
        {"chosen - rejected": [float(a - b) for a, b in lengths]},
        mark=0.0,
        mark_name="equal",
    )


def judged(items: Sequence[Item], settings: Settings) -> Section:
    """Answers judged by themselves: the same answer to the same prompt, once good and once bad."""
    firsts: dict[bytes, dict[str, int]] = defaultdict(dict)  # first row by label, of each text
    keys = [key_of(plainly((joined(item.columns), ""))) for item in items]
    for index, (item, key) in enumerate(zip(items, keys, strict=True)):
        firsts[key].setdefault(str(item.columns["label"]), index)
    against = Marked(settings.named)
    for item, key in zip(items, keys, strict=True):
        for label, first in firsts[key].items():
            if label != str(item.columns["label"]):
                against.add(item, f"{items[first].place} judges the same answer the other way")
    message = f"{len(against)} rows judge the same answer to the same prompt in opposite ways"
    findings = finding(
        "contradictions",
        Severity.fail,
        message,
        REMEDIES["contradictions"],
        against,
    )
    table = Table(
        "Judged answers",
        ("figure", "value"),
        (("answers", len(items)), ("rows that another one contradicts", len(against))),
    )
    return Section(
        "judged",
        "Judged answers",
        {"answers": len(items), "contradicting_rows": len(against)},
        findings,
        (table,),
    )
