"""What the stages on TRL's trainers check before any weight loads."""

from conf.schema import Config
from conf.stages import OfflineStage
from rlhf.checks import capacity, inputs, launch


def check(cfg: Config) -> list[str]:
    """The checks that all of these stages share; returns notes worth a warning. Raises UserError."""
    stage = cfg.stage
    assert isinstance(stage, OfflineStage)
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
