"""What can be known of servers before any weights load."""

import os
import shutil
from importlib.util import find_spec

import torch

from conf.choices import Carrier
from conf.model import ServerConfig, Transfer
from conf.schema import RolloutConfig
from rlhf.process import distributed
from rlhf.process.http import bearer_token, checked_url
from rlhf.types import UserError
from rollout.server.client import Server, ServerFault
from rollout.server.process import core_list

_ANSWER_S = 10.0  # longest wait for a server that is asked whether it is there
_DEVICES_ONLY = (Transfer.nccl, Transfer.ipc)


def check_servers(cfg: RolloutConfig, carrier: Carrier, *, dry_run: bool) -> None:
    """Servers take what is sent, and those of rollout.servers answer, which a dry run does not ask.
    Raises UserError.
    """
    if carrier not in (Carrier.merged, Carrier.lora):
        raise UserError(
            "rollout=server: servers take whole weights and LoRA adapters, and this adapter is "
            "neither (rollout.lora_sync=merged has it merged where it can be). Set rollout=vllm."
        )
    transfer = cfg.server.transfer
    if transfer in _DEVICES_ONLY and not dry_run and not torch.cuda.is_available():
        raise UserError(
            f"rollout.server.transfer={transfer.value} goes between CUDA devices, and there are "
            "none here. Set rollout.server.transfer=auto."
        )
    if cfg.servers:
        _check_running(cfg, dry_run=dry_run)
    elif not dry_run:
        _check_own(cfg.server)


def _check_running(cfg: RolloutConfig, *, dry_run: bool) -> None:
    key = "rollout.servers"
    if len(set(cfg.servers)) < len(cfg.servers):
        raise UserError(f"{key}={cfg.servers}: names a server twice. Name each once.")
    for url in cfg.servers:
        checked_url(url, key)
    if cfg.server.token_env is None:
        raise UserError(
            f"{key}={cfg.servers} needs rollout.server.token_env, which is not set: the name of "
            "the environment variable with the servers' token (stage=serve_rollout shows it)."
        )
    if dry_run:
        return
    token = bearer_token(cfg.server.token_env, "rollout.server.token_env")
    for url in cfg.servers:
        _check_answer(url, token, cfg.server.token_env)


def _check_answer(url: str, token: str, variable: str) -> None:
    """A vLLM server answers there and takes the token."""
    server = Server(url, token, limit_s=_ANSWER_S, at_once=1)
    try:
        server.longest()
    except ServerFault as fault:
        if " 401" in fault.cause:
            raise UserError(
                f"rollout.servers={url} does not take the token in "
                f"rollout.server.token_env={variable}. Give the one that it was started with."
            ) from fault
        raise UserError(
            f"rollout.servers={url}: no vLLM server can be used there ({fault.cause}). Start one "
            "with stage=serve_rollout, or correct the address."
        ) from fault
    finally:
        server.close()


def _check_own(cfg: ServerConfig) -> None:
    """Servers that the run starts itself can be started."""
    if distributed.world_size() > distributed.local_world_size():
        raise UserError(
            "rollout.servers=[]: a run on several machines starts no servers of its own, since "
            "they listen on one machine's loopback address. Start them with stage=serve_rollout "
            "and name them in rollout.servers."
        )
    if cfg.python is None and find_spec("vllm") is None:
        raise UserError(
            "rollout=server: vLLM is not installed here. Install it (docs/installing.md), or set "
            "rollout.server.python=<interpreter of an environment that has it and this package>."
        )
    if cfg.python is not None and shutil.which(cfg.python) is None:
        raise UserError(
            f"rollout.server.python={cfg.python}: there is no such program. Expected the path of "
            "a Python interpreter."
        )
    known = os.sched_getaffinity(0)
    for text in cfg.cores or []:
        try:
            missing = sorted(set(core_list(text)) - known)
        except ValueError:
            raise UserError(
                f"rollout.server.cores={cfg.cores}: {text!r} is no list of cores. Expected "
                "numbers and ranges, such as 0-3,6."
            ) from None
        if missing:
            raise UserError(
                f"rollout.server.cores={cfg.cores}: this process may not use core {missing[0]}. "
                f"Expected some of {sorted(known)}."
            )
