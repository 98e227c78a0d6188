"""The report of stage=data: its settings out of the configuration."""

from collections.abc import Sequence
from pathlib import Path

from conf.schema import DataConfig, ModelConfig
from rlhf.data.formats import Use
from rlhf.data.prepare.held import picked
from rlhf.data.prepare.ingest import formats_read
from rlhf.data.prepare.items import Item
from rlhf.data.prepare.store import StepReport
from rlhf.data.report.making import make
from rlhf.data.report.records import Report


def of_stage(
    data: DataConfig,
    model: ModelConfig,
    kind: Use,
    items: Sequence[Item],
    steps: Sequence[StepReport],
    folder: Path,
    seed: int,
) -> Report:
    """Examine the rows that came out of the steps, and write the report into `folder`. Lengths are
    in tokens where model.path is set.
    """
    tokenizer = None
    if model.path is not None:
        from rlhf.models.loading import load_tokenizer

        tokenizer = load_tokenizer(model, data.chat_template)
    splits = [item.split for item in items]
    of_split = {
        split: picked(items, [i for i, own in enumerate(splits) if own == split])
        for split in ("train", "eval")
    }
    return make(
        of_split["train"],
        of_split["eval"],
        kind,
        folder,
        formats=formats_read(data, kind),
        steps=steps,
        tokenizer=tokenizer,
        limit=data.report_limit,
        task=data.task,
        named=data.report_rows,
        seed=seed,
    )
