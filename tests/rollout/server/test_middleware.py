"""Only /health answers without the token."""

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from rollout.server.middleware import TOKEN_VARIABLE, BearerToken

TOKEN = "a-token-of-this-test"
# of vLLM's own control routes
ROUTES = ["/collective_rpc", "/pause", "/update_weights", "/inference/v1/generate", "/health/x"]


async def answer(request: Request) -> PlainTextResponse:
    return PlainTextResponse("reached")


async def accept(socket: WebSocket) -> None:
    await socket.accept()
    await socket.send_text("reached")


def client(**headers: str) -> TestClient:
    routes = [Route(path, answer, methods=["GET", "POST"]) for path in [*ROUTES, "/health"]]
    app = Starlette(routes=[*routes, WebSocketRoute("/socket", accept)])
    return TestClient(BearerToken(app, TOKEN), headers=headers)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "given", [None, "", "Bearer", f"Bearer {TOKEN}x", f"Basic {TOKEN}", f"bearer {TOKEN}", TOKEN]
)
def test_no_route_answers_without_the_token(route: str, given: str | None) -> None:
    headers = {} if given is None else {"authorization": given}
    for method in ("GET", "POST", "OPTIONS"):
        refused = client().request(method, route, headers=headers)
        assert refused.status_code == 401
        assert "reached" not in refused.text and TOKEN not in refused.text


@pytest.mark.parametrize("route", [*ROUTES, "/health"])
def test_every_route_answers_with_it(route: str) -> None:
    assert client(authorization=f"Bearer {TOKEN}").post(route).text == "reached"


def test_health_needs_none() -> None:
    assert client().get("/health").text == "reached"


def test_a_second_header_does_not_help() -> None:
    twice = [("authorization", f"Bearer {TOKEN}"), ("authorization", "Bearer other")]
    assert client().get("/pause", headers=twice).status_code == 401


def test_websockets_too() -> None:
    with pytest.raises(WebSocketDisconnect), client().websocket_connect("/socket"):
        pass
    with client(authorization=f"Bearer {TOKEN}").websocket_connect("/socket") as socket:
        assert socket.receive_text() == "reached"


def test_a_server_without_a_token_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, ""):
        monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(TOKEN_VARIABLE, value)
        with pytest.raises(RuntimeError, match=TOKEN_VARIABLE):
            BearerToken(Starlette())
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    guarded = TestClient(BearerToken(Starlette(routes=[Route("/x", answer)])))
    assert guarded.get("/x").status_code == 401
    assert guarded.get("/x", headers={"authorization": f"Bearer {TOKEN}"}).text == "reached"
