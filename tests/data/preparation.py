"""What tests of preparation steps share: rows of each kind, and one step run by itself."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rlhf.data.formats import Use
from rlhf.data.prepare.items import Item
from rlhf.data.prepare.pipeline import run
from rlhf.data.prepare.store import StepReport


def sft(*texts: str) -> list[Item]:
    """Whole texts."""
    return [
        Item({"text": text}, "rows.jsonl", number) for number, text in enumerate(texts, start=1)
    ]


def pairs(*rows: tuple[str, str, str]) -> list[Item]:
    """Prompt, chosen, rejected."""
    return [
        Item({"prompt": p, "chosen": c, "rejected": r}, "pairs.jsonl", number)
        for number, (p, c, r) in enumerate(rows, start=1)
    ]


def judged(*rows: tuple[str, str, bool]) -> list[Item]:
    """Prompt, completion, label."""
    return [
        Item({"prompt": p, "completion": c, "label": good}, "judged.jsonl", number)
        for number, (p, c, good) in enumerate(rows, start=1)
    ]


def apply(
    items: list[Item], step: str, kind: Use = Use.sft, *, seed: int = 0, **options: Any
) -> tuple[list[Item], dict[int, str], StepReport]:
    """What a step keeps, the reason of each row that it rejects by the row's number, and its
    report.
    """
    with TemporaryDirectory() as folder:
        out = run(items, [{"step": step, **options}], kind=kind, seed=seed, folder=Path(folder))
        lines = [json.loads(text) for text in out.rejected.read_text(encoding="utf-8").splitlines()]
    return out.items, {row["row"]: row["reason"] for row in lines}, out.steps[1]


def numbers(items: list[Item]) -> list[int]:
    """Rows by their numbers."""
    return [item.number for item in items]
