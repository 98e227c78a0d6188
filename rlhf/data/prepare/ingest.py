"""The first step of stage=data's pipeline: the rows of the files that the configuration names, in
canonical columns.
"""

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from conf.choices import DataKind
from conf.schema import Config, DataConfig
from rlhf.data.converting import PROBE, Conversion, LeftOut, choose_format
from rlhf.data.files import SourceRow
from rlhf.data.formats import Use
from rlhf.data.formats.base import both_sides
from rlhf.data.formats.names import is_question
from rlhf.data.formats.unread import stands_in, texts_in
from rlhf.data.formats.values import as_whole, columns_of, has_pictures, layout_of, not_carried
from rlhf.data.mixture import Part, Source, mixed
from rlhf.data.prepare import store
from rlhf.data.prepare.images import IMAGES, kept_in
from rlhf.data.prepare.items import Context, Item
from rlhf.data.prepare.pipeline import READ, REJECTED_FILE, ReadItems
from rlhf.data.prepare.plan import Planned, digest, plan
from rlhf.data.reading import first_rows, refuse_two_shapes
from rlhf.data.sources import all_sources, eval_sources, given, sources_of, train_sources
from rlhf.data.telling import tell, tell_kept
from rlhf.data.writing import check_target
from rlhf.types import PreferencePair, UserError

LOG = logging.getLogger("rlhf.data")
_SHOWN = 3  # rows quoted in an error
# options of data that decide which rows are read, and as what
_OPTIONS = (
    "path",
    "sources",
    "registry",
    "dataset",
    "eval_path",
    "format",
    "columns",
    "subset",
    "split",
    "join",
    "max_rows",
    "image_dir",
    "max_image_pixels",
)


def source_rows(data: DataConfig, seed: int, split: str = "train") -> Iterator[SourceRow]:
    """Every row of a split (train, eval) as it is in its file, renamed by data.columns, with its
    origin; one at a time.

    Rows that can't be read come with their `problem`. Ends after data.max_rows. Raises UserError
    where the split has no source.
    """
    sources = sources_of(data, split)
    if not sources:
        option = "data.path" if split == "train" else "data.eval_path"
        raise UserError(f"{option} is not set: expected a file, a glob, a data set or a mixture.")
    return islice(mixed(sources, seed), data.max_rows)


def items(
    data: DataConfig,
    seed: int,
    kind: Use,
    rejected: LeftOut,
    set_aside: LeftOut,
    split: str = "train",
    folder: Path | None = None,
) -> Iterator[Item]:
    """The rows of a split (train, eval) one by one in canonical columns, whatever files they come
    from; a row of several pairs gives several items. folder: in which the files of the rows'
    pictures are kept, by names below it; None: they stay where they are.

    Rows that don't fit go to `rejected`, judgements that give no pair (ties, skips) to `set_aside`,
    each with its reason. A row's own columns follow the canonical ones, except those that had a
    canonical name. Raises UserError where a file as a whole can't be read as `kind`.
    """
    sources = sources_of(data, split)
    probe = PROBE + data.max_bad_rows
    conversion = Conversion(
        kind, sources, rejected, set_aside, probe, data.system, data.max_image_pixels
    )
    if folder is not None:
        conversion.store = folder / IMAGES
    whole = len(_layouts(sources, kind, data, seed)) > 1
    counts: Counter[str] = Counter()
    for row in source_rows(data, seed, split):
        for record in conversion.records(row):
            value = record.value
            if folder is not None and has_pictures(value):
                value = kept_in(value, folder)
            values = [value]
            if kind is Use.unpaired and isinstance(value, PreferencePair):
                values = list(both_sides(value))
            answers = conversion.format_of(record.origin).answers
            counts[record.origin] += 1
            if whole:
                values = [as_whole(value) for value in values]
            for value in values:
                columns = columns_of(value, record.fields, answers)
                own = _without_copies(record.fields, value)
                conversion.notes.add(not_carried(columns, own), record.place)
                yield Item(columns, record.origin, record.number, split)
    for origin, form in conversion.formats.items():
        LOG.info("%s: %d rows, read as %s (%s)", origin, counts[origin], form.name, form.columns)
    name = ", ".join(source.name for source in sources)
    if whole:
        LOG.info("%s: prompts with completions are written as the conversations they are", name)
    for note in conversion.format_notes:
        LOG.warning("%s", note)
    tell(conversion.notes, name)
    tell_kept(conversion.keys, name)


def _without_copies(fields: Mapping[str, Any], value: Any) -> dict[str, Any]:
    """A row's `fields` without a question that stands in what was read of it: nothing of it is
    lost.
    """
    return {
        key: field
        for key, field in fields.items()
        if not (is_question(key) and texts_in(field) and stands_in(key, field, value))
    }


def _layouts(sources: Sequence[Source], kind: Use, data: DataConfig, seed: int) -> dict[str, str]:
    """The layouts of texts to train on that several files have, with a file of each: one file is
    written for all. Raises UserError where no file can hold them all.
    """
    if kind is not Use.sft or sum(len(source.parts) for source in sources) < 2:
        return {}
    parts = first_rows(sources, kind, data, seed)
    refuse_two_shapes(parts)
    layouts = {layout_of(record.value): part.name for part in parts for record in part.records}
    texts = [layout for layout in layouts if layout != "whole conversations"]
    if len(texts) > 1:
        held = ", ".join(f"{name} holds {layout}" for layout, name in layouts.items())
        raise UserError(
            f"{held}: expected one of them, since what trains of the one and of the other differs "
            "and one file has one format. Prepare each by itself; a stage that trains reads both."
        )
    return layouts


def natural_use(data: DataConfig) -> Use:
    """What the training rows are by themselves: pairs, judged answers, texts to train on, else
    prompts. Raises UserError as `choose_format`, and for files of different kinds.
    """
    uses = {
        part.origin: _natural_use_of_part(source, part)
        for source in train_sources(data)
        for part in source.parts
    }
    different = sorted({use.value for use in uses.values()})
    if len(different) != 1:
        held = "; ".join(f"{origin}: {use.value}" for origin, use in list(uses.items())[:_SHOWN])
        raise UserError(
            f"data: expected rows of one kind, found {', '.join(different)} ({held}). Say with "
            "data.kind which is meant, or give files of one kind."
        )
    return next(iter(uses.values()))


def _natural_use_of_part(source: Source, part: Part) -> Use:
    """What a file's first readable row is. Raises UserError where none of the first rows can be
    read, with the first one's trouble.
    """
    rows = list(islice(source.rows(part), PROBE))
    if not rows:
        raise UserError(f"{source.key}={part.origin} holds no rows: expected at least one.")
    row = next((row for row in rows if row.problem is None), None)
    if row is None:
        raise UserError(f"{rows[0].place}: {rows[0].problem}.")
    chosen = choose_format(part.origin, [row], None, source.format, trusted=source.named_columns)
    return chosen.natural_use


def formats_read(data: DataConfig, kind: Use) -> dict[str, str]:
    """The format that each file (or other part of a source) is read as, by its origin. Raises
    UserError as `choose_format`.
    """
    sources = all_sources(data)
    conversion = Conversion(kind, sources, _ignore, _ignore, PROBE + data.max_bad_rows)
    origins = [part.origin for source in sources for part in source.parts]
    return {origin: conversion.format_of(origin).name for origin in origins}


def kind_of(data: DataConfig) -> Use:
    """data.kind, or what the files' formats are by themselves. Raises UserError where no file is
    named, or files differ.
    """
    if given(data) is None:
        raise UserError(
            "data.path is not set: stage=data needs a file, a glob, a data set (or data.sources, "
            "data.dataset)."
        )
    if data.kind is DataKind.auto:
        return natural_use(data)
    return Use(data.kind.value)


def steps_of(data: DataConfig, seed: int, kind: Use | None = None) -> list[Planned]:
    """The steps of data.pipeline. Raises UserError as rlhf.data.prepare.plan.plan."""
    return plan(data.pipeline, kind=kind, seed=seed, held_out=data.eval_path is not None)


def check(cfg: Config) -> None:
    """For preflight: the steps are right by themselves, the files have a format of the kind, and
    the steps can take it. Raises UserError.
    """
    data, seed = cfg.data, cfg.run.seed
    steps_of(data, seed)
    kind = kind_of(data)
    steps_of(data, seed, kind)
    for sources in (train_sources(data), eval_sources(data)):
        conversion = Conversion(kind, sources, _ignore, _ignore, PROBE + data.max_bad_rows)
        for source in sources:
            for part in source.parts:
                conversion.format_of(part.origin)
        _layouts(sources, kind, data, seed)
        if len(conversion.formats) > 1:
            refuse_two_shapes(first_rows(sources, kind, data, seed))
    check_target(data.to, kind)
    if data.preview and cfg.model.path is None:
        raise UserError(
            f"data.preview={data.preview} shows tokens, but model.path is not set: expected "
            "a directory with a tokenizer."
        )


def _ignore(row: SourceRow, reason: str) -> None:
    """Nothing is kept of a row that a check reads."""


def identity(data: DataConfig, seed: int, kind: Use, hashes: Mapping[str, str]) -> str | None:
    """A name for the rows as they come in, by the options that decide them and the hashes of the
    files by path; None where some rows are on a hub.
    """
    parts = [part for source in all_sources(data) for part in source.parts]
    if any(not part.files for part in parts):
        return None
    options = {name: value for name, value in dataclasses.asdict(data).items() if name in _OPTIONS}
    plain = json.dumps(options, default=lambda choice: choice.value)  # enumerations by name
    return digest(plain, kind.value, seed, dict(hashes))


def reader(data: DataConfig, seed: int, kind: Use, folder: Path) -> ReadItems:
    """A function that reads the training rows, then the held-out ones. When more than
    data.max_bad_rows don't fit it raises UserError once the files have ended.

    Rows that don't fit, and judgements that give no pair, go into the step's rejected rows. They
    also go into rejected.jsonl in `folder` at once, which so outlives a run that ends here.
    """

    def read(context: Context) -> Iterator[Item]:
        left_out = _LeftOut(context, folder / REJECTED_FILE)
        left_out.path.unlink(missing_ok=True)
        bad, count = left_out.bad, 0
        splits = ("train",) if data.eval_path is None else ("train", "eval")
        for split in splits:
            for item in items(
                data, seed, kind, left_out.rejected, left_out.set_aside, split, folder
            ):
                count += 1
                # beyond the limit the files are read to their end for the list of bad rows only
                if len(bad) <= data.max_bad_rows:
                    item.columns = _plain(item.columns)
                    yield item
        if len(bad) > data.max_bad_rows:
            shown = "; ".join(bad[:_SHOWN])
            if len(bad) > _SHOWN:
                shown += f"; and {len(bad) - _SHOWN} more"
            raise UserError(
                f"{len(bad)} of {count + len(bad)} rows don't fit: {shown}. "
                f"data.max_bad_rows={data.max_bad_rows} allows no more. "
                f"Rejected rows: {left_out.path}."
            )
        if not count:
            raise UserError(f"{given(data)} holds no row that fits: expected at least one.")

    return read


@dataclass(slots=True)
class _LeftOut:
    """The rows that the reading leaves out: into the step's rejected rows, and into a file."""

    context: Context
    path: Path
    bad: list[str] = field(default_factory=list)  # place and reason of the rows that don't fit

    def rejected(self, row: SourceRow, reason: str) -> None:
        """A row that doesn't fit."""
        self.bad.append(f"{row.place}: {reason}")
        self._leave_out(row, reason)

    def set_aside(self, row: SourceRow, reason: str) -> None:
        """A judgement that gives no pair."""
        self._leave_out(row, f"set aside: {reason}")

    def _leave_out(self, row: SourceRow, reason: str) -> None:
        content = row.columns if row.problem is None else {"unread": row.raw}
        item = Item(_plain(content), row.origin, row.number)
        self.context.rejected(item, reason)
        entry = store.rejected_row(READ, reason, item.origin, item.number, item.columns)
        with self.path.open("a", encoding="utf-8") as out:
            out.write(store.line(entry))


def _plain(columns: Mapping[Any, Any]) -> dict[str, Any]:
    """Columns as JSON can hold them."""
    return {str(key): store.plain(value) for key, value in columns.items()}
