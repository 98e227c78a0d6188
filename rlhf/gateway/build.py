"""A gateway out of its parts."""

import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from conf.serving import GatewayStage
from rlhf.gateway.app import Gateway, Rules, create_app
from rlhf.gateway.arms import Arms, made
from rlhf.gateway.clean import Cleaner
from rlhf.gateway.proxy import Proxy
from rlhf.gateway.recent import Recent
from rlhf.gateway.split import load_key
from rlhf.gateway.store import FILE, Store
from rlhf.process.http import bearer_token

_CONNECT_S = 5.0
# an idle connection is given up before servers do (uvicorn after 5 s)
_IDLE_S = 2.0


@dataclass(frozen=True, slots=True)
class Keys:
    """What clients and the operator need."""

    client: str
    operator: str

    @classmethod
    def of(cls, client: str | None, operator: str | None) -> "Keys":
        """Out of environment variables; None: new ones. Raises UserError."""
        given = []
        for variable, key in ((client, "token_env"), (operator, "operator_env")):
            if variable is None:
                given.append(secrets.token_urlsafe(32))
            else:
                given.append(bearer_token(variable, f"stage.{key}"))
        return cls(*given)


def build(
    stage: GatewayStage,
    arms: Mapping[str, Mapping[str, Any]],
    folder: Path,
    registry: Path,
    model: str,
    keys: Keys,
    transport: httpx.AsyncBaseTransport | None = None,
) -> Any:
    """The ASGI application. arms: their options by name; folder: of the key and the file; registry:
    its file; model: its name for clients; transport: to the arms, for tests. Raises UserError.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log every request's arm
    key = load_key(folder)
    cleaner = Cleaner.of(stage.names)
    store = Store(folder / FILE)
    client = httpx.AsyncClient(
        timeout=httpx.Timeout(stage.timeout_s, connect=_CONNECT_S),
        limits=httpx.Limits(
            max_connections=None, max_keepalive_connections=64, keepalive_expiry=_IDLE_S
        ),
        trust_env=False,
        follow_redirects=False,
        transport=transport,
    )
    rules = Rules(
        model=model,
        client_token=keys.client,
        operator_token=keys.operator,
        user_header=stage.user_header,
        most_body=stage.body_kib << 10,
        at_once=stage.at_once,
        failover=stage.failover,
        alpha=stage.alpha,
        votes=stage.votes,
        retention_days=stage.retention_days,
        poll_s=stage.poll_s,
    )
    found = {name: made(name, arm) for name, arm in arms.items()}
    standing = Arms(found, store, registry, client)
    gateway = Gateway(
        rules,
        key,
        standing,
        store,
        lambda failed: Proxy(client, stage.answer_mib << 20, failed),
        cleaner,
        Recent(stage.answer_minutes),
    )

    async def close() -> None:
        await client.aclose()
        store.close()

    return create_app(gateway, close)
