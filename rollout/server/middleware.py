"""Every route of a vLLM server but /health asks for a bearer token.

vLLM's own --api-key guards /v1, /v2, /inference and /cohere only: whoever reaches the port could
otherwise pause the server, give it other weights or call its workers. This module runs in the
server (`--middleware rollout.server.middleware.BearerToken`) and needs the standard library alone.
"""

import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

# The environment variable that a server reads its token from.
TOKEN_VARIABLE = "RLHF_ROLLOUT_TOKEN"
_OPEN_ROUTE = "/health"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class BearerToken:
    """ASGI middleware: answers 401 to each request without `Authorization: Bearer <token>`, and
    closes such a websocket before it is accepted.
    """

    def __init__(self, app: App, token: str | None = None) -> None:
        """`token`: None: that of the environment. Raises RuntimeError where there is none."""
        token = os.environ.get(TOKEN_VARIABLE) if token is None else token
        if not token:
            raise RuntimeError(f"the server has no token: set {TOKEN_VARIABLE}")
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind not in ("http", "websocket") or self._may_pass(scope):
            await self._app(scope, receive, send)
        elif kind == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # policy violation
        else:
            await _refuse(send)

    def _may_pass(self, scope: Scope) -> bool:
        if scope["type"] == "http" and scope["path"] == _OPEN_ROUTE:
            return True
        headers = [value for name, value in scope["headers"] if name == b"authorization"]
        # one header only: a second one could be read by what comes behind
        return len(headers) == 1 and hmac.compare_digest(headers[0], self._expected)


async def _refuse(send: Send) -> None:
    body = json.dumps({"error": "this server needs its bearer token"}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"www-authenticate", b"Bearer"),
    ]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
