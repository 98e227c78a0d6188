"""Where stage=data's rows come from: the files that the configuration names, as the first step of
the pipeline.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from conf.choices import DataKind
from conf.schema import Config
from rlhf.data import sources
from rlhf.data.converting import PROBE, Conversion
from rlhf.data.files import SourceRow
from rlhf.data.formats import Use
from rlhf.data.mixture import eval_sources, given, train_sources
from rlhf.data.prepare import store
from rlhf.data.prepare.items import Context, Item
from rlhf.data.prepare.pipeline import READ, REJECTED_FILE, Source
from rlhf.data.prepare.plan import Planned, digest, plan
from rlhf.data.writing import check_target
from rlhf.types import UserError

_SHOWN = 3  # rows quoted in an error
# What decides which rows are read, and as what.
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
)


def kind_of(cfg: Config) -> Use:
    """data.kind, or what the files' formats are by themselves. Raises UserError where nothing is
    set, or files differ.
    """
    if given(cfg.data) is None:
        raise UserError(
            "data.path is not set: stage=data needs a file, a glob, a data set (or data.sources, "
            "data.dataset)."
        )
    return sources.natural_use(cfg) if cfg.data.kind is DataKind.auto else Use(cfg.data.kind.value)


def steps_of(cfg: Config, kind: Use | None = None) -> list[Planned]:
    """The steps of data.pipeline. Raises UserError as rlhf.data.prepare.plan.plan."""
    return plan(
        cfg.data.pipeline, kind=kind, seed=cfg.run.seed, held_out=cfg.data.eval_path is not None
    )


def check(cfg: Config) -> None:
    """For preflight: the steps are right by themselves, the files have a format of the kind, and
    the steps can take it. Raises UserError.
    """
    steps_of(cfg)
    kind = kind_of(cfg)
    steps_of(cfg, kind)
    for wanted in (train_sources(cfg), eval_sources(cfg)):
        conversion = Conversion(
            kind,
            wanted,
            lambda row, reason: None,
            lambda row, reason: None,
            PROBE + cfg.data.max_bad_rows,
        )
        for part in (part for source in wanted for part in source.parts):
            conversion.format_of(part.origin)
    check_target(cfg.data.to, kind)
    if cfg.data.preview and cfg.model.path is None:
        raise UserError(
            f"data.preview={cfg.data.preview} shows tokens, but model.path is not set: expected "
            "a directory with a tokenizer."
        )


def identity(cfg: Config, kind: Use, hashes: Mapping[str, str]) -> str | None:
    """A name for the rows as they come in, by the options that decide them and the files' hashes;
    None where some lie on a hub.
    """
    parts = [part for source in (*train_sources(cfg), *eval_sources(cfg)) for part in source.parts]
    if any(not part.files for part in parts):
        return None
    given_options = {
        name: value for name, value in dataclasses.asdict(cfg.data).items() if name in _OPTIONS
    }
    plain = json.dumps(given_options, default=lambda choice: choice.value)  # enumerations by name
    return digest(plain, kind.value, cfg.run.seed, dict(hashes))


def source(cfg: Config, kind: Use, folder: Path) -> Source:
    """Reads training rows, then held-out ones. Stops with UserError once the files have ended, when
    more than data.max_bad_rows don't fit.

    Rows that don't fit, and judgements that give no pair, go into the step's rejected rows; and
    into rejected.jsonl at once, which so outlives a run that ends here.
    """

    def read(context: Context) -> Iterator[Item]:
        early = folder / REJECTED_FILE
        early.unlink(missing_ok=True)
        bad: list[str] = []

        def leave_out(row: SourceRow, reason: str) -> None:
            content = row.columns if row.problem is None else {"unread": row.raw}
            item = Item(
                {str(k): store.plain(v) for k, v in content.items()}, row.origin, row.number
            )
            context.rejected(item, reason)
            with early.open("a", encoding="utf-8") as out:
                out.write(
                    store.line(
                        store.rejected_row(READ, reason, item.origin, item.number, item.columns)
                    )
                )

        def rejected(row: SourceRow, reason: str) -> None:
            bad.append(f"{row.place}: {reason}")
            leave_out(row, reason)

        def aside(row: SourceRow, reason: str) -> None:
            leave_out(row, f"set aside: {reason}")

        count = 0
        for side in ("train", "eval") if cfg.data.eval_path is not None else ("train",):
            for item in sources.items(cfg, kind, rejected, aside, side):
                count += 1
                # else the files are read to their end for the sake of the list
                if len(bad) <= cfg.data.max_bad_rows:
                    item.columns = {str(k): store.plain(v) for k, v in item.columns.items()}
                    yield item
        if len(bad) > cfg.data.max_bad_rows:
            shown = "; ".join(bad[:_SHOWN]) + (
                f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
            )
            raise UserError(
                f"{len(bad)} of {count + len(bad)} rows don't fit: {shown}. "
                f"data.max_bad_rows={cfg.data.max_bad_rows} allows no more. "
                f"Rejected rows: {early}."
            )
        if not count:
            raise UserError(f"{given(cfg.data)} holds no row that fits: expected at least one.")

    return read
