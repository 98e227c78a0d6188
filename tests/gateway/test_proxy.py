"""What the gateway passes on and keeps back: the arm never leaves it."""

import asyncio
import json
import stat
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest

from conf.serving import ArmConfig
from rlhf.gateway.split import load_key
from rlhf.types import UserError
from tests.gateway.standing import (
    ASKED,
    CLIENT,
    KEYS,
    OPERATOR,
    Standing,
    network,
    standing,
)

TELLING = ("SECRET", "model-a", "model-b", "left", "right", "fp-", "http://a", "http://b")


def silent(answer: httpx.Response) -> None:
    """Nothing of an answer tells an arm."""
    shown = answer.text + repr(sorted(answer.headers.multi_items()))
    for word in TELLING:
        assert word not in shown, f"{word} is in {shown}"


def runs(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


async def both(gateway: Standing) -> tuple[str, str]:
    """A user of each arm."""
    found: dict[str, str] = {}
    for number in range(40):
        user = f"user {number}"
        await gateway.ask(user)
        state = await gateway.state()
        for arm, count in state["figures"]["assigned"].items():
            if count and arm not in found:
                found[arm] = user
        if len(found) == 2:
            return found["left"], found["right"]
    raise AssertionError("40 users are in one arm")


def test_a_whole_answer(tmp_path: Path) -> None:
    net = network()

    async def test() -> None:
        async with standing(tmp_path, net) as gateway:
            for user in await both(gateway):
                body = {"model": "mine", "messages": ASKED, "n": 2, "temperature": 0.5}
                answer = await gateway.client.post(
                    "/v1/chat/completions", json=body, headers={**CLIENT, "x-user": user}
                )
                silent(answer)
                content = answer.json()
                assert set(content) == {"id", "object", "created", "model", "choices", "usage"}
                assert content["model"] == "mine" and content["created"] > 1_000_000
                texts = [choice["message"]["content"] for choice in content["choices"]]
                assert texts == ["an answer 0", "an answer 1"]
                assert set(content["choices"][0]) == {"index", "message", "finish_reason"}
                assert content["usage"] == {
                    "prompt_tokens": 3,
                    "completion_tokens": 2,
                    "total_tokens": 5,
                }

    runs(test)
    for server in net.servers.values():
        assert server.asked[-1] == {
            "messages": ASKED,
            "n": 2,
            "temperature": 0.5,
            "model": server.models[0],
        }


def test_a_stream_passes_chunk_by_chunk(tmp_path: Path) -> None:
    async def test() -> None:
        async with standing(tmp_path, network()) as gateway:
            for user in await both(gateway):
                body = {"model": "mine", "messages": ASKED, "stream": True, "user": user}
                answer = await gateway.client.post(
                    "/v1/chat/completions", json=body, headers=CLIENT
                )
                silent(answer)
                assert answer.headers["content-type"].startswith("text/event-stream")
                events = [line for line in answer.text.split("\n\n") if line]
                assert events[-1] == "data: [DONE]" and len(events) == 3
                chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
                assert len({chunk["id"] for chunk in chunks}) == 1
                said = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
                assert said == "an answer "
                kept = await gateway.say(user, chunks[0]["id"], thumb="up", consent=True)
                assert kept == {"kept": True, "texts": True}

    runs(test)


@pytest.mark.parametrize("broken", ["dead", "status", "text", "refuses"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_tells_no_arm(tmp_path: Path, broken: str, stream: bool) -> None:
    net = network()

    async def test() -> None:
        async with standing(tmp_path, net) as gateway:
            users = await both(gateway)
            said = []
            for server in net.servers.values():
                server.broken = broken
            for user in users:
                body = {"model": "mine", "messages": ASKED, "stream": stream, "user": user}
                answer = await gateway.client.post(
                    "/v1/chat/completions", json=body, headers=CLIENT
                )
                silent(answer)
                if broken == "text" and stream:  # no event of it is passed on
                    assert "unavailable" in answer.text
                else:
                    assert answer.status_code == (400 if broken == "refuses" else 503)
                said.append((answer.status_code, answer.text))
            assert said[0] == said[1]
            counts = (await gateway.state())["figures"]["counts"]
            assert bool(counts) is (broken != "refuses")

    runs(test)


def test_a_stream_that_breaks_tells_no_arm(tmp_path: Path) -> None:
    net = network()

    async def test() -> None:
        async with standing(tmp_path, net) as gateway:
            users = await both(gateway)
            for server in net.servers.values():
                server.broken = "stream"
            for user in users:
                body = {"model": "mine", "messages": ASKED, "stream": True, "user": user}
                answer = await gateway.client.post(
                    "/v1/chat/completions", json=body, headers=CLIENT
                )
                silent(answer)
                events = [line for line in answer.text.split("\n\n") if line]
                assert "unavailable" in events[-1] and "[DONE]" not in answer.text
                assert json.loads(events[0].removeprefix("data: "))["choices"]

    runs(test)


def test_failover_only_where_it_is_wanted_and_out_of_the_test(tmp_path: Path) -> None:
    net = network()

    async def test() -> None:
        async with standing(tmp_path, net, failover=True, votes=1) as gateway:
            left, right = await both(gateway)
            net.servers["a"].broken = "dead"
            answer = await gateway.ask(left)
            await gateway.say(left, answer["id"], thumb="down")
            net.servers["a"].broken = None
            after = await gateway.ask(left)  # back in the user's own arm, and still not counted
            await gateway.say(left, after["id"], thumb="up")
            other = await gateway.ask(right)
            await gateway.say(right, other["id"], thumb="up")
            state = await gateway.state()
            assert {s["arm"]: s["users"] for s in state["standings"]} == {"left": 0, "right": 1}
            assert state["figures"]["users away"] == {"away": 1, "done": 1}
            assert ["failover", "left", 1] in state["figures"]["counts"]

    runs(test)


@pytest.mark.parametrize(
    ("body", "code", "word"),
    [
        ({"model": "model-a"}, 404, "mine"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"messages": []}, 400, "messages"),
        ({"n": 9}, 400, "n:"),
        ({"stream": "yes"}, 400, "stream"),
        ({"user": "somebody else"}, 400, "user"),
        ({"messages": ASKED * 3000}, 413, "bytes"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "JSON"),
    ],
)
def test_requests_that_are_refused(
    tmp_path: Path, body: dict[str, Any], code: int, word: str
) -> None:
    net = network()

    async def test() -> None:
        async with standing(tmp_path, net, body_kib=64) as gateway:
            refused = await gateway.ask("ann", code, **body)
            assert word in refused["error"]["message"]

    runs(test)
    assert not net.servers["a"].asked + net.servers["b"].asked


def test_keys_and_routes(tmp_path: Path) -> None:
    async def test() -> None:
        async with standing(tmp_path, network()) as gateway:
            client = gateway.client
            body = {"model": "mine", "messages": ASKED, "user": "ann"}
            for headers in ({}, OPERATOR, {"authorization": "Basic client-key"}):
                for path in ("/v1/chat/completions", "/v1/feedback", "/v1/forget"):
                    assert (await client.post(path, json=body, headers=headers)).status_code == 401
            for headers in ({}, CLIENT):
                assert (await client.get("/operator", headers=headers)).status_code == 401
                assert (await client.get("/operator/state", headers=headers)).status_code == 401
                put = await client.put("/operator/arms", json={}, headers=headers)
                assert put.status_code == 401
            # a browser sends a password by itself: it opens the page and changes nothing
            password = httpx.BasicAuth("x", KEYS.operator)
            assert (await client.get("/operator", auth=password)).status_code == 200
            put = await client.put("/operator/arms", json={}, auth=password)
            assert put.status_code == 401
            nameless = await client.post(
                "/v1/chat/completions", json={"model": "mine", "messages": ASKED}, headers=CLIENT
            )
            assert nameless.status_code == 400 and "x-user" in nameless.text
            listed = (await client.get("/v1/models", headers=CLIENT)).json()
            assert [model["id"] for model in listed["data"]] == ["mine"]
            assert (await client.get("/docs")).status_code == 404
            assert (await client.get("/health")).json() == {"status": "ok"}

    runs(test)


def test_too_many_at_once_are_told_to_wait(tmp_path: Path) -> None:
    net = network()
    for server in net.servers.values():
        server.slow_s = 0.3

    async def test() -> None:
        async with standing(tmp_path, net, at_once=2) as gateway:
            headers = {**CLIENT, "x-user": "ann"}
            body = {"model": "mine", "messages": ASKED}
            asked = [
                gateway.client.post("/v1/chat/completions", json=body, headers=headers)
                for _ in range(4)
            ]
            codes = sorted(answer.status_code for answer in await asyncio.gather(*asked))
            assert codes == [200, 200, 503, 503]
            await gateway.ask("ann")  # and afterwards there is room again

    runs(test)


def test_an_arm_s_key_goes_to_its_server_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARM_KEY", "key-of-a")
    net = network()
    net.servers["a"].token = "key-of-a"
    arms = {"left": ArmConfig(url="http://a", model="model-a", token_env="ARM_KEY")}

    async def test() -> None:
        async with standing(tmp_path, net, arms=arms) as gateway:
            await gateway.ask("ann")

    runs(test)
    assert len(net.servers["a"].asked) == 1


def test_the_page_shows_texts_as_texts(tmp_path: Path) -> None:
    arms = {"<script>x</script>": ArmConfig(url="http://a", model="model-a")}

    async def test() -> None:
        async with standing(tmp_path, network(), arms=arms) as gateway:
            answer = await gateway.client.get("/operator", headers=OPERATOR)
            assert "<script" not in answer.text and "&lt;script&gt;" in answer.text
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'") and "script-src" not in policy
            assert "http://" not in answer.text.replace("http://a", "")
            assert "src=" not in answer.text and "href=" not in answer.text

    runs(test)


def test_the_key_is_its_user_s_alone(tmp_path: Path) -> None:
    key = load_key(tmp_path / "gateway")
    path = tmp_path / "gateway" / "key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and load_key(path.parent) == key
    path.chmod(0o640)
    with pytest.raises(UserError, match="chmod 600"):
        load_key(path.parent)
    path.chmod(0o600)
    path.write_text("short")
    with pytest.raises(UserError, match="no key"):
        load_key(path.parent)
