"""What the stages on TRL's trainers check before any weight loads."""

import logging

import datasets

from conf.choices import AdapterKind, KTOLoss, PreferenceLoss
from conf.schema import AdapterConfig, Config
from conf.stages import KTOStage, OfflineStage, PreferenceStage
from rlhf.checks import capacity, inputs, launch
from rlhf.offline.row_weights import COLUMN
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.stages")
_HEADS = ("lm_head", "embed_out")  # names of language-model heads
_SORTING = (PreferenceLoss.aot, PreferenceLoss.aot_unpaired)


def check(cfg: Config) -> list[str]:
    """What all of these stages check; returns notes worth a warning. Raises UserError."""
    stage = cfg.stage_as(OfflineStage)
    ranks = launch.count_ranks(cfg.engine, dry_run=cfg.run.dry_run)
    launch.check_engine(cfg.engine, dry_run=cfg.run.dry_run)
    launch.plan_batches(stage.batch_size, cfg.engine.micro_batch_size, ranks)
    launch.check_nonfinite(stage.on_nonfinite, cfg.engine, cfg.model.dtype)
    inputs.check_model(cfg.model)
    inputs.check_row_length(stage.max_length, cfg.model)
    tokenizer = inputs.policy_tokenizer(cfg.model, cfg.data.chat_template)
    notes = inputs.padding_note(cfg.model.path, tokenizer)
    inputs.check_rows(cfg)
    notes += capacity.memory_notes(cfg)
    capacity.check_disk(cfg)
    return notes


def check_preference_adapter(stage: OfflineStage, adapter: AdapterConfig) -> None:
    """Raises UserError for an adapter with dropout, or on a head that would not train."""
    if adapter.kind is AdapterKind.none:
        return
    if adapter.dropout > 0:
        raise UserError(
            f"adapter.dropout={adapter.dropout}: TRL turns dropout off for stage={stage.name}, "
            "so that the losses compare weights alone. "
            "Set adapter.dropout=0."
        )
    heads = [name for name in adapter.targets if name in _HEADS]
    if heads and isinstance(stage, (PreferenceStage, KTOStage)):
        raise UserError(
            f"adapter.targets={list(adapter.targets)} holds the language-model head {heads[0]!r}, "
            f"where stage={stage.name} would never train an adapter: "
            "leave it out."
        )


def check_kto_rows(stage: KTOStage, micro_batch_size: int | None, rows: int) -> None:
    """A forward pass of `rows` answers holds two at least, where the loss compares them. Raises
    UserError.
    """
    if stage.loss is not KTOLoss.kto or rows >= 2:
        return
    key = "stage.batch_size / ranks" if micro_batch_size is None else "engine.micro_batch_size"
    raise UserError(
        f"{key} = {rows}: stage.loss=kto compares each answer of a forward pass with another's "
        "prompt. Expected at least 2, or stage.loss=apo_zero_unpaired."
    )


def sorting_note(stage: PreferenceStage, rows: int) -> list[str]:
    """A note where a loss sorts the pairs of a forward pass (of `rows` pairs), not of the step."""
    names = [loss.value for loss in stage.losses if loss in _SORTING]
    if not names or rows == stage.batch_size:
        return []
    return [
        f"stage.losses: {', '.join(names)} sorts the pairs of one forward pass, which "
        f"are {rows} of stage.batch_size={stage.batch_size}."
    ]


def check_row_weights(
    column: str | None, losses: list[PreferenceLoss], rows: datasets.Dataset
) -> None:
    """Log what the rows' weights do. Raises UserError for losses that compare the sorted rows of a
    batch. column: ``data.weight_column``.
    """
    if COLUMN not in rows.column_names:
        return
    sorting = [loss.value for loss in losses if loss in _SORTING]
    if sorting:
        raise UserError(
            f"stage.losses={sorting[0]} sorts the rows of a batch, so no row has a loss that its "
            f"weight (column {column!r}) could multiply. "
            "Use another loss, or set data.weight_column=null to weigh all rows the same."
        )
    LOG.info(
        "the column %r multiplies each row's gradient; the losses that are logged weigh all rows "
        "the same",
        column,
    )
