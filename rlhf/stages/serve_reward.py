"""``stage=serve_reward``: the reward model of reward.path over HTTP, until SIGTERM or Ctrl-C. The
protocol is in reward/scorers/remote.py.
"""

import logging
import secrets
import time

from conf.schema import Config
from conf.stages import ServeRewardStage
from reward.model import load_reward_tokenizer
from reward.service.batcher import Counts
from reward.service.served import ServedModel
from rlhf.process import distributed
from rlhf.process.http import bearer_token
from rlhf.process.libraries import require
from rlhf.process.listening import address, ignoring_signals, listen
from rlhf.run import console
from rlhf.run.context import RunContext
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.stages.serve_reward")
TOKEN_ENV = "RLHF_REWARD_TOKEN"  # what a generated token is called in the commands that are shown
_MIB = 1 << 20


def check(cfg: Config) -> list[str]:
    """There is a reward model and, where one is asked for, a token. Raises UserError."""
    stage = cfg.stage_as(ServeRewardStage)
    for library in ("fastapi", "uvicorn"):
        require(library, "serve")
    distributed.require_one_process("stage=serve_reward", "Run it without torchrun.")
    if cfg.reward.path is None:
        raise UserError(
            "stage=serve_reward needs reward.path, which is not set. Set reward.path=<a reward "
            "run>/model."
        )
    load_reward_tokenizer(cfg.reward.path)
    if stage.token_env is not None:
        bearer_token(stage.token_env, "stage.token_env")
    return []


def announce(reward_path: str, token_env: str | None, url: str, token: str, directory: str) -> None:
    """Print where the service is and how a policy run uses it.

    A generated token appears here and nowhere else.
    """
    variable = token_env or TOKEN_ENV
    figures = {
        "reward model": reward_path,
        "url": url,
        "token": f"in the environment variable {variable}",
    }
    if token_env is None:
        figures["token"] = f"export {variable}={token}"
    terms = {"kind": "remote", "url": url, "token_env": variable}
    command = " ".join(
        [
            "python -m rlhf stage=grpo ...",
            *(f"+reward.terms.remote.{key}={value}" for key, value in terms.items()),
        ]
    )
    console.closing_panel(
        "serve_reward: ready, Ctrl-C stops it", figures, {"run": directory}, command
    )


def run(ctx: RunContext) -> None:
    """Load, serve, and leave a summary of what was served. Raises UserError for a port or a token
    that can't be used.
    """
    import uvicorn

    from reward.service.app import create_app

    cfg, stage = ctx.cfg, ctx.cfg.stage
    assert isinstance(stage, ServeRewardStage) and cfg.reward.path is not None
    with ctx.closing():
        token = (
            bearer_token(stage.token_env, "stage.token_env")
            if stage.token_env is not None
            else secrets.token_urlsafe(32)
        )
        ctx.add_parent("reward", cfg.reward.path)
        ctx.watchdog.phase("build")
        with listen(stage.host, stage.port) as listener:
            model = ServedModel(
                cfg.reward.path, distributed.device(), batch_tokens=cfg.reward.batch_tokens
            )
            counts = Counts()
            logged = time.monotonic()

            def log_line() -> None:
                nonlocal logged
                if time.monotonic() - logged >= stage.log_every_s:
                    ctx.tracker.log(counts.batches, counts.metrics())
                    logged = time.monotonic()

            limits = {
                "max_batch": stage.max_batch,
                "max_body": int(stage.max_body_mib * _MIB),
                "max_waiting": stage.max_waiting,
            }
            app = create_app(model, token=token, counts=counts, after=log_line, **limits)
            # log_config=None: the run's own logging; no access log, which would be a line per batch
            # of a policy run
            config = uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=stage.grace_s,
            )
            listener.listen()
            path = str(cfg.reward.path)
            announce(path, stage.token_env, address(listener), token, str(ctx.dir))
            ctx.watchdog.rest()  # requests may come at any time, or never
            with ignoring_signals():
                uvicorn.Server(config).run(sockets=[listener])
        ctx.watchdog.phase("finish")
        ctx.tracker.log(counts.batches, counts.metrics())
        ctx.finish(steps=counts.batches, metrics=counts.metrics(), model=None)
