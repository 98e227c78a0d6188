"""``stage=serve_rollout``: serves a policy by vLLM for runs with rollout=server, until it is
stopped. The server restarts at its address, as often as rollout.server.restarts allows; the run
that uses it then sends the weights again.
"""

import functools
import logging
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import torch

from conf.choices import Carrier
from conf.run import RunConfig
from conf.schema import AdapterConfig, Config, ModelConfig, RolloutConfig, carrier_of
from conf.stages import ServeRolloutStage
from policy import adapters
from rlhf.checks import inputs, launch
from rlhf.models.loading import resolve_dtype, starts_whole
from rlhf.process import distributed
from rlhf.process.http import bearer_token, is_loopback
from rlhf.process.supervision import Watchdog
from rlhf.run import console
from rlhf.run.context import RunContext
from rlhf.types import UserError
from rollout.server.checks import check_servers
from rollout.server.client import Server, ServerFault
from rollout.server.fleet import describe
from rollout.server.generator import FOLDER
from rollout.server.launch import recipe_of
from rollout.server.middleware import TOKEN_VARIABLE
from rollout.server.process import (
    Child,
    Recipe,
    core_list,
    free_port,
    is_free,
    new_token,
    told_to_stop,
    wait_until_ready,
)
from rollout.server.routes import resolve_transfer

LOG = logging.getLogger("rlhf.stages.serve_rollout")
_LOOK_S = 0.5  # between two looks at the server
_HERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # all of this machine's addresses -> one of them


def check(cfg: Config) -> list[str]:
    """The model, the adapter's carrier, the token and the port will do. Raises UserError."""
    stage = cfg.stage_as(ServeRolloutStage)
    distributed.require_one_process("stage=serve_rollout", "Run it without torchrun.")
    _check_model(cfg.model)
    launch.check_adapter(cfg.rollout, cfg.adapter)
    carrier = carrier_of(cfg.rollout, cfg.adapter)
    rollout = replace(cfg.rollout, servers=[])  # those are for the run that uses them
    check_servers(rollout, carrier, dry_run=cfg.run.dry_run)
    if cfg.rollout.server.count != 1:
        raise UserError(
            f"rollout.server.count={cfg.rollout.server.count}: stage=serve_rollout starts one "
            "server. Run it once for each, with a stage.port of its own."
        )
    token_env = cfg.rollout.server.token_env
    if token_env is not None:
        bearer_token(token_env, "rollout.server.token_env")
    elif not is_loopback(stage.host):
        raise UserError(
            f"stage.host={stage.host} needs rollout.server.token_env, the name of an environment "
            "variable with a bearer token: other machines reach it there."
        )
    prompt, option = cfg.data.max_prompt_length, cfg.environment.longest_option
    response = cfg.environment.longest(cfg.rollout.max_response_length)
    inputs.check_rope(cfg.model, prompt, response, 0, option=option)
    readers = [inputs.model_positions(cfg.model, 0)]
    inputs.check_sequence_length(prompt, response, readers, option=option)
    return []


def _check_model(model: ModelConfig) -> None:
    if model.path is None:
        raise UserError(
            "stage=serve_rollout needs model.path, which is not set: the directory that the run "
            "starts from, or its start/ where it wrote one."
        )
    inputs.check_model(model)
    if not starts_whole(model):
        raise UserError(
            f"model.path={model.path}: vLLM can't start from it as it is (an adapter or a GGUF "
            "file). Set model.path to whole weights, such as the run's start/."
        )


def run(ctx: RunContext) -> None:
    """Serve until a signal comes. Raises UserError where the server does not start, or ends more
    often than it may be restarted.
    """
    cfg, stage = ctx.cfg, ctx.cfg.stage_as(ServeRolloutStage)
    assert cfg.model.path is not None
    with ctx.closing():
        ctx.watchdog.phase("build")
        variable = cfg.rollout.server.token_env
        token = new_token()
        if variable is not None:
            token = bearer_token(variable, "rollout.server.token_env")
        response = cfg.environment.longest(cfg.rollout.max_response_length)
        length = cfg.data.max_prompt_length + response
        recipe = _recipe(cfg.model, cfg.rollout, cfg.adapter, length, token)
        ctx.add_parent("policy", cfg.model.path)
        place = _Place(
            stage.host,
            stage.port or free_port(stage.host),
            _servers_folder(ctx.dir.parent, cfg.run, stage.servers_of),
            stage.grace_s,
        )
        panel = functools.partial(_announce, place.url, recipe, variable, ctx.dir)
        with told_to_stop() as stop:
            restarts = _serve(recipe, place, ctx.watchdog, stop, panel)
        ctx.watchdog.phase("finish")
        ctx.finish(steps=0, metrics={"restarts": restarts}, model=None)


def _servers_folder(own: Path, run: RunConfig, name: str | None) -> Path:
    """Of logs and descriptions: in the folder `own` of this run, or of the run `name`."""
    return (own if name is None else Path(run.dir).expanduser() / name) / FOLDER


def _recipe(
    model: ModelConfig, rollout: RolloutConfig, adapter: AdapterConfig, length: int, token: str
) -> Recipe:
    """`length`: prompt and response together."""
    rank = None
    if carrier_of(rollout, adapter) is Carrier.lora:
        sent = adapters.sent_rank(model, adapter)
        rank = adapter.rank if sent is None else sent[0]
    assert model.path is not None
    cuda = torch.cuda.is_available()
    return recipe_of(
        rollout,
        model.path,
        token=token,
        dtype=resolve_dtype(model.dtype),
        max_tokens=length,
        transfer=resolve_transfer(rollout.server.transfer, [], cuda=cuda),
        adapter_rank=rank,
        trust_remote_code=model.trust_remote_code,
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the server listens and what it leaves."""

    host: str
    port: int
    folder: Path  # of its log and its description
    grace_s: float

    @property
    def url(self) -> str:
        return address(self.host, self.port)

    @property
    def url_here(self) -> str:
        """On this machine, whose name may mean nothing to it."""
        return address(_HERE.get(self.host, self.host), self.port)

    @property
    def log(self) -> Path:
        """Named after the machine, since several may share the folder."""
        return self.folder / f"{urlsplit(self.url).hostname}-{self.port}.log"

    def start(self, recipe: Recipe) -> Child:
        cores = recipe.server.cores
        return Child(
            recipe.command(self.host, self.port),
            recipe.environment(0),
            self.log,
            None if cores is None else core_list(cores[0]),
            self.grace_s,
        )


def _serve(
    recipe: Recipe,
    place: _Place,
    watchdog: Watchdog,
    stop: threading.Event,
    panel: Callable[[], None],
) -> int:
    """Run the server until `stop` is set; returns how often it was restarted. `panel` shows where
    it is. Raises UserError.
    """
    if not is_free(place.host, place.port):
        raise UserError(
            f"stage.host={place.host} stage.port={place.port}: can't listen there. Choose another "
            "stage.port (0: any free one) or stage.host."
        )
    for restarts in range(recipe.server.restarts + 1):
        child = place.start(recipe)
        try:
            _wait(child, recipe, place, watchdog, stop)
            if restarts == 0 and not stop.is_set():
                panel()
            watchdog.rest()  # requests may come at any time, or never
            while child.is_running() and not stop.wait(_LOOK_S):
                pass
        finally:
            child.stop()
        if stop.is_set():
            return restarts
        LOG.warning("the server ended (%s); its log: %s", child.tail(), child.log)
        watchdog.phase("restart")
    raise UserError(
        f"the server ended {recipe.server.restarts + 1} times (rollout.server.restarts); its log: "
        f"{child.log}."
    )


def _wait(
    child: Child, recipe: Recipe, place: _Place, watchdog: Watchdog, stop: threading.Event
) -> None:
    """Until the server answers or `stop` is set. Raises UserError."""

    def alive() -> None:
        watchdog.alive()
        if stop.is_set():
            raise _Stopped

    server = Server(place.url_here, recipe.token, at_once=1)
    try:
        wait_until_ready(server, child, recipe.server.start_limit_s, alive)
    except _Stopped:
        return
    except ServerFault as fault:
        raise UserError(f"stage=serve_rollout: {fault}.") from fault
    finally:
        server.close()
    describe(place.folder, place.url, child.server_pid(), recipe)


class _Stopped(Exception):
    """A signal came while the server started."""


def address(host: str, port: int) -> str:
    """``http://host:port``, with this machine's name where the server listens on all addresses."""
    name = socket.gethostname() if host in _HERE else host
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def _announce(url: str, recipe: Recipe, variable: str | None, folder: Path) -> None:
    """Print where the server is and how a run uses it. `variable` holds the token; None: it was
    made, and appears here and nowhere else.
    """
    shown = f"in the environment variable {variable}"
    if variable is None:
        variable = TOKEN_VARIABLE
        shown = f"export {variable}={recipe.token}"
    figures = {"policy": recipe.model_path, "url": url, "token": shown}
    command = (
        f"python -m rlhf stage=grpo ... rollout=server rollout.servers=[{url}] "
        f"rollout.server.token_env={variable}"
    )
    console.closing_panel(
        "serve_rollout: ready, Ctrl-C stops it", figures, {"run": folder}, command
    )
