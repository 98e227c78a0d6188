"""``stage=chat``: a conversation with a model in the terminal, by transformers (rollout=hf) or by a
vLLM server of its own (rollout=vllm).
"""

import contextlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf.choices import RolloutBackend
from conf.reward import EnvironmentConfig, EnvironmentKind
from conf.schema import Config, ModelConfig, RolloutConfig, generator_of
from conf.stages import ChatStage
from rlhf.checks import inputs
from rlhf.environments.factory import make_factory, tools_of
from rlhf.models.directories import check_model_path, contents
from rlhf.models.encoding import require_template
from rlhf.models.joining import messages_of
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.process import distributed
from rlhf.run.models import is_classifier, model_path
from rlhf.serving.server import ApiServer, Served, recipe_of
from rlhf.serving.session import Session
from rlhf.serving.talkers import HFTalker, ServerTalker, Talker, Toolbox
from rlhf.stages.taken import HasConfig
from rlhf.types import Message, Step, UserError
from rollout.sampling import Sampling
from rollout.server.generator import FOLDER
from rollout.server.process import free_port, new_token

LOG = logging.getLogger("rlhf.stages.chat")
ROWS = "chats"  # folder of saved rows, beside the run's stages
_HOST = "127.0.0.1"
_GRACE_S = 10.0


def check(cfg: Config) -> list[str]:
    """The models can talk. Raises UserError."""
    stage = cfg.stage_as(ChatStage)
    distributed.require_one_process("stage=chat", "Run it without torchrun.")
    backend = _backend(cfg.rollout)
    for path in _paths(cfg.model, model_path(cfg.model, cfg.run), stage.compare):
        held = contents(path)
        if is_classifier(Path(path).expanduser()):
            raise UserError(f"stage.compare={path} is a reward model, which writes no text.")
        if backend is RolloutBackend.vllm and not _starts(cfg.model, path):
            raise UserError(
                f"rollout=vllm can't start from {held.path} as it is (an adapter or a GGUF file). "
                "Set rollout=hf, or merge it first (stage=export)."
            )
        tokenizer = load_tokenizer(_model(cfg.model, path), cfg.data.chat_template)
        require_template(tokenizer, f"stage=chat with {path}")
        _toolbox(cfg.environment, tokenizer)
    inputs.check_gguf_file(cfg.model)
    prompt, response = cfg.data.max_prompt_length, cfg.rollout.max_response_length
    path = model_path(cfg.model, cfg.run)
    inputs.check_sequence_length(prompt, response, inputs.directory_positions([("model", path)]))
    return []


def _toolbox(environment: EnvironmentConfig, tokenizer: Any) -> Toolbox | None:
    """The tools of environment=tools; None without an environment. Raises UserError."""
    if environment.kind is EnvironmentKind.none:
        return None
    if environment.kind is not EnvironmentKind.tools:
        raise UserError(
            f"environment={environment.kind.value}: in stage=chat you are the environment. Only "
            "environment=tools goes with it."
        )
    if environment.options:
        raise UserError(
            f"environment.options={environment.options}: stage=chat has no rows with answers. "
            "Leave it out."
        )
    tools = tools_of(environment)
    assert tools is not None  # environment=tools has some
    make = make_factory(environment, tokenizer)

    def act(text: str) -> Sequence[Message]:
        functions = make()
        functions.reset({"prompt": []}, 0)
        step = functions.step(text)
        assert isinstance(step, Step)  # functions answer at once
        return () if step.done else messages_of(step.observation)

    return Toolbox(tools, act)


def _backend(rollout: RolloutConfig) -> RolloutBackend:
    """transformers, unless vLLM is asked for: its server takes a minute to start. Raises
    UserError.
    """
    if rollout.backend in (RolloutBackend.auto, RolloutBackend.hf):
        return RolloutBackend.hf
    if rollout.backend is RolloutBackend.server:
        raise UserError("rollout=server: stage=chat starts a server by itself. Set rollout=vllm.")
    try:
        return generator_of(rollout.backend)
    except ValueError as error:
        raise UserError(str(error)) from error


def _paths(model: ModelConfig, path: str, compare: str | None) -> list[str]:
    if compare is None:
        return [path]
    check_model_path(compare, "stage.compare")
    return [path, compare]


def _model(model: ModelConfig, path: str) -> ModelConfig:
    """The options of the model at `path`; model.gguf_file is of model.path alone."""
    return ModelConfig(
        path=path,
        gguf_file=model.gguf_file if path == model.path else None,
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
    )


def _starts(model: ModelConfig, path: str) -> bool:
    return contents(path).loads_as_it_is and _model(model, path).gguf_file is None


def run(ctx: HasConfig) -> None:
    """Talk until the user ends it. Raises UserError where a server does not start."""
    cfg, stage = ctx.cfg, ctx.cfg.stage_as(ChatStage)
    paths = _paths(cfg.model, model_path(cfg.model, cfg.run), stage.compare)
    folder = Path(cfg.run.dir).expanduser() / cfg.run.name
    longest = cfg.data.max_prompt_length + cfg.rollout.max_response_length
    with contextlib.ExitStack() as stack:
        talkers = []
        for path in paths:
            LOG.info("stage=chat: loading %s", path)
            model = _model(cfg.model, path)
            tokenizer = load_tokenizer(model, cfg.data.chat_template)
            sampling = Sampling.from_config(cfg.rollout)
            toolbox = _toolbox(cfg.environment, tokenizer)
            talker: Talker
            if _backend(cfg.rollout) is RolloutBackend.hf:
                held = load_causal_lm(model, tokenizer, native=True).to(distributed.device())
                talker = HFTalker(path, held, tokenizer, sampling, longest, toolbox)
            else:
                server = _server(cfg.rollout, model, longest, cfg.run.seed, folder)
                talker = ServerTalker(path, server, tokenizer, sampling, longest, toolbox)
            stack.callback(talker.close)
            talkers.append(talker)
        Session(
            talkers[0],
            talkers[-1],
            _read,
            _write,
            folder / ROWS,
            seed=cfg.run.seed,
            greedy=stage.greedy,
            system=stage.system,
            most_turns=cfg.environment.max_turns,
        ).run()


def _server(
    rollout: RolloutConfig, model: ModelConfig, longest: int, seed: int, folder: Path
) -> ApiServer:
    """A server of the model under its path as name, ready. Raises UserError."""
    path = str(model.path)
    served = Served(contents(path).weights, path, {}, longest)
    recipe = recipe_of(rollout, model, served, token=new_token(), seed=seed)
    server = ApiServer(recipe, _HOST, free_port(_HOST), folder / FOLDER, _GRACE_S)
    try:
        server.wait(lambda: False)
    except BaseException:
        server.stop()
        raise
    return server


# ---- the terminal ----


def _read(prompt: str) -> str:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` a history and keys to edit with
    return input(prompt)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
