"""``stage=ppo``, ``grpo`` and the other online algorithms: the loop of `rlhf.online`."""

import contextlib

from policy.engines import resharding
from rlhf.online.loop import Loop
from rlhf.online.setup import build
from rlhf.run.context import RunContext

adapt_checkpoint = resharding.adapt  # before a resume


def run(ctx: RunContext) -> None:
    """Train a policy online: reads the model, the reward and the prompts, writes the run
    directory.
    """
    with ctx.closing():
        ctx.watchdog.phase("build")
        parts = build(ctx)
        with contextlib.closing(parts.generator):
            Loop(ctx, parts).train()
