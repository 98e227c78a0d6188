"""The command lines of ranks and rollout servers, from the one that was given; and what their
environments hold.
"""

import os
import re
import secrets
from collections.abc import Mapping, Sequence

from rlhf.process import redaction
from rlhf.types import UserError

TOKEN_ENV = "RLHF_ROLLOUT_TOKEN"  # the bearer token of servers that a launcher starts
# Each process is started once: what it runs, it runs itself.
_STARTS_NOTHING = "launch.kind=none"
_OF_LAUNCH = ("launch",)
# A server has a stage and a run of its own, and is one of one.
_NOT_OF_SERVERS = (
    *_OF_LAUNCH,
    "stage",
    "run.name",
    "run.dry_run",
    "run.resume",
    "run.overwrite",
    "rollout.servers",
    "rollout.server.count",
    "rollout.server.cores",
    "rollout.server.devices",
    "rollout.server.token_env",
)
_NOT_OF_RANKS = (*_OF_LAUNCH, "rollout.servers", "rollout.server.token_env")
_KEY = re.compile(r"[+~]{0,2}([\w./]+)(?:@[\w.]+)?=?")


def without(argv: Sequence[str], keys: Sequence[str]) -> list[str]:
    """The arguments that set none of the options or groups `keys`, nor anything inside them."""
    return [argument for argument in argv if not _is_about(argument, keys)]


def _is_about(argument: str, keys: Sequence[str]) -> bool:
    match = _KEY.match(argument)
    if match is None:
        return False
    return any(match[1] == key or match[1].startswith((f"{key}.", f"{key}/")) for key in keys)


def rank_arguments(argv: Sequence[str], urls: str | None) -> list[str]:
    """What ``python -m rlhf`` is told on each rank. urls: the servers that the launcher starts,
    separated by commas; None where it starts none.
    """
    if urls is None:
        return [*without(argv, _OF_LAUNCH), _STARTS_NOTHING]
    own = [f"rollout.servers=[{urls}]", f"rollout.server.token_env={TOKEN_ENV}"]
    return [*without(argv, _NOT_OF_RANKS), *own, _STARTS_NOTHING]


def server_arguments(
    argv: Sequence[str], run: str, number: str, host: str, port: str, cores: str | None = None
) -> list[str]:
    """What ``python -m rlhf`` is told for server `number` of the run `run`, which listens on
    `host`:`port`, on some `cores` or any. What it left before is overwritten; its log and
    description lie where the run's own servers have theirs.
    """
    bound = "null" if cores is None else f"['{cores}']"
    return [
        "stage=serve_rollout",
        *without(argv, _NOT_OF_SERVERS),
        # a directory beside those of the run's stages
        f"run.name={run}/server-{number}",
        "run.overwrite=true",
        f"stage.servers_of={run}",
        f"stage.host={host}",
        f"stage.port={port}",
        "rollout.server.count=1",
        f"rollout.server.cores={bound}",
        "rollout.server.devices=null",
        f"rollout.server.token_env={TOKEN_ENV}",
        _STARTS_NOTHING,
    ]


def rank_variables(number: int, local: int, ranks: int, on_node: int) -> dict[str, str]:
    """What torchrun would tell rank `number` of `ranks`, `local` of `on_node` on its node; without
    the address at which they meet.
    """
    return {
        "RANK": str(number),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(on_node),
    }


def token() -> str:
    """The token of the environment, or a new one."""
    return os.environ.get(TOKEN_ENV) or secrets.token_urlsafe(32)


def check_no_secrets(argv: Sequence[str], environment: Mapping[str, str]) -> None:
    """Raises UserError for a secret that would be written into a job script or shown among the
    processes of other machines.
    """
    for argument, clean in zip(argv, redaction.arguments(argv), strict=True):
        if argument != clean:
            raise UserError(
                f"{clean}: a secret on the command line would be written into the launched "
                "commands. Export it as an environment variable, and name that one in the option "
                "that ends in _env."
            )
    for name, value in environment.items():
        if redaction.names_secret(name) or redaction.text(value) != value:
            raise UserError(
                f"launch.env.{name}: the name of a secret. Export {name} in the environment of "
                "this command: every launched process inherits it."
            )
