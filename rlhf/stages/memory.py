"""Memory and disk of every stage that trains: the micro-batch that fits, and what doesn't.

No stage of its own: rlhf/cli/command.py asks it before weights load.
"""

import logging

from conf.online import OnlineStage
from conf.schema import Config
from conf.stages import OfflineStage
from reward.terms import scoring_models
from rlhf.checks import capacity, launch, sharing
from rlhf.checks.memory.generator import check_sleep
from rlhf.process import distributed
from rlhf.types import UserError

LOG = logging.getLogger("rlhf")


def choose_micro_batch(cfg: Config) -> None:
    """Set engine.micro_batch_tokens or micro_batch_size, where both are left out, to what the
    memory plan says fits.

    Rank 0 decides for all: the split changes no update, but the ranks must agree on it. Raises
    UserError on all of them.
    """
    if not isinstance(cfg.stage, OfflineStage):
        return
    chosen, problem = None, None
    if distributed.is_main():
        try:
            chosen = capacity.fitting_micro_batch(cfg)
        except UserError as error:
            problem = str(error)
    chosen, problem = distributed.broadcast((chosen, problem))
    if problem is not None:
        raise UserError(problem)
    if chosen is None:
        return
    option, size = chosen
    setattr(cfg.engine, option, size)
    if distributed.is_main():
        LOG.info("engine.%s=%d: the largest that the memory plan says fits", option, size)


def check(cfg: Config) -> list[str]:
    """Notes of what may not fit. Raises UserError for a disk, or a generator's cache, that is too
    small, for an engine that can't sleep, and for ranks that can't share rows.
    """
    import torch

    stage, scoring = cfg.stage, []
    longest = cfg.data.max_prompt_length
    longest += cfg.environment.longest(cfg.rollout.max_response_length)
    if isinstance(stage, OfflineStage):
        longest = stage.max_length
    ranks = launch.count_ranks(cfg.engine, dry_run=cfg.run.dry_run)
    sharing.check(stage, cfg.model, cfg.adapter, cfg.engine, longest, ranks)
    if isinstance(stage, OnlineStage):
        if not cfg.run.dry_run:
            check_sleep(cfg.rollout, ahead=stage.ahead, cuda=torch.cuda.is_available())
        capacity.check_cache(cfg.rollout, cfg.model, cfg.data.max_prompt_length, cfg.environment)
        scoring = scoring_models(cfg.reward, stage.watch)
    notes = capacity.start_note(stage, cfg.model, cfg.adapter)
    notes += capacity.memory_notes(cfg, scoring)
    capacity.check_disk(cfg, scoring)
    return notes
