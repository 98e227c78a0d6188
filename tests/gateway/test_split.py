"""Who talks to which arm: sticky, in the shares that are asked for, also while arms change."""

import asyncio
import math
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from conf.serving import ArmConfig
from rlhf.gateway import keeping
from rlhf.gateway.arms import Arms, made
from rlhf.gateway.records import Arm
from rlhf.gateway.split import arm_of, load_key, pseudonym
from rlhf.gateway.store import Store
from rlhf.registry.gate import Gate
from rlhf.registry.store import Registry
from tests.gateway.standing import CLIENT, OPERATOR, Network, Server, network, standing
from tests.gateway.test_proxy import runs
from tests.registry.made import WHY, model, registered

USERS = 10_000


def within(count: int, share: float, of: int) -> bool:
    """Four standard deviations of a binomial: one split in 16,000 is further away."""
    return abs(count - share * of) <= 4 * math.sqrt(of * share * (1 - share))


@pytest.fixture
def key(tmp_path: Path) -> bytes:
    return bytes(range(32))


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0}, {"a": 9.0, "b": 1.0, "c": 2.0}])
def test_users_split_in_the_shares_asked_for(key: bytes, weights: dict[str, float]) -> None:
    names = [pseudonym(key, f"user {i}") for i in range(USERS)]
    assert len(set(names)) == USERS
    first = {name: arm_of(key, name, weights) for name in names}
    backwards = dict(reversed(weights.items()))
    assert first == {name: arm_of(key, name, backwards) for name in names}
    counts = Counter(first.values())
    for arm, weight in weights.items():
        assert within(counts[arm], weight / sum(weights.values()), USERS), counts
    other = Counter(arm_of(bytes(32), name, weights) == first[name] for name in names)
    assert other[False] > USERS / 10, "another key splits otherwise"


def test_a_name_tells_nothing_without_the_key(key: bytes) -> None:
    """Neighbouring names are in arms that have nothing to do with each other."""
    arms = [arm_of(key, pseudonym(key, str(i)), {"a": 1, "b": 1}) for i in range(USERS)]
    same = sum(arms[i] == arms[i + 1] for i in range(USERS - 1))
    assert within(same, 0.5, USERS - 1)


def pair(a: float = 1.0, b: float = 1.0) -> dict[str, Arm]:
    fields: dict[str, dict[str, Any]] = {
        "left": {"url": "http://a", "model": "model-a", "weight": a},
        "right": {"url": "http://b", "model": "model-b", "weight": b},
    }
    return {name: made(name, each) for name, each in fields.items()}


def test_of_10_000_users_none_sees_both_arms(tmp_path: Path, key: bytes) -> None:
    """Three requests each, the weights turned round after the first, and a restart after the
    second.
    """
    names = [pseudonym(key, f"user {i}") for i in range(USERS)]

    async def asked(arms: Arms) -> list[str]:
        found = await asyncio.gather(*(arms.of(key, name) for name in names))
        return [arm.name for arm in found]

    async def test() -> None:
        async with httpx.AsyncClient(transport=network()) as client:
            store = Store(tmp_path / "store")
            arms = Arms(pair(3, 1), store, tmp_path / "none", client)
            first = await asked(arms)
            await arms.change(pair(1, 9))
            second = await asked(arms)
            new = [(await arms.of(key, pseudonym(key, f"late {i}"))).name for i in range(500)]
            store.close()
            store = Store(tmp_path / "store")
            third = await asked(Arms(pair(0, 1), store, tmp_path / "none", client))
            store.close()
            both = sum(len(set(seen)) > 1 for seen in zip(first, second, third, strict=True))
            assert both == 0
            assert within(first.count("right"), 0.25, USERS)
            assert within(new.count("right"), 0.9, 500)

    runs(test)


async def until_full(arms: Arms, key: bytes) -> int:
    """The first user whose assignment can't be written."""
    for number in range(1000):
        try:
            await arms.of(key, pseudonym(key, str(number)))
        except sqlite3.Error:
            return number
    raise AssertionError("the disk is not full")


def test_nobody_is_answered_before_the_assignment_is_kept(tmp_path: Path, key: bytes) -> None:
    """A full disk: an error, and no lasting one."""

    async def test() -> None:
        async with httpx.AsyncClient(transport=network()) as client:
            store = Store(tmp_path / "store")
            arms = Arms(pair(), store, tmp_path / "none", client)
            most = "PRAGMA max_page_count"
            pages = store.submit(lambda db: db.execute(most).fetchone()[0]).result()
            store.submit(lambda db: db.execute(f"{most} = 1").fetchone()).result()
            number = await until_full(arms, key)
            store.submit(lambda db: db.execute(f"{most} = {pages}").fetchone()).result()
            last = pseudonym(key, str(number))
            name = (await arms.of(key, last)).name
            assert store.read(keeping.pins)[last] == name
            store.close()

    runs(test)


def test_an_arm_that_is_taken_away_moves_its_users_and_begins_a_new_test(
    tmp_path: Path, key: bytes
) -> None:
    async def test() -> None:
        async with standing(tmp_path, network()) as gateway:
            for number in range(12):
                await gateway.ask(f"user {number}")
            before = await gateway.state()
            wanted = {"right": {"url": "http://b", "model": "model-b", "weight": 1}}
            put = await gateway.client.put("/operator/arms", json=wanted, headers=OPERATOR)
            assert put.status_code == 200, put.text
            for number in range(12):
                await gateway.ask(f"user {number}")
            after = await gateway.state()
            assert after["epoch"] == before["epoch"] + 1
            assert after["figures"]["assigned"] == {"right": 12}
            # only weights: the same test goes on
            wanted["right"]["weight"] = 5
            await gateway.client.put("/operator/arms", json=wanted, headers=OPERATOR)
            assert (await gateway.state())["epoch"] == after["epoch"]

    runs(test)


@pytest.mark.parametrize(
    ("wanted", "word"),
    [
        ({}, "arms"),
        ({"x": {"url": "http://a"}}, "model"),
        ({"x": {"url": "http://a", "model": "model-a", "wait": 1}}, "wait"),
        ({"x": {"url": "http://a", "model": "other", "weight": 1}}, "no model 'other'"),
        ({"x": {"url": "http://a", "model": "model-a", "weight": 0}}, "weight"),
        ({"x": {"url": "http://a", "model": "m-{version}", "weight": 1}}, "version"),
        ({"x": {"url": "ftp://a", "model": "model-a", "weight": 1}}, "url"),
        ([], "JSON object"),
    ],
)
def test_arms_that_cannot_be_used_change_nothing(tmp_path: Path, wanted: Any, word: str) -> None:
    async def test() -> None:
        async with standing(tmp_path, network()) as gateway:
            before = (await gateway.state())["arms"]
            put = await gateway.client.put("/operator/arms", json=wanted, headers=OPERATOR)
            assert put.status_code == 400 and word in put.text
            assert (await gateway.state())["arms"] == before

    runs(test)


# ---- versions ----


def registry_of(folder: Path) -> Registry:
    """A registry in which the first of two versions is in production."""
    registry = Registry(folder / "registry.sqlite", create=True)
    for number in (1, 2):
        registered(registry, model(folder / str(number), bytes([number])))
    registry.promote(registry.version("mine", "1"), "production", WHY, Gate())
    return registry


def test_a_rollback_under_load_fails_no_request(tmp_path: Path) -> None:
    """Two promotions and two rollbacks while clients ask without a pause: every request is
    answered, by the version before or after, and the newest is served at the end.
    """
    registry = registry_of(tmp_path)
    net = Network(a=Server("A", ["mine-1", "mine-2"], slow_s=0.002))
    arms = {"only": ArmConfig(url="http://a", model="mine-{version}", version="mine@production")}
    done = asyncio.Event()
    codes: Counter[int] = Counter()

    async def client(gateway: Any, number: int) -> None:
        count = 0
        while not done.is_set():
            count += 1
            body = {"model": "mine", "user": f"u{number}", "stream": bool(count % 2)}
            body["messages"] = [{"role": "user", "content": "?"}]
            got = await gateway.client.post("/v1/chat/completions", json=body, headers=CLIENT)
            whole = "[DONE]" in got.text if body["stream"] else "choices" in got.json()
            codes[got.status_code if whole else 0] += 1

    async def served(gateway: Any, version: str) -> None:
        for _ in range(200):
            if (await gateway.state())["arms"]["only"]["version"] == version:
                return
            await asyncio.sleep(0.02)
        raise AssertionError(version)

    async def test() -> None:
        async with standing(tmp_path, net, arms=arms) as gateway:
            clients = [asyncio.create_task(client(gateway, number)) for number in range(8)]
            await served(gateway, "mine@1")
            for _ in range(2):
                registry.promote(registry.version("mine", "2"), "production", WHY, Gate())
                await served(gateway, "mine@2")
                to = registry.target("mine", "production")
                registry.rollback("mine", "production", WHY, to)
                await served(gateway, "mine@1")
            done.set()
            await asyncio.gather(*clients)

    runs(test)
    assert set(codes) == {200} and codes[200] > 50, codes
    asked = [body["model"] for body in net.servers["a"].asked]
    assert {"mine-1", "mine-2"} == set(asked) and asked[-1] == "mine-1"


def test_a_version_that_is_not_served_yet_waits(tmp_path: Path) -> None:
    registry = registry_of(tmp_path)
    net = Network(a=Server("A", ["mine-1"]))
    arms = {"only": ArmConfig(url="http://a", model="mine-{version}", version="mine@production")}

    async def test() -> None:
        async with standing(tmp_path, net, arms=arms) as gateway:
            await gateway.ask("ann")
            registry.promote(registry.version("mine", "2"), "production", WHY, Gate())
            await asyncio.sleep(0.2)
            await gateway.ask("ann")
            state = await gateway.state()
            assert state["arms"]["only"]["version"] == "mine@1"
            told = [text for _, text in state["figures"]["events"]]
            assert any("no model 'mine-2'" in text for text in told) and len(told) == 1
            net.servers["a"].models.append("mine-2")
            await asyncio.sleep(0.2)
            await gateway.ask("ann")
            assert (await gateway.state())["arms"]["only"]["version"] == "mine@2"

    runs(test)
    assert [body["model"] for body in net.servers["a"].asked] == ["mine-1", "mine-1", "mine-2"]


def test_the_key_of_a_gateway_is_kept(tmp_path: Path) -> None:
    """A user's arm is the same after a restart, without anything kept of the user."""
    key = load_key(tmp_path)
    weights = {"a": 1.0, "b": 1.0}
    names = [pseudonym(key, str(i)) for i in range(50)]
    again = load_key(tmp_path)
    assert [arm_of(again, n, weights) for n in names] == [arm_of(key, n, weights) for n in names]
