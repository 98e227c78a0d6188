"""``stage=board``: the web page, until SIGTERM or Ctrl-C. Runs that it started go on."""

import os
from pathlib import Path

from conf.schema import Config
from conf.stages import BoardStage
from rlhf.board import OWN
from rlhf.process import distributed
from rlhf.process.http import bearer_token, is_loopback
from rlhf.process.libraries import require
from rlhf.process.listening import ignoring_signals, listen
from rlhf.stages.taken import HasConfig
from rlhf.types import UserError

_SCHEME = "http"


def check(cfg: Config) -> list[str]:
    """The libraries are there, and nobody else's machine gets in without a word. Raises
    UserError.
    """
    stage = cfg.stage_as(BoardStage)
    for library in ("starlette", "uvicorn", "multipart"):
        require(library, "serve")
    distributed.require_one_process("stage=board", "Run it without torchrun.")
    if stage.token_env is not None:
        bearer_token(stage.token_env, "stage.token_env")
    elif not is_loopback(stage.host):
        raise UserError(
            f"stage.host={stage.host} needs stage.token_env, the name of an environment variable "
            "with the word that opens the page: other machines reach it there."
        )
    runs = Path(cfg.run.dir).expanduser()
    if runs.exists() and not os.access(runs, os.W_OK):
        raise UserError(f"run.dir={runs} can't be written. Choose another, or allow it.")
    return []


def run(ctx: HasConfig) -> None:
    """Serve until a signal comes. Raises UserError for a port that can't be used."""
    import uvicorn

    from rlhf.board.app import Place, create_app
    from rlhf.board.guard import Doors
    from rlhf.board.pages import PAGES

    cfg, stage = ctx.cfg, ctx.cfg.stage_as(BoardStage)
    runs = Path(cfg.run.dir).expanduser().resolve()
    uploads = Path(stage.uploads).expanduser() if stage.uploads else runs / OWN / "uploads"
    place = Place(
        runs,
        uploads.resolve(),
        stage.upload_mib << 20,
        stage.trust_remote_code,
        stage.at_once,
        tuple(Path(folder).expanduser().resolve() for folder in stage.folders),
    )
    fixed = None
    if stage.token_env is not None:
        fixed = bearer_token(stage.token_env, "stage.token_env")
    with listen(stage.host, stage.port) as listener:
        listener.listen()  # who opens the link at once waits for the server, and is not refused
        port = listener.getsockname()[1]
        own = f"{_SCHEME}://{_in_url(stage.host)}:{port}"

        def announce(word: str) -> None:
            print(f"board: {own}/?token={word}", flush=True)

        doors = Doors(fixed, announce)
        hosts = [f"{name}:{port}" for name in _names(stage.host)]
        hosts += stage.hosts
        app = create_app(place, doors, hosts, PAGES)
        place.jobs.go_on()
        if fixed is None:
            announce(doors.word)
        else:
            print(f"board: {own}/?token=<the word in {stage.token_env}>", flush=True)
        config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
        with ignoring_signals():
            uvicorn.Server(config).run(sockets=[listener])
    print("board: stopped; runs that it started go on", flush=True)


def _names(host: str) -> list[str]:
    """What browsers may write for the host."""
    if is_loopback(host):
        return ["127.0.0.1", "localhost", "[::1]"]
    return [_in_url(host)]


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
