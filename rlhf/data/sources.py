"""The rows that a configuration names, one by one: as they stand in their files (`stream`), or in
canonical columns (`items`).
"""

from collections.abc import Iterator
from itertools import islice

from conf.choices import DataFormat
from conf.schema import Config
from rlhf.data.converting import PROBE, Conversion, LeftOut, choose_format
from rlhf.data.files import SourceRow
from rlhf.data.formats import Use, by_name, detect
from rlhf.data.formats.base import both_sides, columns_of
from rlhf.data.mixture import eval_sources, mixed, train_sources
from rlhf.data.prepare.items import Item
from rlhf.types import PreferencePair, UserError


def stream(cfg: Config, split: str = "train") -> Iterator[SourceRow]:
    """Every training (or eval) row as it stands in its file, renamed by data.columns, with its
    origin; one at a time.

    Rows that can't be read come with their `problem`. Ends after data.max_rows. Raises UserError
    where nothing is set.
    """
    sources = train_sources(cfg) if split == "train" else eval_sources(cfg)
    if not sources:
        raise UserError(
            f"{'data.path' if split == 'train' else 'data.eval_path'} is not set: expected a "
            "file, a glob, a data set or a mixture."
        )
    return islice(mixed(sources, cfg.run.seed), cfg.data.max_rows)


def items(
    cfg: Config, kind: Use, rejected: LeftOut, aside: LeftOut, split: str = "train"
) -> Iterator[Item]:
    """Training (or eval) rows one by one in canonical columns, whatever files they come from; a row
    of several pairs gives several items.

    Rows that don't fit go to `rejected`, judgements that give no pair (ties, skips) to `aside`,
    each with its reason. A row's own columns follow the canonical ones, except those that had a
    canonical name. Raises UserError where a file as a whole can't be read as `kind`.
    """
    conversion = Conversion(
        kind,
        train_sources(cfg) if split == "train" else eval_sources(cfg),
        rejected,
        aside,
        PROBE + cfg.data.max_bad_rows,
    )
    for row in stream(cfg, split):
        for record in conversion.records(row):
            values = [record.value]
            if kind is Use.unpaired and isinstance(record.value, PreferencePair):
                values = list(both_sides(record.value))
            for value in values:
                columns = columns_of(
                    value, record.fields, conversion.format_of(record.origin).answers
                )
                yield Item(columns, record.origin, record.number, split)


def natural_use(cfg: Config) -> Use:
    """What the training rows are by themselves: pairs, judged answers, texts to train on, else
    prompts. Raises UserError as `choose_format`.
    """
    found: list[Use] = []
    for source in train_sources(cfg):
        for part in source.parts:
            row = next(
                (row for row in islice(source.rows(part), PROBE) if row.problem is None), None
            )
            if row is None:
                continue
            chosen = (
                by_name(source.format.value)
                if source.format is not DataFormat.auto
                else detect(row.columns)
            )
            if chosen is None:
                # raises, naming the nearest
                choose_format(part.origin, [row], Use.sft, source.format)
            else:
                found.append(
                    next(
                        use
                        for use in (Use.preference, Use.unpaired, Use.sft, Use.prompt)
                        if chosen.reads(use)
                    )
                )
    different = sorted({use.value for use in found})
    if len(different) != 1:
        raise UserError(
            f"data: expected rows of one kind, found {', '.join(different) or 'none'}. Say which "
            "is meant, or give one file."
        )
    return found[0]
