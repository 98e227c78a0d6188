"""The whole examination, in the report's order."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conf.choices import TaskClass
from rlhf.data.formats import Use
from rlhf.data.prepare.held import together
from rlhf.data.prepare.items import Item
from rlhf.data.prepare.store import StepReport
from rlhf.data.report import writing
from rlhf.data.report.annotators import GoldVerdicts, annotators, gold, named_rows
from rlhf.data.report.content import (
    classes,
    clustered,
    detected_languages,
    diversity,
    labels,
    languages,
    sampled,
)
from rlhf.data.report.duplicates import SignedRows, Whole, asked, duplicates, leakage, prompt, whole
from rlhf.data.report.lengths import lengths, words_and_characters
from rlhf.data.report.looked import Look, Looked, over
from rlhf.data.report.noise import noise, noise_of_part
from rlhf.data.report.numbered import number, number_part
from rlhf.data.report.origins import origins, places, preparation, show_pictures
from rlhf.data.report.pairs import judged, pairs
from rlhf.data.report.records import Report, Section, Settings
from rlhf.data.report.standards import standards
from rlhf.data.report.suspects import suspects
from rlhf.data.report.templates import Checked, templates
from rlhf.process import parallel
from rlhf.types import UserError

_SAMPLED = ("suspects", "languages", "clusters", "diversity")  # sections that look at a sample
_OF_SAMPLE: tuple[Look, ...] = (detected_languages, number_part)  # what those ask of single rows
_BESIDE = 1000  # rows from which a process of its own is worth its start


def examine(
    train: Sequence[Item],
    held: Sequence[Item],
    settings: Settings,
    formats: Mapping[str, str],
    steps: Sequence[StepReport],
) -> list[Section]:
    """Every detector's section. Duplicates and leakage are about the splits; everything else looks
    at all rows, or at a sample of them where its title says so.
    """
    both = bool(train) and bool(held)
    items, some = _looked(together(train, held), settings, prompts=both)
    worded = number(some)
    apart = [_begun(check, some, worded, settings) for check in (clustered, diversity)]
    of_kind = {Use.preference: [pairs], Use.unpaired: [judged]}.get(settings.kind, [])
    rows = whole(items, settings)
    checks = (labels, suspects, noise, templates)
    sections = [
        origins(items, settings, formats),
        preparation(steps),
        measured(lengths, items, settings),
        *_of_pictures(items, settings),
        measured(duplicates, rows, settings, "train"),
        *([measured(duplicates, rows, settings, "eval")] if held else []),
        measured(leakage, rows, asked(items, settings) if both else rows, settings),
        *(measured(check, items, settings) for check in (*of_kind, *checks)),
        measured(languages, some, settings),
        *(section() for section in apart),
        *(measured(check, items, settings) for check in (annotators, gold)),
    ]
    if len(some) == len(items):
        return sections
    drawn = f" ({len(some):,} rows drawn from {len(items):,})"
    for at, section in enumerate(sections):
        if section.name in _SAMPLED:
            sections[at] = replace(section, title=section.title + drawn)
    return sections


def _of_pictures(items: Sequence[Item], settings: Settings) -> list[Section]:
    """The section of pictures, where some row shows one."""
    if not any(over(show_pictures, items)):
        return []
    from rlhf.data.report.pictures import pictures

    return [measured(pictures, items, settings)]


def _looked(items: Sequence[Item], settings: Settings, *, prompts: bool) -> tuple[Looked, Looked]:
    """All rows and `sampled` ones, with what the detectors ask of single rows. prompts: whether
    prompts are compared.
    """
    looks: list[Look] = [show_pictures, places, classes, named_rows, noise_of_part]
    looks += [Checked.of(settings), GoldVerdicts(settings.kind)]
    if settings.tokenizer is None:
        looks.append(words_and_characters)
    looks.append(SignedRows(Whole(settings.kind), settings.seed))
    if prompts:
        looks.append(SignedRows(prompt, settings.seed))
    drawn = sampled(items, settings)
    if len(drawn) < len(items):
        return Looked(items, looks), Looked(drawn, _OF_SAMPLE)
    every = Looked(items, [*looks, *_OF_SAMPLE])
    return every, every


def _begun(
    check: Callable[..., Section], some: Sequence[Item], *arguments: Any
) -> Callable[[], Section]:
    """What gives a detector's section; a process of its own works on it where rows are many."""

    def section() -> Section:
        return measured(check, some, *arguments)

    if len(some) < _BESIDE:
        return section
    return parallel.beside(section)


def measured(check: Callable[..., Section], *arguments: Any) -> Section:
    """A detector's section; one that says why, where the rows or this machine don't allow it. The
    report was asked for, no single detector was: none of them ends the run.
    """
    try:
        return check(*arguments)
    except UserError as error:
        title = check.__name__.replace("_", " ").capitalize()
        return Section(check.__name__, title, {}, unmeasured=str(error))


def make(
    train: Sequence[Item],
    held: Sequence[Item],
    kind: Use,
    folder: Path | None,
    *,
    formats: Mapping[str, str] | None = None,
    steps: Sequence[StepReport] = (),
    tokenizer: Any = None,
    limit: int = 1024,
    task: TaskClass | None = None,
    named: int = 100,
    seed: int = 0,
) -> Report:
    """Examine training rows and held-out ones (which may be none), and write report.json and
    report.html into `folder` (None: write nothing).

    formats: by an item's origin, the format that its file was read as. steps: what the pipeline did
    before. tokenizer: of the model that will train; without one lengths are characters and words.
    limit: tokens of a row that training keeps. task: what the rows are to teach. named: rows that a
    finding names. Raises ValueError for an item in the list of another split than its own.
    """
    for split, items in (("train", train), ("eval", held)):
        strange = next((item for item in items if item.split != split), None)
        if strange is not None:
            raise ValueError(
                f"{strange.place}: expected a row of split {split} in this list, found split "
                f"{strange.split}"
            )
    settings = Settings(
        kind=kind,
        limit=limit,
        task=task,
        named=named,
        seed=seed,
        tokenizer=tokenizer,
        folder=folder,
    )
    sections = examine(train, held, settings, formats or {}, steps)
    by_name = {section.name: section for section in sections}
    report = Report(
        kind.value,
        {"train": len(train), "eval": len(held)},
        tuple(sections),
        standards(by_name, len(train), task),
    )
    if folder is None:
        return report
    return replace(report, files=writing.write(report, folder))
