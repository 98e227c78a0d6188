"""The report's figures as rows of tables for a screen."""

from collections.abc import Iterable
from typing import Any

from rlhf.labels.report import Figures


def _percent(share: Figures) -> str:
    if share["share"] is None:
        return ""
    interval = f" ({share['low']:.0%}-{share['high']:.0%})" if "low" in share else ""
    return f"{share['share']:.0%}{interval} of {share['n']}"


def _formatted(value: float | None, form: str) -> str:
    """`value` by the format specification `form`; nothing where it is undefined."""
    return "" if value is None else format(value, form)


def _interval(estimate: Figures) -> str:
    if estimate["low"] is None:
        return ""
    return f"{estimate['low']:.3f} to {estimate['high']:.3f}"


def _name(figures: Figures) -> str:
    name = str(figures["annotator"])
    return name if figures["counts"] else f"{name} (doesn't count)"


def annotator_rows(annotators: Iterable[Figures]) -> list[dict[str, Any]]:
    """How much each annotator has labelled, and how well."""
    rows = []
    for figures in annotators:
        verdicts = figures["verdicts"]
        row = {
            "annotator": _name(figures),
            "labels": figures["labels"],
            "tie/skip": f"{verdicts['tie']}/{verdicts['skip'] + verdicts['cancelled']}",
            "median s": _formatted(figures["seconds"]["median"], ".1f"),
            "gold": _percent(figures["gold"]),
            "itself": _percent(figures["itself"]),
            "others": _percent(figures["others"]),
            "reliability": _formatted(figures["reliability"], ".2f"),
            "suspicions": "; ".join(figures["suspicions"]) or "none",
        }
        rows.append(row)
    return rows


def bias_rows(annotators: Iterable[Figures]) -> list[dict[str, Any]]:
    """What each annotator's choices go with. How often the longer answer wins stands beside how
    often the pairs' results and the scores prefer it in the same pairs.
    """
    rows = []
    for figures in annotators:
        left, longer = figures["left"], figures["longer"]
        side = _percent(left)
        if left["p"] is not None:
            side += f", p = {left['p']:.2g}"
        row = {
            "annotator": _name(figures),
            "left side": side,
            "longer answer": _percent(longer),
            "by verdicts": _formatted(longer["verdicts"], ".0%"),
            "by scores": _formatted(longer["model"], ".0%"),
            "higher score": _percent(figures["model"]),
        }
        rows.append(row)
    return rows


def agreement_rows(figures: Figures) -> list[dict[str, Any]]:
    """Coefficients with their intervals, then Cohen's kappa of each two annotators; empty where no
    pair has two labels.
    """
    if not figures["observed"]["items"]:
        return []
    estimates = [
        ("observed agreement", figures["observed"]),
        ("Fleiss' kappa", figures["fleiss_kappa"]),
        ("Krippendorff's alpha", figures["krippendorff_alpha"]),
    ]
    estimates += [
        (f"Cohen's kappa, {' and '.join(pair['annotators'])}", pair)
        for pair in figures["cohen_kappa"]["pairs"]
    ]
    return [
        {
            "coefficient": name,
            "value": estimate["value"],
            "95 % interval": _interval(estimate),
            "pairs": estimate["items"],
        }
        for name, estimate in estimates
    ]
