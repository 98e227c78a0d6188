"""The checks of a stage, run on all ranks before any weight loads.

What is checked belongs to the stage: `check(cfg)` in its module of rlhf/stages/ raises `UserError`
with the option, what was expected, what is there instead and a remedy. What only the weights can
tell is checked where they are loaded.
"""

from collections.abc import Callable

from conf.schema import Config
from rlhf.process import distributed
from rlhf.run import directory
from rlhf.run.tracking import tracker
from rlhf.types import UserError


def check(stage_check: Callable[[Config], list[str]], cfg: Config) -> list[str]:
    """Run `stage_check`, then look at the tracker and the run directory. Returns notes worth a
    warning, on the main rank only.

    Raises UserError on every rank alike, with the message of the first rank that has one: a rank
    whose disk lacks a file must not leave the others waiting, and no rank may open the run
    directory before all have looked.
    """
    notes: list[str] = []
    problem: str | None = None
    try:
        notes = stage_check(cfg)
        # rank 0 alone writes
        if distributed.is_main() and not cfg.run.dry_run:
            tracker.check(cfg.tracking)
            directory.check_directory(cfg)
    except UserError as error:
        problem = str(error)
    problems = [text for text in distributed.gather(problem) if text is not None]
    if problems:
        raise UserError(problems[0])
    return notes if distributed.is_main() else []
