"""``stage=serve``: a run's model, or a base with adapters by name, over vLLM's OpenAI-compatible
API, until SIGTERM or Ctrl-C.
"""

from pathlib import Path

from conf.choices import RolloutBackend
from conf.schema import Config, generator_of
from conf.stages import ServeStage
from rlhf.checks import inputs
from rlhf.models.directories import contents
from rlhf.process import distributed
from rlhf.process.http import bearer_token, is_loopback
from rlhf.run import console
from rlhf.run.models import model_path
from rlhf.serving.server import ApiServer, Served, Stopped, check_adapters, recipe_of
from rlhf.stages.taken import HasConfig
from rlhf.types import UserError
from rollout.server.generator import FOLDER
from rollout.server.process import free_port, new_token, told_to_stop

KEY_ENV = "OPENAI_API_KEY"  # where OpenAI's clients look for the key


def check(cfg: Config) -> list[str]:
    """The model, its adapters and the key will do. Raises UserError."""
    stage = cfg.stage_as(ServeStage)
    _require_vllm()
    distributed.require_one_process("stage=serve", "Run it without torchrun.")
    path = model_path(cfg.model, cfg.run)
    held = contents(path)
    if not held.loads_as_it_is or cfg.model.gguf_file is not None:
        raise UserError(
            f"stage=serve: vLLM can't start from {path} as it is (an adapter or a GGUF file). "
            f"Merge it first: stage=export model.path={path}. Or set model.path to the adapter's "
            f"base {held.weights}, and stage.adapters.<name> to the adapter."
        )
    check_adapters(path, stage.model_name or cfg.run.name, stage.adapters)
    if stage.token_env is not None:
        bearer_token(stage.token_env, "stage.token_env")
    elif not is_loopback(stage.host):
        raise UserError(
            f"stage.host={stage.host} needs stage.token_env, the name of an environment variable "
            "with a key: other machines reach it there."
        )
    prompt, response = cfg.data.max_prompt_length, cfg.rollout.max_response_length
    inputs.check_sequence_length(prompt, response, inputs.directory_positions([("model", path)]))
    return []


def _require_vllm() -> None:
    try:
        generator_of(RolloutBackend.vllm)
    except ValueError as error:
        raise UserError(f"stage=serve: {error}") from error


def run(ctx: HasConfig) -> None:
    """Serve until a signal comes. Raises UserError where the server does not start, or ends."""
    cfg, stage = ctx.cfg, ctx.cfg.stage_as(ServeStage)
    token = new_token()
    if stage.token_env is not None:
        token = bearer_token(stage.token_env, "stage.token_env")
    served = Served(
        contents(model_path(cfg.model, cfg.run)).weights,
        stage.model_name or cfg.run.name,
        stage.adapters,
        cfg.data.max_prompt_length + cfg.rollout.max_response_length,
    )
    recipe = recipe_of(cfg.rollout, cfg.model, served, token=token, seed=cfg.run.seed)
    folder = Path(cfg.run.dir).expanduser() / cfg.run.name / FOLDER
    port = stage.port or free_port(stage.host)
    with told_to_stop() as stop:
        server = ApiServer(recipe, stage.host, port, folder, stage.grace_s)
        try:
            server.wait(stop.is_set)
            _announce(server, served, stage.token_env)
            server.watch(stop.wait)
        except Stopped:
            pass
        finally:
            server.stop()
    print("serve: stopped", flush=True)


def _announce(server: ApiServer, served: Served, variable: str | None) -> None:
    """Print where the server is. `variable` holds the key; None: it was made, and appears here and
    nowhere else.
    """
    shown = f"in the environment variable {variable}"
    if variable is None:
        shown = f"export {KEY_ENV}={server.token}"
    url = f"{server.url}/v1"
    figures = {
        "model": served.path,
        "names": ", ".join(served.names),
        "url": f"export OPENAI_BASE_URL={url}",
        "key": shown,
    }
    heading = f"serve: ready at {url}, Ctrl-C stops it"
    console.closing_panel(heading, figures, {"log": server.log}, None)
