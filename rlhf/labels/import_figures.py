"""What an import shows at its end: metrics, tables, files, and the command that trains on the
labels.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.choices import Strength
from rlhf.labels.records import as_text
from rlhf.labels.report import Situation
from rlhf.labels.store import REFUSED_FILE, Added
from rlhf.labels.versions import Version

_TABLE_ROWS = 1000  # pairs in the tracker's table; labels.jsonl has all


def metrics_of(
    situation: Situation,
    figures: Mapping[str, Any],
    added: Added,
    refused: int,
    version: Version,
) -> dict[str, float]:
    """The import's line of metrics.jsonl; coefficients that are undefined are left out. `figures`:
    of the report; `refused`: how many rows.
    """
    metrics: dict[str, float] = {
        "label/new": added.new,
        "label/revised": added.revised,
        "label/known": added.known,
        "label/refused": refused,
        "label/total": len(situation.labels),
        "label/annotators": len(figures["annotators"]),
        "label/version": version.number,
    }
    for name, count in figures["pairs"].items():
        metrics[f"label/pairs_{name}"] = count
    for name in ("train", "eval", "review"):
        metrics[f"label/rows_{name}"] = version.rows(f"{name}.jsonl")
    for metric, coefficient in (
        ("agreement", "observed"),
        ("fleiss_kappa", "fleiss_kappa"),
        ("krippendorff_alpha", "krippendorff_alpha"),
    ):
        value = figures["agreement"][coefficient]["value"]
        if value is not None:
            metrics[f"label/{metric}"] = value
    return metrics


def table_rows(situation: Situation) -> list[dict[str, Any]]:
    """The tracker's table of labelled pairs, with who voted for what. `first` is the first answer
    in the order of the answers' ids, whatever side it was shown on.
    """
    votes: dict[str, list[str]] = defaultdict(list)
    for vote in situation.votes.votes:
        votes[vote.pair].append(f"{vote.annotator}: {vote.outcome.value}")
    rows = []
    for result in situation.aggregated.results[:_TABLE_ROWS]:
        first, second = result.pair.answers
        row = {
            "prompt": as_text(result.pair.prompt),
            "first": first.text,
            "second": second.text,
            "verdict": "split" if result.outcome is None else result.outcome.value,
            "confidence": result.confidence,
            "first_better": result.first_better,
            "labels": "; ".join(votes[result.pair.id]),
            "fate": situation.fates[result.pair.id].value,
            "first_policy": first.policy,
            "second_policy": second.policy,
            "task": result.pair.task,
        }
        rows.append(row)
    return rows


def ab_row(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """The result of an A/B comparison as a table's row."""
    rate = ""
    if comparison["win_rate"] is not None:
        low, high = comparison["interval"]
        rate = f"{comparison['win_rate']:.3f} ({low:.3f} to {high:.3f})"
    return {
        "a": comparison["a"],
        "b": comparison["b"],
        "a wins": comparison["a_wins"],
        "ties": comparison["ties"],
        "b wins": comparison["b_wins"],
        "win rate of b": rate,
        "e-value": comparison["e_value"],
        "decision": comparison["decision"],
    }


def shown_figures(
    labels: int,
    pairs: Mapping[str, int],
    added: Added,
    refused: int,
    version: Version,
    *,
    new: bool,
) -> dict[str, str]:
    """Figures for the console. `new`: whether this import made the version."""
    number = str(version.number)
    return {
        "labels": f"{labels}: {added.new} new, {added.revised} revised, "
        f"{added.known} known; {refused} rows refused",
        "pairs": f"{pairs.get('used', 0)} used of {pairs.get('judged', 0)} judged, "
        f"{version.rows('review.jsonl')} tasks for review",
        "version": number if new else f"{number} (nothing changed)",
    }


def shown_files(version: Version, labels_folder: Path, refused: int) -> dict[str, Path | str]:
    """Files for the console by what they are."""
    files: dict[str, Path | str] = {
        "train": version.file("train.jsonl"),
        "held out": version.file("eval.jsonl"),
        "card": version.file("card.md"),
    }
    if version.rows("review.jsonl"):
        files["review"] = version.file("review.jsonl")
    if refused:
        files["refused"] = labels_folder / REFUSED_FILE
    return files


def training_command(version: Version, strength: Strength) -> str | None:
    """The command that trains a reward model on the rows; None where there are none."""
    if not version.rows("train.jsonl"):
        return None
    words = ["python -m rlhf stage=reward", f"data.path={version.file('train.jsonl')}"]
    if version.rows("eval.jsonl"):
        words.append(f"data.eval_path={version.file('eval.jsonl')}")
    if strength is Strength.margin:
        words.append("stage.margin=true")
    elif strength is Strength.soft_label:
        words.append("stage.soft_label=true")
    return " ".join(words)
