"""vLLM's OpenAI-compatible server in a child process: its options, its adapters, its life."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema import ModelConfig, RolloutConfig, vllm_lora_rank
from rlhf.models.directories import CLASSIFIER, contents, fingerprint, readable
from rlhf.models.loading import resolve_dtype
from rlhf.types import UserError
from rollout.server.client import Server, ServerFault
from rollout.server.launch import device_flags
from rollout.server.process import Child, Recipe, core_list, is_free, wait_until_ready

_MIDDLEWARE = "rollout.server.middleware.BearerToken"
_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True, slots=True)
class Served:
    """What a server has: a model, and adapters of it by the names that requests give as model."""

    path: str
    name: str
    adapters: Mapping[str, str]  # directories by name
    max_tokens: int  # prompt and answer together

    @property
    def names(self) -> list[str]:
        return [self.name, *self.adapters]


def recipe_of(
    cfg: RolloutConfig, model: ModelConfig, served: Served, *, token: str, seed: int
) -> Recipe:
    """How the server is started. Raises UserError."""
    dtype = resolve_dtype(model.dtype)
    flags: dict[str, Any] = {
        "served_model_name": served.name,
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": served.max_tokens,
        "max_num_seqs": cfg.max_num_seqs,
        "seed": seed,
        "trust_remote_code": model.trust_remote_code,
        "middleware": _MIDDLEWARE,
        "disable_uvicorn_access_log": True,
        "uvicorn_log_level": "warning",
        **device_flags(cfg, dtype, served.max_tokens),
    }
    if served.adapters:
        flags |= {
            "enable_lora": True,
            "max_loras": len(served.adapters),
            "max_lora_rank": max(map(_engine_rank, served.adapters.values())),
            "lora_modules": [_module(*item) for item in served.adapters.items()],
        }
    return Recipe(served.path, flags, cfg.server, token, developer=False)


def _module(name: str, path: str) -> str:
    """An adapter as vLLM's option has it; a path that isn't whole could be a hub's name to it."""
    return json.dumps({"name": name, "path": str(Path(path).expanduser().resolve())})


# ---- adapters by name ----


def check_adapters(model_path: str, name: str, adapters: Mapping[str, str]) -> None:
    """Each is a plain LoRA of the model, and its name can be asked for. Raises UserError."""
    for wanted, path in adapters.items():
        if wanted == name or not _NAME.fullmatch(wanted):
            raise UserError(
                f"stage.adapters: {wanted!r} can't be an adapter's name: expected letters, digits, "
                f"'-', '_' and '.', and not the model's own name {name!r}."
            )
        _check_adapter(model_path, wanted, path)


def _check_adapter(model_path: str, name: str, path: str) -> None:
    held = contents(path, f"stage.adapters.{name}").adapters
    if not held:
        raise UserError(
            f"stage.adapters.{name}={path} holds whole weights. Expected the directory of an "
            "adapter, such as adapter/ of a run; whole weights are served as model.path."
        )
    if len(held) > 1 or not _is_base(held[-1].base, model_path):
        raise UserError(
            f"stage.adapters.{name}={path} was trained on {held[-1].base}, not on the whole "
            f"weights of model.path={model_path}. Expected adapters of one base."
        )
    if held[-1].task == CLASSIFIER:
        raise UserError(f"stage.adapters.{name}={path} is a reward model's, which writes no text.")
    config = _config(path)
    for trait in ("use_dora", "modules_to_save"):
        if held[-1].kind != "LORA" or config.get(trait):
            shown = trait if held[-1].kind == "LORA" else f"kind {held[-1].kind}"
            raise UserError(
                f"stage.adapters.{name}={path}: vLLM serves plain LoRA only, not one with {shown}. "
                f"Merge it (stage=export model.path={path}), and serve that."
            )
    try:
        _engine_rank(path)
    except ValueError as error:
        raise UserError(f"stage.adapters.{name}={path}: {error}") from error


def _is_base(base: str, model_path: str) -> bool:
    if base == model_path or Path(base).resolve() == Path(model_path).expanduser().resolve():
        return True
    known = fingerprint(model_path)
    return known is not None and fingerprint(base) == known


def _config(path: str) -> dict[str, Any]:
    file = Path(path).expanduser() / "adapter_config.json"
    with readable(str(file)):
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _engine_rank(path: str) -> int:
    """The rank that vLLM reserves for an adapter. Raises ValueError."""
    config = _config(path)
    rank = max([config["r"], *config.get("rank_pattern", {}).values()])
    return vllm_lora_rank(rank, None, f"its rank {rank}")


# ---- the process ----


class Stopped(Exception):
    """Asked to stop while the server started."""


class ApiServer:
    """The server's process."""

    def __init__(self, recipe: Recipe, host: str, port: int, folder: Path, grace_s: float) -> None:
        """Start it; `folder` gets its log. Raises UserError where nothing can listen there."""
        if not is_free(host, port):
            raise UserError(
                f"stage.host={host} stage.port={port}: can't listen there. Choose another "
                "stage.port (0: any free one) or stage.host."
            )
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self.token = recipe.token
        self._limit_s = recipe.server.start_limit_s
        cores = recipe.server.cores
        self._child = Child(
            recipe.command(host, port),
            recipe.environment(0),
            folder / f"api-{port}.log",
            None if cores is None else core_list(cores[0]),
            grace_s,
        )

    @property
    def log(self) -> Path:
        return self._child.log

    def wait(self, asked_to_stop: Callable[[], bool]) -> None:
        """Until it answers. Raises UserError where it does not start, Stopped."""

        def alive() -> None:
            if asked_to_stop():
                raise Stopped

        server = Server(self.url, self.token, at_once=1)
        try:
            wait_until_ready(server, self._child, self._limit_s, alive)
        except ServerFault as fault:
            raise UserError(f"the server did not start: {fault}.") from fault
        finally:
            server.close()

    def watch(self, wait: Callable[[float], bool]) -> None:
        """Until `wait`, which waits so many seconds, says that it is to stop. Raises UserError
        where the server ends by itself.
        """
        while self._child.is_running():
            if wait(0.5):
                return
        raise UserError(f"the server ended ({self._child.tail()}); its log: {self.log}.")

    def stop(self) -> None:
        self._child.stop()
