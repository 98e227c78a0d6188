"""The whole examination, in the report's order."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conf.choices import TaskClass
from rlhf.data.formats import Use
from rlhf.data.prepare.items import Item
from rlhf.data.report import writing
from rlhf.data.report.origins import origins
from rlhf.data.report.records import Report, Section, Settings


def examine(train: Sequence[Item], held: Sequence[Item], settings: Settings, formats: Mapping[str, str]) -> list[Section]:
    """Every detector's section."""
    items = [*train, *held]
    return [origins(items, settings, formats)]


def make(
    train: Sequence[Item],
    held: Sequence[Item],
    kind: Use,
    folder: Path | None,
    *,
    formats: Mapping[str, str] | None = None,
    tokenizer: Any = None,
    limit: int = 1024,
    task: TaskClass | None = None,
    named: int = 100,
    seed: int = 0,
) -> Report:
    """Examine training rows and held-out ones (which may be none), and write report.json and report.html into `folder` (None: write nothing).

    formats: by an item's origin, the format that its file was read as. tokenizer: of the model that will train; without one lengths are
    characters and words. limit: tokens of a row that training keeps. task: what the rows are to teach. named: rows that a finding names.
    """
    settings = Settings(kind=kind, limit=limit, task=task, named=named, seed=seed, tokenizer=tokenizer)
    sections = examine(train, held, settings, formats or {})
    report = Report(kind.value, {"train": len(train), "eval": len(held)}, tuple(sections), ())
    return report if folder is None else replace(report, files=writing.write(report, folder))
