"""A gateway in this process, before stand-in servers: no port, no model."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from conf.serving import ArmConfig, GatewayStage
from rlhf.gateway.build import Keys, build
from rlhf.stages.gateway import fields_of

KEYS = Keys("client-key", "operator-key")
CLIENT = {"authorization": "Bearer client-key"}
OPERATOR = {"authorization": "Bearer operator-key"}
ASKED: list[dict[str, str]] = [{"role": "user", "content": "What is it?"}]


@dataclass
class Server:
    """A stand-in for a served model, which says all that may tell who it is."""

    name: str
    models: list[str]
    text: str = "an answer"
    broken: str | None = None  # "dead", "status", "stream", "text"
    asked: list[dict[str, Any]] = field(default_factory=list)
    token: str | None = None
    slow_s: float = 0.0

    async def answer(self, request: httpx.Request) -> httpx.Response:
        """As vLLM answers."""
        if self.broken == "dead":
            raise httpx.ConnectError(f"{self.name} is dead")
        if self.token is not None:
            assert request.headers["authorization"] == f"Bearer {self.token}"
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": name} for name in self.models]})
        body = json.loads(await request.aread())
        self.asked.append(body)
        if self.slow_s:
            await asyncio.sleep(self.slow_s)
        told = {"x-served-by": self.name, "server": self.name}
        if self.broken == "status":
            return httpx.Response(500, json={"error": f"{self.name} failed"}, headers=told)
        if body["model"] not in self.models or self.broken == "refuses":
            return httpx.Response(400, json={"message": f"{self.name} has none"}, headers=told)
        if self.broken == "text":
            return httpx.Response(200, text=f"<html>{self.name}</html>", headers=told)
        if body.get("stream"):
            return httpx.Response(200, stream=_Stream(self._events(body)), headers=told)
        return httpx.Response(200, json=self._whole(body), headers=told)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.name}",
            "object": kind,
            "created": 7,
            "model": self.models[0],
            "system_fingerprint": f"fp-{self.name}",
            "service_tier": self.name,
            "kv_transfer_params": {"host": self.name},
        }

    def _whole(self, body: dict[str, Any]) -> dict[str, Any]:
        choices = []
        for index in range(body.get("n", 1)):
            message = {"role": "assistant", "content": f"{self.text} {index}", "extra": self.name}
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": {"content": [self.name]},
                    "finish_reason": "stop",
                    "stop_reason": self.name,
                    "token_ids": [1, 2],
                }
            )
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "by": self.name}
        return {**self._head("chat.completion"), "choices": choices, "usage": usage}

    def _events(self, body: dict[str, Any]) -> list[bytes]:
        words = self.text.split()
        events = []
        for number, word in enumerate(words):
            delta = {"role": "assistant", "content": f"{word} ", "extra": self.name}
            last = number == len(words) - 1
            choice = {
                "index": 0,
                "delta": delta,
                "finish_reason": "stop" if last else None,
                "logprobs": self.name,
            }
            events.append({**self._head("chat.completion.chunk"), "choices": [choice]})
        lines = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]
        if self.broken == "stream":
            return [lines[0], b"broken"]
        lines.append(b": a comment of " + self.name.encode() + b"\n\n")
        return [*lines, b"data: [DONE]\n\n"]


class _Stream(httpx.AsyncByteStream):
    """Chunks that end in the middle of lines; the chunk "broken" ends the connection."""

    def __init__(self, chunks: list[bytes]) -> None:
        self._chunks = chunks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            if chunk == b"broken":
                raise httpx.ReadError("the server is gone")
            half = len(chunk) // 2
            yield chunk[:half]
            await asyncio.sleep(0)
            yield chunk[half:]


class Network(httpx.AsyncBaseTransport):
    """Servers by their hosts."""

    def __init__(self, **servers: Server) -> None:
        self.servers = servers

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        answer = await self.servers[request.url.host].answer(request)
        answer.request = request
        return answer


@dataclass
class Standing:
    """A running gateway, its client, and its parts."""

    client: httpx.AsyncClient
    app: Any
    folder: Path

    async def ask(self, user: str, code: int = 200, /, **more: Any) -> Any:
        """A question of a user; the answer as JSON."""
        headers = {**CLIENT, "x-user": user, **more.pop("headers", {})}
        body = {"model": "mine", "messages": ASKED, **more}
        content = json.dumps(body)
        answer = await self.client.post("/v1/chat/completions", content=content, headers=headers)
        assert answer.status_code == code, answer.text
        return answer.json()

    async def say(self, user: str, answer: str, code: int = 200, /, **more: Any) -> Any:
        """Feedback of a user."""
        body = {"answer": answer, "user": user, **more}
        got = await self.client.post("/v1/feedback", json=body, headers=CLIENT)
        assert got.status_code == code, got.text
        return got.json()

    async def state(self) -> dict[str, Any]:
        """What the operator sees."""
        got = await self.client.get("/operator/state", headers=OPERATOR)
        assert got.status_code == 200, got.text
        return dict(got.json())


@contextlib.asynccontextmanager
async def standing(
    folder: Path, network: Network, *, weights: tuple[float, float] = (1, 1), **options: Any
) -> AsyncIterator[Standing]:
    """A gateway before the servers `a` and `b`. `options`: of the stage; `arms`: other arms."""
    arms = options.pop("arms", None)
    if arms is None:
        arms = {
            "left": ArmConfig(url="http://a", model="model-a", weight=weights[0]),
            "right": ArmConfig(url="http://b", model="model-b", weight=weights[1]),
        }
    stage = GatewayStage(arms=arms, **{"poll_s": 0.05, **options})
    fields = {name: fields_of(arm) for name, arm in arms.items()}
    registry = folder / "registry.sqlite"
    app = build(stage, fields, folder / "gateway", registry, "mine", KEYS, network)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            yield Standing(client, app, folder / "gateway")


def network() -> Network:
    """Two servers whose names stand in all that they say beside their answers."""
    return Network(a=Server("SECRETA", ["model-a"]), b=Server("SECRETB", ["model-b"]))
