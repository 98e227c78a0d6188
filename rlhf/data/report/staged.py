"""The report of stage=data: its settings out of the configuration."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from conf.schema import Config
from rlhf.data.converting import PROBE, choose_format
from rlhf.data.formats import Use
from rlhf.data.mixture import eval_sources, train_sources
from rlhf.data.prepare.items import Item
from rlhf.data.prepare.store import StepReport
from rlhf.data.report.making import make
from rlhf.data.report.records import Report


def formats_read(cfg: Config, kind: Use) -> dict[str, str]:
    """By origin, the format that each file (or other part of a source) is read as. Raises UserError
    as `choose_format`.
    """
    out = {}
    for source in (*train_sources(cfg), *eval_sources(cfg)):
        for part in source.parts:
            rows = list(islice(source.rows(part), PROBE + cfg.data.max_bad_rows))
            if rows:
                out[part.origin] = choose_format(part.origin, rows, kind, source.format).name
    return out


def of_stage(
    cfg: Config, kind: Use, items: Sequence[Item], steps: Sequence[StepReport], folder: Path
) -> Report:
    """Examine what came out of the steps, and write the report into `folder`. Lengths are tokens
    where model.path is set.
    """
    tokenizer = None
    if cfg.model.path is not None:
        from rlhf.models.loading import load_tokenizer

        tokenizer = load_tokenizer(cfg.model, cfg.data.chat_template)
    return make(
        [item for item in items if item.split == "train"],
        [item for item in items if item.split == "eval"],
        kind,
        folder,
        formats=formats_read(cfg, kind),
        steps=steps,
        tokenizer=tokenizer,
        limit=cfg.data.report_limit,
        task=cfg.data.task,
        named=cfg.data.report_rows,
        seed=cfg.run.seed,
    )
