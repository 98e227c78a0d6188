"""An environment behind HTTP: the protocol by hand, retries, limits, and answers without sense."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from conf.reward import EnvironmentConfig, EnvironmentKind
from rlhf.environments import factory
from rlhf.environments.http import HttpEnvironment, ServerError
from rlhf.types import Step, UserError

Answer = Callable[[str, Mapping[str, Any]], tuple[int, object]]


class Site:
    """A server that answers by a function, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []
        self.answer: Answer = lambda path, message: (200, {"observation": path})
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                message = json.loads(body)
                site.asked.append((self.path, message, self.headers.get("authorization")))
                status, content = site.answer(self.path, message)
                sent = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(sent)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # the client has gone
                    self.wfile.write(sent)

            def log_message(self, format: str, *args: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/game"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.environments.http.pause_s", lambda retry: 0.0)


def served(site: Site, **options: Any) -> HttpEnvironment:
    environment = EnvironmentConfig(kind=EnvironmentKind.http, url=site.url, **options)
    made = factory.make_factory(environment)()
    assert isinstance(made, HttpEnvironment)
    return made


def test_an_episode_by_hand(site: Site) -> None:
    def answer(path: str, message: Mapping[str, Any]) -> tuple[int, object]:
        if path == "/game/reset":
            return 200, {"observation": [{"role": "user", "content": "Begin."}]}
        if message.get("turn") == 1:
            return 200, {"observation": "", "reward": 1, "done": True, "info": {"success": True}}
        return 200, {"observation": "higher", "reward": 0.5}

    site.answer = answer
    game = served(site)
    assert game.reset({"a": 1}, 7) == [{"role": "user", "content": "Begin."}]
    assert game.step("3") == Step("higher", reward=0.5)
    assert game.step("4") == Step("", reward=1.0, done=True, info={"success": True})
    game.close()
    game.close()
    episodes = {message["episode"] for _, message, _ in site.asked}
    assert len(episodes) == 1
    for _, message, _ in site.asked:
        del message["episode"]
    assert site.asked == [
        ("/game/reset", {"row": {"a": 1}, "seed": 7}, None),
        ("/game/step", {"turn": 0, "text": "3"}, None),
        ("/game/step", {"turn": 1, "text": "4"}, None),
        ("/game/close", {}, None),
    ]


def test_failures_that_may_pass_are_tried_again(site: Site) -> None:
    def answer(path: str, message: Mapping[str, Any]) -> tuple[int, object]:
        return (503, "busy") if len(site.asked) < 3 else (200, {"observation": "at last"})

    site.answer = answer
    game = served(site, retries=2)
    assert game.reset({}, 1) == "at last"
    assert site.asked[0] == site.asked[1] == site.asked[2], "the same episode, thrice"


def test_failures_that_do_not_pass_stop(site: Site) -> None:
    site.answer = lambda path, message: (500, "broken")
    with pytest.raises(ServerError, match=r"500 .*broken.*3 of 3"):
        served(site, retries=2).reset({}, 1)
    asked = len(site.asked)
    site.answer = lambda path, message: (404, "what?")
    with pytest.raises(ServerError, match=r"404 .what\?"):
        served(site, retries=2).reset({}, 1)
    assert len(site.asked) == asked + 1, "a refusal is not repeated"
    site.close()
    with pytest.raises(ServerError, match="2 of 2"):
        served(site, retries=1).reset({}, 1)


def test_a_server_that_hangs_is_late(site: Site) -> None:
    def answer(path: str, message: Mapping[str, Any]) -> tuple[int, object]:
        time.sleep(1.5)
        return 200, {"observation": ""}

    site.answer = answer
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="/reset"):
        served(site, step_limit_s=0.2).reset({}, 1)
    assert time.monotonic() - began < 1.2


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        (b"<html>", "html"),
        ([], "object"),
        ({}, "observation"),
        ({"observation": 3}, "observation"),
        ({"observation": [{"role": "user"}]}, "observation"),
        ({"observation": "", "reward": "high"}, "reward"),
        ({"observation": "", "reward": float("nan")}, "reward"),
        ({"observation": "", "reward": True}, "reward"),
        ({"observation": "", "done": 1}, "done"),
        ({"observation": "", "info": [1]}, "info"),
    ],
)
def test_answers_without_sense_are_no_reward(site: Site, answer: object, named: str) -> None:
    game = served(site)
    game.reset({}, 1)
    site.answer = lambda path, message: (200, answer)
    with pytest.raises(ServerError, match=named):
        game.step("x")


def test_a_token_is_sent_and_never_quoted(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAME_TOKEN", "secret-token")
    game = served(site, token_env="GAME_TOKEN")
    game.reset({}, 1)
    assert site.asked[0][2] == "Bearer secret-token"
    site.answer = lambda path, message: (403, "not secret-token")
    with pytest.raises(ServerError) as error:
        game.step("x")
    assert "403" in str(error.value) and "secret-token" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"url": "nowhere"}, "environment.url"),
        ({"url": None}, "environment.url"),
        ({"url": "http://127.0.0.1:1", "token_env": "NO_SUCH_VARIABLE"}, "environment.token_env"),
        ({"url": "http://127.0.0.1:1", "options": {"a": 1}}, "environment.options"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        factory.check(EnvironmentConfig(kind=EnvironmentKind.http, **options))
