"""Weights in real vLLM servers: what they hold after updates by each way, what checksums name, and
what is left of a server whose update failed.
"""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from conf.model import ServerConfig, Transfer
from conf.schema import RolloutConfig
from rlhf.types import SyncError
from rollout.server import routes
from rollout.server.client import Request, Server, ServerFault
from rollout.server.fleet import Connection, OwnServers
from rollout.server.launch import recipe_of
from rollout.server.routes import GlooRoute, make_route
from rollout.server.stream import buckets
from rollout.server.updates import Model
from rollout.vllm_private import sent_checksums
from rollout.weights import SAMPLED, HubNames, Incoming
from tests.online.families import tiny_family

# a start takes 30 to 80 s
pytestmark = [pytest.mark.full, pytest.mark.vllm, pytest.mark.timeout(900)]

TOKEN = "a-token-of-this-test"
LIMIT_S = 60.0
# tokens of a prompt and its response: seconds of writing, during which weights can change
LONGEST = 2000
WAYS = [Transfer.file, Transfer.gloo]
FAMILIES = ["tied", "qwen3_moe", "gemma2"]


@dataclass
class Started:
    """A server of one model."""

    fleet: OwnServers
    server: Server
    model: Model
    directory: Path

    def trained(self, version: int) -> Any:
        """The model with other weights at each version."""
        model = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32)
        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.mul_(1 + 0.2 * noise)
        return model.eval()

    def incoming(self, tensors: dict[str, Tensor], version: int) -> Incoming:
        passing = self.model.names(tensors.items())
        return Incoming(passing, self.model.specs, None, version)

    def send(self, way: Transfer, model: Any, version: int, **options: Any) -> Incoming:
        """Give it the model's weights; returns what was sent."""
        route = make_route(way, self.model, [self.server.url], limit_s=LIMIT_S, **options)
        incoming = self.incoming(model.state_dict(), version)
        try:
            route.open([self.server])
            assert route.send(incoming, version) == []
        finally:
            route.close()
        return incoming

    def held(self, version: int) -> dict[str, str]:
        (checksums,) = self.server.call("rlhf_checksums", version=version)
        return dict(checksums)

    def restart(self) -> None:
        self.server.close()
        self.server = self.fleet.again(self.server.url)


def start(directory: Path, folder: Path, adapter_rank: int | None = None) -> Started:
    cfg = RolloutConfig(
        max_response_length=LONGEST - 8,
        max_num_seqs=8,
        kv_cache_gib=0.1,
        server=ServerConfig(restarts=5, threads=1),
    )
    recipe = recipe_of(
        cfg,
        str(directory),
        token=TOKEN,
        dtype=torch.float32,
        max_tokens=LONGEST,
        transfer=Transfer.file,
        adapter_rank=adapter_rank,
    )
    fleet = OwnServers(recipe, folder, Connection(TOKEN, 120.0, 8))
    config = AutoModelForCausalLM.from_pretrained(directory).config
    with torch.device("meta"):
        names = HubNames(AutoModelForCausalLM.from_config(config))
    (server,) = fleet.connect()
    return Started(fleet, server, Model(names, torch.float32), directory)


@pytest.fixture(scope="module")
def directory(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    def make(family: str) -> Path:
        options: dict[str, Any] = {"max_position_embeddings": LONGEST}
        if family == "tied":
            family = "llama"
            options["tie_word_embeddings"] = True
        return tiny_family(family, tiny_model(), tmp_path_factory.mktemp(family), **options)

    return make


@pytest.fixture(scope="module", params=FAMILIES)
def started(
    request: pytest.FixtureRequest,
    directory: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Started]:
    running = start(directory(request.param), tmp_path_factory.mktemp("servers"))
    yield running
    running.fleet.close()


one_family = pytest.mark.parametrize("started", ["tied"], indirect=True)


@torch.no_grad()
def expected(model: Any, ids: list[int]) -> Tensor:
    """log p(ids[i] | ids[:i]) in nats for i >= 1."""
    logits = model(torch.tensor([ids])).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def gap(server: Server, model: Any) -> float:
    """The largest difference to transformers on some tokens, nats."""
    worst = 0.0
    for length in (3, 30, 60):
        ids = [(7 * place + length) % 250 + 10 for place in range(length)]
        found = torch.tensor(server.logprobs(ids), dtype=torch.float64)
        worst = max(worst, float((found - expected(model, ids)).abs().max()))
    return worst


def different(sent: dict[str, str], held: dict[str, str]) -> set[str]:
    return {name.removesuffix(SAMPLED) for name, value in held.items() if sent[name] != value}


@pytest.mark.parametrize("way", WAYS)
def test_a_server_holds_what_was_sent(started: Started, way: Transfer) -> None:
    first = 10 * (1 + WAYS.index(way))
    for version in (first, first + 1):
        model = started.trained(version)
        before = gap(started.server, model)
        sent = started.send(way, model, version)
        after = gap(started.server, model)
        print(f"{started.model.names.family} by {way.value}: gap {before:.2g} -> {after:.2g}")
        assert before > 1e-2, "the weights were the same before"
        assert after <= 1e-4
        assert started.server.held_version() == str(version)
        held = started.held(version)
        assert len(held) > 3 and different(sent.checksums, held) == set()


@one_family
def test_checksums_name_the_tensors_that_were_altered(started: Started) -> None:
    """One that the server holds as it is, and two that it has packed, one of them in a joint
    matrix.
    """
    names = {
        "model.layers.1.input_layernorm.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    }
    model = started.trained(40)
    sent = started.incoming(model.state_dict(), 40)
    sent.finish(40)
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).view(-1)[::7].mul_(1.01)
    started.send(Transfer.file, model, 40)
    assert different(sent.checksums, started.held(40)) == names


def write(server: Server, seed: int) -> tuple[list[int], Any]:
    prompt = [20 + seed, 30, 40]
    params = {
        "temperature": 1.0,
        "seed": seed,
        "max_tokens": LONGEST - 8,
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
    }
    return prompt, server.write(Request(prompt, params))


@one_family
def test_each_token_of_a_response_in_flight_is_its_versions(started: Started) -> None:
    """The caches of requests that wait for an update are computed again: every token's logprob is
    that of a forward pass of the version that wrote it.
    """
    models = {str(version): started.trained(version) for version in (50, 51)}
    started.send(Transfer.file, models["50"], 50)
    route = make_route(
        Transfer.file, started.model, [started.server.url], limit_s=LIMIT_S, in_flight=True
    )
    route.open([started.server])
    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(write, started.server, seed) for seed in range(4)]
        time.sleep(0.3)
        assert not any(future.done() for future in running), "the responses are too short"
        assert route.send(started.incoming(models["51"].state_dict(), 51), 51) == []
        responses = [future.result() for future in running]
    route.close()
    for prompt, written in responses:
        assert set(written.versions) == {"50", "51"}
        assert written.versions == sorted(written.versions)
        ids = [*prompt, *written.token_ids]
        by_version = {
            label: expected(model, ids)[len(prompt) - 1 :] for label, model in models.items()
        }
        for place, (label, found) in enumerate(
            zip(written.versions, written.logprobs, strict=True)
        ):
            assert abs(found - float(by_version[label][place])) <= 1e-4, (place, label)


@one_family
def test_no_route_answers_without_the_token(started: Started) -> None:
    url = started.server.url
    for route in ("/collective_rpc", "/pause", "/update_weights", "/inference/v1/generate"):
        assert httpx.post(url + route, json={}).status_code == 401
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert httpx.get(f"{url}/health").status_code == 200


def never_writes_again(started: Started) -> None:
    """Not even when someone resumes it: the first request ends it."""
    httpx.post(
        f"{started.server.url}/resume", headers={"authorization": f"Bearer {TOKEN}"}, timeout=30
    )
    with pytest.raises(ServerFault):
        write(started.server, 1)


@one_family
@pytest.mark.parametrize("how", ["missing", "shape"])
def test_weights_that_do_not_fit_leave_a_server_as_it_is_by_file(
    started: Started, how: str
) -> None:
    model = started.trained(60)
    started.send(Transfer.file, model, 60)
    tensors, name = model.state_dict(), "model.layers.1.self_attn.o_proj.weight"
    if how == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:-1]
    route = make_route(Transfer.file, started.model, [started.server.url], limit_s=LIMIT_S)
    route.open([started.server])
    with pytest.raises(SyncError, match=rf"weight sync 61: .*{name}"):
        route.send(started.incoming(tensors, 61), 61)
    route.close()
    assert gap(started.server, model) <= 1e-4 and started.server.held_version() == "60"


@one_family
def test_weights_that_do_not_fit_end_a_server_by_gloo(started: Started) -> None:
    tensors, name = started.trained(70).state_dict(), "model.layers.1.self_attn.o_proj.weight"
    del tensors[name]
    route = make_route(Transfer.gloo, started.model, [started.server.url], limit_s=LIMIT_S)
    route.open([started.server])
    with pytest.raises(SyncError, match=rf"weight sync 70: .*{name}"):
        route.send(started.incoming(tensors, 70), 70)
    route.close()
    never_writes_again(started)
    started.restart()
    model = started.trained(71)
    started.send(Transfer.gloo, model, 71)
    assert gap(started.server, model) <= 1e-4


@one_family
def test_an_update_that_is_cut_in_the_middle_ends_a_server(
    started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the trainer dies or the network fails."""
    # several buckets, so that some layers are new by then
    monkeypatch.setattr(routes, "buckets", partial(buckets, limit=20_000))
    route = make_route(Transfer.gloo, started.model, [started.server.url], limit_s=LIMIT_S)
    assert isinstance(route, GlooRoute)
    route.open([started.server])
    tensors = list(started.trained(80).state_dict().items())

    def cut() -> Iterator[tuple[str, Tensor]]:
        for place, item in enumerate(tensors):
            if place == len(tensors) // 2:
                route._groups[started.server.url].close()
            yield item

    begun = time.monotonic()
    (fault,) = route.send(Incoming(cut(), started.model.specs, None, 80), 80)
    assert fault.url == started.server.url
    assert time.monotonic() - begun < LIMIT_S / 2, "it was found before the limit"
    route.close()
    never_writes_again(started)
    started.restart()
    assert started.server.held_version() == "default"


def adapter(directory: Path, seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A LoRA adapter of rank 2 in PEFT's two files; its tensors and its configuration."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
            width = 96 if module == "mlp.down_proj" else 64
            stem = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(2, width, generator=generator)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(64, 2, generator=generator)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "base_model_name_or_path": ""}
    config["target_modules"] = ["q_proj", "v_proj", "down_proj"]
    directory.mkdir()
    save_file(tensors, str(directory / "adapter_model.safetensors"))
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return tensors, config


def test_checksums_of_an_adapter_are_those_of_the_latest(
    directory: Callable[[str], Path], tmp_path: Path
) -> None:
    started = start(directory("tied"), tmp_path / "servers", adapter_rank=2)
    try:
        route = make_route(Transfer.file, started.model, [started.server.url], limit_s=LIMIT_S)
        route.open([started.server])
        seen = []
        for version in (1, 2, 3):
            folder = tmp_path / f"policy-{version}"
            tensors, config = adapter(folder, version)
            body = {"lora_name": folder.name, "lora_path": str(folder)}
            started.server.post("/v1/load_lora_adapter", body)
            shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
            (held,) = started.server.call("rlhf_checksums", version=version, lora=shapes)
            sent = sent_checksums(tensors, config, torch.float32)
            assert len(held) == len(tensors) and held == sent
            seen.append(held)
        assert seen[0] != seen[1] != seen[2]
    finally:
        started.fleet.close()
