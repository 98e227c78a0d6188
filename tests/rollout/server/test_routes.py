"""Files and gloo groups between a trainer and stand-ins for servers, which take the weights as a
worker does but keep them in a dictionary. Real servers: test_transfer.py.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import TCPStore
from transformers import LlamaConfig, LlamaForCausalLM

from conf.model import Transfer
from conf.schema import RolloutConfig
from rlhf.types import SyncError, UserError
from rollout.server import routes
from rollout.server.client import Server, ServerFault
from rollout.server.launch import recipe_of
from rollout.server.routes import Route, make_route, resolve_transfer
from rollout.server.stream import Group, Received, read_whole
from rollout.server.updates import Model
from rollout.server.weight_file import read_tensors
from rollout.weights import HubNames, Incoming

LIMIT_S = 20.0
WAYS = [Transfer.file, Transfer.gloo]


class StandIn(Server):
    """What a server does, in this process."""

    def __init__(self, number: int = 1, has_head: bool = True) -> None:
        super().__init__(f"http://127.0.0.1:{number}", None)
        self.has_head = has_head
        self.held: dict[str, Tensor] = {}
        self.steps: list[str] = []  # of an update
        self.label = "default"
        self.condemned: str | None = None
        self.group: Group | None = None
        self.fails_at: dict[str, Exception] = {}
        self.hangs_at: dict[str, threading.Event] = {}

    def post(
        self, route: str, body: Any = None, *, limit_s: float | None = None
    ) -> dict[str, Any] | None:
        if route == "/init_weight_transfer_engine":
            self._join(body["init_info"])
            return None
        self.steps.append(route)
        self._misbehave(route, limit_s)
        if route == "/update_weight_version":
            self.label = body["new_version"]
        return None

    def get(self, route: str, *, limit_s: float | None = None) -> dict[str, Any]:
        assert route == "/get_world_size"
        return {"world_size": 1}

    def call(self, method: str, *, limit_s: float | None = None, **kwargs: Any) -> list[Any]:
        if method == "rlhf_prepare":
            self.prepared = kwargs["specs"]
            return [{"has_head": self.has_head}]
        if method == "rlhf_condemn":
            self.condemned = kwargs["reason"]
            return [None]
        assert method == "rlhf_update"
        self.steps.append(method)
        self._misbehave(method, limit_s)
        return [self._update(**kwargs["info"])]

    def _misbehave(self, step: str, limit_s: float | None) -> None:
        if step in self.fails_at:
            raise self.fails_at[step]
        if step in self.hangs_at and not self.hangs_at[step].wait(limit_s):
            raise ServerFault(self.url, f"no answer to {step}")

    def _join(self, info: dict[str, Any]) -> None:
        self.info = info
        if "host" in info:
            store = TCPStore(info["host"], info["port"], is_master=False)
            self.group = Group(store, 1, info["size"], address="127.0.0.1", limit_s=info["limit_s"])

    def _update(self, path: str | None = None) -> dict[str, str] | None:
        try:
            if path is not None:
                self._load(read_tensors(path))
            else:
                assert self.group is not None
                read_whole(Received(self.group), self._load)
        except KeyError as error:
            return {"refused": f"KeyError: {error}"}
        except RuntimeError as error:
            raise ServerFault(self.url, str(error)) from error
        return None

    def _load(self, tensors: Any) -> None:
        for name, tensor in tensors:
            if name in self.fails_at:
                raise self.fails_at[name]
            self.held[name] = tensor.clone()


UPDATE = ["rlhf_update", "/update_weight_version", "/resume"]
DRAINED = ["/pause?clear_cache=true&mode=wait", *UPDATE]
FROZEN = ["/pause?clear_cache=true&mode=keep", *UPDATE]


@pytest.fixture(scope="module")
def model() -> Model:
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        names = HubNames(LlamaForCausalLM(config))
    return Model(names, torch.bfloat16)


def weights(model: Model, version: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(version)
    return {
        name: torch.randn(spec.shape, generator=generator) for name, spec in model.specs.items()
    }


def incoming(model: Model, tensors: dict[str, Tensor], version: int = 0) -> Incoming:
    return Incoming(tensors.items(), model.specs, None, version)


def holds(server: StandIn, model: Model, version: int) -> None:
    expected = weights(model, version)
    assert server.held.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(server.held[name], tensor.bfloat16()), name
    assert server.label == str(version) and server.condemned is None


@pytest.fixture
def opened(model: Model) -> Iterator[Callable[..., Route]]:
    """opened(way, servers) -> a route to them."""
    made: list[tuple[Route, tuple[StandIn, ...]]] = []

    def open_route(
        way: Transfer, *servers: StandIn, limit_s: float = LIMIT_S, **more: Any
    ) -> Route:
        urls = [server.url for server in servers]
        route = make_route(way, model, urls, limit_s=limit_s, **more)
        made.append((route, servers))
        route.open(servers)
        return route

    yield open_route
    for route, servers in made:
        route.close()
        for server in servers:
            if server.group is not None:
                server.group.close()


@pytest.fixture
def standing_in() -> Iterator[Callable[[int], StandIn]]:
    """standing_in(number) -> a server, which leaves its group at the end."""
    made: list[StandIn] = []

    def make(number: int) -> StandIn:
        made.append(StandIn(number))
        return made[-1]

    yield make
    for server in made:
        if server.group is not None:
            server.group.close()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [1, 3])
def test_all_servers_hold_each_version(
    way: Transfer, count: int, model: Model, opened: Callable[..., Route]
) -> None:
    servers = [StandIn(number) for number in range(1, count + 1)]
    route = opened(way, *servers)
    for version in (1, 2):
        assert route.send(incoming(model, weights(model, version)), version) == []
        for server in servers:
            holds(server, model, version)
            assert server.steps == DRAINED * version
            assert server.info["copies"] == ["lm_head.weight"]
            assert server.prepared["model.norm.weight"] == ["bfloat16", [8]]


@pytest.mark.parametrize("way", WAYS)
def test_requests_in_flight_are_kept_where_that_is_asked_for(
    way: Transfer, model: Model, opened: Callable[..., Route]
) -> None:
    server = StandIn()
    opened(way, server, in_flight=True).send(incoming(model, weights(model, 1)), 1)
    assert server.steps == FROZEN


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_does_not_send_takes_every_tensor(
    way: Transfer, model: Model, opened: Callable[..., Route]
) -> None:
    server = StandIn()
    route = opened(way, server, sender=False)
    source = incoming(model, weights(model, 1))
    assert route.send(source, 1) == []
    assert len(source.checksums) > 0 and next(iter(source), None) is None
    assert not server.steps and not hasattr(server, "prepared")


def broken(model: Model, how: str) -> tuple[dict[str, Tensor], str]:
    """Weights with one fault, and the tensor that has it."""
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = weights(model, 2)
    if how == "missing":
        del tensors[name]
    elif how == "shape":
        tensors[name] = tensors[name].t()
    else:
        name = "model.layers.7.unheard.weight"
        tensors[name] = torch.zeros(2)
    return tensors, name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", ["missing", "shape", "unknown"])
def test_weights_that_do_not_fit_never_write(
    way: Transfer, how: str, model: Model, opened: Callable[..., Route]
) -> None:
    server = StandIn()
    route = opened(way, server)
    route.send(incoming(model, weights(model, 1)), 1)
    tensors, name = broken(model, how)
    with pytest.raises(SyncError, match=rf"weight sync 2.*{name}"):
        route.send(incoming(model, tensors), 2)
    if way is Transfer.file:  # they are found before it sees them
        holds(server, model, 1)
        assert server.steps == DRAINED
    else:
        assert server.condemned is not None and name in server.condemned
        assert server.steps == DRAINED + DRAINED[:2]
        assert server.label == "1"


@pytest.mark.parametrize("way", WAYS)
def test_the_trainers_own_failure_is_not_a_servers(
    way: Transfer, model: Model, opened: Callable[..., Route]
) -> None:
    server = StandIn()
    route = opened(way, server)

    def gathering() -> Iterator[tuple[str, Tensor]]:
        yield from list(weights(model, 1).items())[:3]
        raise OSError("the gathering failed")

    with pytest.raises(OSError, match="the gathering failed"):
        route.send(Incoming(gathering(), model.specs), 1)
    assert "/resume" not in server.steps
    assert (server.condemned is None) is (way is Transfer.file)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", DRAINED)
def test_a_server_that_fails_is_named_and_the_others_go_on(
    way: Transfer, step: str, model: Model, opened: Callable[..., Route]
) -> None:
    servers = [StandIn(1), StandIn(2), StandIn(3)]
    bad = servers[1]
    route = opened(way, *servers)
    bad.fails_at[step] = ServerFault(bad.url, "killed")
    (fault,) = route.send(incoming(model, weights(model, 1)), 1)
    assert fault.url == bad.url and "killed" in fault.cause
    assert bad.condemned is not None
    for server in (servers[0], servers[2]):
        holds(server, model, 1)
    assert route.send(incoming(model, weights(model, 2)), 2) == []
    for server in (servers[0], servers[2]):
        holds(server, model, 2)
    assert bad.steps == DRAINED[: DRAINED.index(step) + 1], "it got no more weights"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", ["/pause?clear_cache=true&mode=wait", "rlhf_update", "/resume"])
def test_a_server_that_hangs_is_left_at_the_limit(
    way: Transfer, step: str, model: Model, opened: Callable[..., Route]
) -> None:
    hung, other = StandIn(1), StandIn(2)
    route = opened(way, hung, other, limit_s=1.0)
    hung.hangs_at[step] = threading.Event()
    start = time.monotonic()
    (fault,) = route.send(incoming(model, weights(model, 1)), 1)
    assert 0.9 < time.monotonic() - start < 6.0
    assert fault.url == hung.url and hung.condemned is not None
    if way is Transfer.file:
        holds(other, model, 1)
    hung.hangs_at[step].set()
    time.sleep(0.2)
    assert hung.steps[-1] == step, "it went on although it counts as lost"


@pytest.mark.parametrize("way", WAYS)
def test_weights_that_vllm_does_not_take_stop_the_run(
    way: Transfer, model: Model, opened: Callable[..., Route]
) -> None:
    servers = [StandIn(1), StandIn(2)]
    route = opened(way, *servers)
    taken = []

    def gathering() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights(model, 1).items():
            taken.append(name)
            yield name, tensor

    for server in servers:
        server.fails_at["model.norm.weight"] = KeyError("no layer of that name")
    with pytest.raises(SyncError, match=r"weight sync 1.*llama.*no layer of that name.*rollout=hf"):
        route.send(Incoming(gathering(), model.specs), 1)
    assert taken == list(model.specs), "other ranks wait for this one"
    for server in servers:
        assert server.condemned is not None and "/resume" not in server.steps


@pytest.mark.parametrize("way", WAYS)
def test_a_restarted_server_gets_the_weights_at_once(
    way: Transfer, model: Model, opened: Callable[..., Route], standing_in: Callable[..., StandIn]
) -> None:
    first = standing_in(1)
    route = opened(way, first)
    assert route.rejoin(standing_in(2), "default") is False, "there are no weights yet"
    route.send(incoming(model, weights(model, 4)), 4)
    first.steps.clear()
    late = standing_in(3)
    assert route.rejoin(late, "default") is True
    holds(late, model, 4)
    assert late.steps == DRAINED and first.steps == [], "the others write on"
    dead = standing_in(5)
    dead.fails_at["rlhf_update"] = ServerFault(dead.url, "killed again")
    with pytest.raises(ServerFault, match="killed again"):
        route.rejoin(dead, "default")
    with pytest.raises(SyncError):
        route.send(incoming(model, broken(model, "missing")[0]), 5)
    assert route.rejoin(standing_in(4), "default") is False, "what is kept is of no version"


@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_came_back_gets_the_next_weights(
    way: Transfer, model: Model, opened: Callable[..., Route], standing_in: Callable[..., StandIn]
) -> None:
    """One that was out of reach for a while and has missed nothing is sent nothing before."""
    first, again = standing_in(1), standing_in(1)
    route = opened(way, first)
    route.send(incoming(model, weights(model, 1)), 1)
    route.leave(first)
    assert route.rejoin(again, "1") is True
    assert again.steps == []
    assert route.send(incoming(model, weights(model, 2)), 2) == []
    holds(again, model, 2)
    holds(first, model, 1)
    route.leave(again)
    late = standing_in(1)
    assert route.rejoin(late, "1") is True
    holds(late, model, 2)


def test_a_server_that_does_not_join_is_named(model: Model, opened: Callable[..., Route]) -> None:
    class Refusing(StandIn):
        def _join(self, info: dict[str, Any]) -> None:
            raise ServerFault(self.url, "/init_weight_transfer_engine answered 500")

    class Absent(StandIn):
        def _join(self, info: dict[str, Any]) -> None:
            return None

    start = time.monotonic()
    with pytest.raises(ServerFault, match="answered 500"):
        opened(Transfer.gloo, Refusing())
    assert time.monotonic() - start < 5.0, "it did not wait for the limit"
    with pytest.raises(ServerFault, match=r"127\.0\.0\.1:9: .*gloo"):
        opened(Transfer.gloo, Absent(9), limit_s=1.0)


def test_no_room_for_the_file(
    model: Model, opened: Callable[..., Route], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(routes, "memory_folder", lambda: tmp_path / "file")
    (tmp_path / "file").write_text("no folder")
    server = StandIn()
    route = opened(Transfer.file, server)
    source = incoming(model, weights(model, 1))
    with pytest.raises(UserError, match=r"rollout\.server\.transfer=file.*gloo"):
        route.send(source, 1)
    assert next(iter(source), None) is None and not server.steps


@pytest.mark.parametrize(
    ("urls", "cuda", "shared", "expected"),
    [
        (["http://127.0.0.1:1", "http://localhost:2"], False, False, Transfer.file),
        (["http://127.0.0.1:1", "http://10.0.0.7:2"], False, False, Transfer.gloo),
        (["http://127.0.0.1:1"], True, False, Transfer.nccl),
        (["http://127.0.0.1:1"], True, True, Transfer.ipc),
    ],
)
def test_auto(urls: list[str], cuda: bool, shared: bool, expected: Transfer) -> None:
    found = resolve_transfer(Transfer.auto, urls, cuda=cuda, shared_device=shared)
    assert found is expected
    for chosen in (Transfer.file, Transfer.gloo):
        assert resolve_transfer(chosen, urls, cuda=cuda) is chosen


@pytest.mark.parametrize(
    ("transfer", "engine", "unpickles"),
    [
        (Transfer.file, "rlhf", False),
        (Transfer.gloo, "rlhf", False),
        (Transfer.nccl, "nccl", False),
        (Transfer.ipc, "ipc", True),
    ],
)
def test_a_server_starts_with_the_engine_of_its_way(
    transfer: Transfer, engine: str, unpickles: bool
) -> None:
    recipe = recipe_of(
        RolloutConfig(), "m", token="t", dtype=torch.float32, max_tokens=8, transfer=transfer
    )
    command = recipe.command("127.0.0.1", 1)
    given = command[command.index("--weight-transfer-config") + 1]
    assert json.loads(given) == {"backend": engine}
    assert ("VLLM_ALLOW_INSECURE_SERIALIZATION" in recipe.environment(0)) is unpickles


def test_a_file_for_other_machines_needs_a_folder_that_they_see(
    model: Model, tmp_path: Path
) -> None:
    urls = ["http://10.0.0.7:2"]
    with pytest.raises(UserError, match=r"rollout\.server\.transfer=file.*gloo"):
        make_route(Transfer.file, model, urls, limit_s=1.0)
    route = make_route(Transfer.file, model, urls, limit_s=1.0, shared_folder=tmp_path)
    route.open([])
    assert route.send(incoming(model, weights(model, 1)), 1) == []
    assert len(list(tmp_path.glob("*/model.safetensors"))) == 1
    route.close()
    assert list(tmp_path.iterdir()) == []
