"""Several servers share the work of one run, and fail one by one: against fakes with vLLM's
routes.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from conf.choices import Carrier, RolloutBackend
from conf.model import ServerConfig
from conf.schema import RolloutConfig
from rlhf.checks.inputs import refuse_running_servers
from rlhf.cli.config import compose
from rlhf.process import distributed
from rlhf.types import AdapterWeights, FullWeights, Prompt, Rollout, SyncError, UserError
from rollout.server.checks import check_servers
from rollout.server.client import Request, Server, ServerFault
from rollout.server.generator import ServerGenerator
from rollout.weights import HubNames, weights_checksums
from tests.checking import check
from tests.rollout.server.fake_vllm import TOKEN, Fake, Running

VARIABLE = "TOKEN_OF_THE_TEST"
PROMPTS = [Prompt(id=str(i), text="", token_ids=(5, 6 + i, 7)) for i in range(6)]


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, TOKEN)


@pytest.fixture
def fakes() -> Iterator[Callable[..., list[Running]]]:
    started: list[Running] = []

    def start(count: int, **changes: Any) -> list[Running]:
        new = [Running(Fake(**changes)) for _ in range(count)]
        started.extend(new)
        return new

    yield start
    for running in started:
        running.stop()


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


Make = Callable[..., ServerGenerator]


@pytest.fixture
def make(model: Any, tiny_model: Callable[..., Path], tmp_path: Path) -> Iterator[Make]:
    made: list[ServerGenerator] = []

    def generator(
        servers: Sequence[Running], *, adapter_rank: int | None = None, **changes: Any
    ) -> ServerGenerator:
        server = ServerConfig(
            token_env=VARIABLE,
            request_limit_s=changes.pop("request_limit_s", 20.0),
            start_limit_s=changes.pop("start_limit_s", 20.0),
        )
        settings = RolloutConfig(
            backend=RolloutBackend.server,
            servers=[running.url for running in servers],
            server=server,
            max_response_length=10,
            max_num_seqs=8,
        )
        directory = tiny_model()
        made.append(
            ServerGenerator(
                str(directory),
                AutoTokenizer.from_pretrained(directory),
                dataclasses.replace(settings, **changes),
                max_tokens=40,
                names=HubNames(model),
                dtype=torch.float32,
                folder=tmp_path,
                adapter_rank=adapter_rank,
            )
        )
        return made[-1]

    yield generator
    for item in made:
        item.close()


def whole(model: Any) -> FullWeights:
    return FullWeights(model.state_dict().items())


def lora(value: float = 1.0) -> AdapterWeights:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format(half): torch.full((2, 8), value) for half in "AB"}
    tensors[name.format("B")] = tensors[name.format("B")].T.contiguous()
    return AdapterWeights(tensors, {"r": 2, "lora_alpha": 4, "peft_type": "LORA"})


def written(rollouts: Sequence[Any]) -> list[Any]:
    return [(r.prompt.id, r.token_ids, r.rollout_logprobs, r.finish_reason) for r in rollouts]


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def states(generator: ServerGenerator) -> list[str]:
    return [member.state.value for member in generator._service.pool.members]


# ---- who writes ----


def test_what_is_written_depends_on_the_seed_not_on_the_servers(fakes: Any, make: Make) -> None:
    one, several = make(fakes(1)), make(fakes(3, delay_s=0.02))
    first = one.generate(PROMPTS, n=3, seed=4)
    assert written(several.generate(PROMPTS, n=3, seed=4)) == written(first)
    assert [r.prompt.id for r in first] == [p.id for p in PROMPTS for _ in range(3)]
    assert written(one.generate(PROMPTS, n=3, seed=5)) != written(first)
    assert {r.version for r in first} == {0} and len({tuple(r.token_ids) for r in first}) == 18


def test_a_group_goes_to_one_server_and_groups_spread_by_load(fakes: Any, make: Make) -> None:
    servers = fakes(2, delay_s=0.05)
    make(servers).generate(PROMPTS, n=2, seed=0)
    prompts = [{tuple(body["token_ids"]) for body in s.fake.asked} for s in servers]
    assert not prompts[0] & prompts[1]
    assert [len(s.fake.asked) for s in servers] == [6, 6]


def test_a_slow_server_gets_less(fakes: Any, make: Make) -> None:
    slow, fast = fakes(1, delay_s=1.0)[0], fakes(1)[0]
    generator = make([slow, fast], max_num_seqs=2)
    many = [Prompt(id=str(i), text="", token_ids=(5, i)) for i in range(40)]
    generator.generate(many, seed=0)
    assert len(slow.fake.asked) <= 4 and len(fast.fake.asked) >= 36


def test_a_response_is_told_of_while_others_are_written(fakes: Any, make: Make) -> None:
    slow, fast = fakes(1, delay_s=1.0)[0], fakes(1)[0]
    generator = make([slow, fast])
    told: list[tuple[float, Rollout]] = []
    began = time.monotonic()
    generator.arrived = lambda rollout: told.append((time.monotonic() - began, rollout))
    rollouts = generator.generate(PROMPTS, n=2, seed=0)
    assert told[0][0] < 0.7 < told[-1][0]
    assert sorted(id(rollout) for _, rollout in told) == sorted(map(id, rollouts))


def test_sampling_is_the_engines_own(fakes: Any, make: Make) -> None:
    (server,) = fakes(1)
    generator = make([server], temperature=0.7, top_k=5, top_p=0.9)
    generator.generate(PROMPTS[:1], seed=1)
    generator.generate(PROMPTS[:1], greedy=True)
    drawn, greedy = (body["sampling_params"] for body in server.fake.asked)
    assert {name: drawn[name] for name in ("temperature", "top_k", "top_p", "max_tokens")} == {
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "max_tokens": 10,
    }
    assert drawn["ignore_eos"] and drawn["stop_token_ids"] and drawn["logprobs"] == 0
    assert greedy["temperature"] == 0.0 and "seed" not in greedy


def test_logprobs_of_each_server(fakes: Any, make: Make) -> None:
    generator = make(fakes(2))
    first, second = generator.logprobs_of_each([5, 6, 7, 9])
    assert first == second == generator.logprobs([5, 6, 7, 9])
    assert first == pytest.approx([-5.7038 - t / 1000 for t in (6, 7, 9)], abs=1e-4)


# ---- servers that fail ----


def break_off(running: Running) -> None:
    running.fake.delay_s = 0.1
    threading.Timer(0.05, running.stop).start()


def hang(running: Running) -> None:
    running.fake.hangs = True


def refuse(running: Running) -> None:
    running.fake.refused["/inference/v1/generate"] = 500


def other_tokens(answer: Any) -> Any:
    answer["choices"][0]["token_ids"][0] += 1
    return answer


def nan(answer: Any) -> Any:
    answer["choices"][0]["logprobs"]["content"][0]["logprob"] = -9999.0
    return answer


def aborted(answer: Any) -> Any:
    answer["choices"][0]["finish_reason"] = "abort"
    return answer


def no_spans(answer: Any) -> Any:
    answer["choices"][0]["weight_versions"] = None
    return answer


def answering(change: Callable[[Any], Any]) -> Callable[[Running], None]:
    def apply(running: Running) -> None:
        running.fake.change = change

    return apply


FAILURES: dict[str, Callable[[Running], None]] = {
    "dead": break_off,
    "hung": hang,
    "status 500": refuse,
    "no JSON": answering(lambda answer: "<html>"),
    "empty": answering(lambda answer: {"choices": []}),
    "other tokens": answering(other_tokens),
    "no number": answering(nan),
    "aborted": answering(aborted),
    "no versions": answering(no_spans),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_requests_of_a_server_that_fails_go_to_the_others(
    fakes: Any, make: Make, failure: str, caplog: pytest.LogCaptureFixture
) -> None:
    servers = fakes(2)
    generator = make(servers, request_limit_s=0.5, start_limit_s=0.3)
    expected = written(generator.generate(PROMPTS, n=2, seed=3))
    FAILURES[failure](servers[0])
    with caplog.at_level(logging.WARNING):
        assert written(generator.generate(PROMPTS, n=2, seed=3)) == expected
    assert servers[0].url in caplog.text
    assert states(generator)[1] == "serving"


def test_a_server_that_comes_back_writes_again(fakes: Any, make: Make) -> None:
    servers = fakes(2)
    generator = make(servers)
    expected = written(generator.generate(PROMPTS, seed=3))
    servers[0].stop()
    assert written(generator.generate(PROMPTS, seed=3)) == expected
    assert states(generator) == ["away", "serving"]
    servers[0].start()
    wait_for(lambda: states(generator) == ["serving", "serving"])
    servers[0].fake.asked.clear()
    assert written(generator.generate(PROMPTS, seed=3)) == expected
    assert servers[0].fake.asked


def test_a_server_that_was_out_of_reach_gets_later_weights(
    fakes: Any, make: Make, model: Any
) -> None:
    (server,) = fakes(1)
    generator = make([server])
    generator.sync(whole(model), 1)
    server.stop()
    threading.Timer(0.5, server.start).start()
    server.fake.calls.clear()
    assert {r.version for r in generator.generate(PROMPTS, seed=3)} == {1}
    assert "rlhf_update" not in server.fake.calls, "it has them"
    generator.sync(whole(model), 2)
    assert server.fake.version == "2" and "rlhf_update" in server.fake.calls
    assert {r.version for r in generator.generate(PROMPTS, seed=3)} == {2}


def test_without_another_server_the_run_waits_for_its_return(fakes: Any, make: Make) -> None:
    (server,) = fakes(1)
    generator = make([server])
    expected = written(generator.generate(PROMPTS, seed=3))
    server.stop()
    threading.Timer(0.5, server.start).start()
    assert written(generator.generate(PROMPTS, seed=3)) == expected


def test_without_any_server_the_run_stops_with_the_first_cause(fakes: Any, make: Make) -> None:
    servers = fakes(2)
    generator = make(servers, start_limit_s=0.2)
    servers[0].fake.refused["/inference/v1/generate"] = 418
    servers[1].fake.delay_s = 0.3
    servers[1].fake.refused["/weight_info"] = 500
    threading.Timer(0.5, servers[1].stop).start()
    many = [Prompt(id=str(i), text="", token_ids=(5, i)) for i in range(60)]
    with pytest.raises(UserError) as stopped:
        generator.generate(many, n=2, seed=0)
    assert servers[0].url in str(stopped.value) and "418" in str(stopped.value)


def test_a_server_that_answers_a_probe_alone_is_given_up(fakes: Any, make: Make) -> None:
    (server,) = fakes(1)
    generator = make([server])

    def change(answer: Any) -> Any:
        return answer if len(answer["choices"][0]["token_ids"]) == 1 else other_tokens(answer)

    server.fake.change = change
    with pytest.raises(UserError) as stopped:
        generator.generate(PROMPTS[:1], seed=0)
    assert "other tokens" in str(stopped.value)


# ---- weights ----


def test_a_version_is_at_every_server_and_in_what_they_write(
    fakes: Any, make: Make, model: Any
) -> None:
    servers = fakes(2)
    generator = make(servers)
    generator.sync(whole(model), 3)
    assert [s.fake.version for s in servers] == ["3", "3"] and generator.version == 3
    assert {r.version for r in generator.generate(PROMPTS, seed=0)} == {3}
    assert generator.sent == weights_checksums(model.state_dict().items()) | generator.sent


def test_a_server_with_other_weights_is_not_believed(fakes: Any, make: Make, model: Any) -> None:
    servers = fakes(2)
    generator = make(servers)
    generator.sync(whole(model), 1)
    servers[0].fake.version = "default"  # somebody restarted it
    rollouts = generator.generate(PROMPTS, seed=0)
    assert {r.version for r in rollouts} == {1}
    wait_for(lambda: states(generator) == ["serving", "serving"])
    assert servers[0].fake.version == "1"  # it got the weights again before it wrote


def test_what_a_server_holds_is_compared(fakes: Any, make: Make, model: Any) -> None:
    servers = fakes(2)
    generator = make(servers, start_limit_s=0.5)
    sums = weights_checksums(model.state_dict().items())
    servers[1].fake.checksums = dict(sums)
    servers[0].fake.checksums = dict(sums, **{"lm_head.weight": "0" * 16})
    generator.sync(whole(model), 1)
    assert states(generator) == ["away", "serving"]
    assert servers[0].fake.version == "unfit"
    # nobody restarts it here, and its weights are of no use
    wait_for(lambda: states(generator) == ["lost", "serving"])


def test_where_all_hold_the_same_wrong_weights_the_proof_says_so(
    fakes: Any, make: Make, model: Any
) -> None:
    servers = fakes(2)
    generator = make(servers)
    for server in servers:
        server.fake.checksums = {"lm_head.weight": "0" * 16}
    generator.sync(whole(model), 1)
    assert states(generator) == ["serving", "serving"]
    assert generator.sent["lm_head.weight"] != generator.checksums()["lm_head.weight"]


def test_a_failed_update_is_never_resumed(fakes: Any, make: Make, model: Any) -> None:
    servers = fakes(2)
    generator = make(servers, start_limit_s=0.5)
    generator.sync(whole(model), 1)
    servers[0].fake.refused["rlhf_update"] = 500
    servers[0].fake.calls.clear()
    generator.sync(whole(model), 2)
    assert {r.version for r in generator.generate(PROMPTS, seed=0)} == {2}
    wait_for(lambda: states(generator) == ["lost", "serving"])
    assert "/resume" not in servers[0].fake.calls


def test_a_server_whose_update_failed_comes_back_once_it_is_started_anew(
    fakes: Any, make: Make, model: Any
) -> None:
    """Its own stage does that (rlhf/stages/serve_rollout.py). It was out of reach when the update
    failed, so it is told to end on its return.
    """
    servers = fakes(2)
    generator = make(servers)
    generator.sync(whole(model), 1)
    fake = servers[0].fake
    fake.refused |= {"rlhf_update": 500, "rlhf_condemn": 500}
    generator.sync(whole(model), 2)
    del fake.refused["rlhf_condemn"]
    fake.calls.clear()
    wait_for(lambda: "rlhf_condemn" in fake.calls)
    assert states(generator) == ["away", "serving"] and "/resume" not in fake.calls
    fake.refused.clear()
    fake.version = "default"
    wait_for(lambda: states(generator) == ["serving", "serving"])
    assert fake.version == "2"


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    return thread, results


def test_weights_wait_for_what_is_being_written(fakes: Any, make: Make, model: Any) -> None:
    (server,) = fakes(1, delay_s=0.4)
    generator = make([server])
    generator.sync(whole(model), 1)
    thread, results = in_thread(lambda: generator.generate(PROMPTS, seed=0))
    wait_for(lambda: bool(server.fake.asked))
    generator.sync(whole(model), 2)
    thread.join()
    assert {r.version for r in results[0]} == {1} and server.fake.version == "2"


def test_in_flight_weights_change_in_the_middle_of_a_response(
    fakes: Any, make: Make, model: Any
) -> None:
    (server,) = fakes(1, delay_s=0.6)
    generator = make([server], in_flight=True)
    generator.sync(whole(model), 1)

    def change(answer: Any) -> Any:
        spans = [("1", 0, 4), ("2", 4, 10)]
        answer["choices"][0]["weight_versions"] = [
            {"version": version, "start": start, "end": end} for version, start, end in spans
        ]
        return answer

    server.fake.change = change
    thread, results = in_thread(lambda: generator.generate(PROMPTS[:1], seed=0))
    wait_for(lambda: bool(server.fake.asked))
    generator.sync(whole(model), 2)
    assert not results, "the sync did not wait"
    thread.join()
    (rollout,) = results[0]
    assert rollout.version == 1 and rollout.versions == [1] * 4 + [2] * 6


def test_another_rank_waits_for_the_weights_of_a_server_that_fails(
    fakes: Any, make: Make, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (server,) = fakes(1)
    told: list[Any] = [None, ([server.url], TOKEN, "run")]  # rank 0's, in their order
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "broadcast", lambda value: told.pop(0))
    other = make([server])
    told += [None, []]
    other.sync(whole(model), 1)
    assert "rlhf_update" not in server.fake.calls and other.version == 1
    threading.Timer(0.3, setattr, (server.fake, "version", "1")).start()  # rank 0 sent them
    assert {r.version for r in other.generate(PROMPTS, seed=0)} == {1}
    told += ["weight sync 2: rank 0 could not send"]
    with pytest.raises(SyncError, match="rank 0"):
        other.sync(whole(model), 2)


def test_weights_that_do_not_fit_stop_the_sync(fakes: Any, make: Make, model: Any) -> None:
    generator = make(fakes(1))
    tensors = dict(model.state_dict())
    del tensors["model.norm.weight"]
    with pytest.raises(SyncError) as refused:
        generator.sync(FullWeights(tensors.items()), 1)
    assert "model.norm.weight" in str(refused.value) and generator.version == 0


def test_adapters_have_a_name_for_each_version(fakes: Any, make: Make) -> None:
    servers = fakes(2)
    generator = make(servers, adapter_rank=2)
    for version in (1, 2, 3):
        generator.sync(lora(version), version)
        assert {r.version for r in generator.generate(PROMPTS, seed=0)} == {version}
        names = {body["model"] for s in servers for body in s.fake.asked[-1:]}
        assert len(names) == 1 and names.pop().endswith(f"-{version}")
    for server in servers:
        assert [name.rpartition("-")[2] for name in server.fake.adapters] == ["2", "3"]


def test_a_restarted_server_loads_the_adapter_before_it_writes(fakes: Any, make: Make) -> None:
    (server,) = fakes(1)
    generator = make([server], adapter_rank=2)
    generator.sync(lora(), 1)
    server.fake.adapters.clear()
    rollouts = generator.generate(PROMPTS, seed=0)
    assert {r.version for r in rollouts} == {1}
    assert len(server.fake.adapters) == 1


def test_weights_of_the_other_kind_are_refused(fakes: Any, make: Make, model: Any) -> None:
    with pytest.raises(SyncError):
        make(fakes(1)).sync(lora(), 1)
    with pytest.raises(SyncError):
        make(fakes(1), adapter_rank=2).sync(whole(model), 1)


# ---- before anything loads ----


def config(servers: Sequence[str], **changes: Any) -> RolloutConfig:
    server = ServerConfig(**{"token_env": VARIABLE, **changes})
    return RolloutConfig(backend=RolloutBackend.server, servers=list(servers), server=server)


def refused(cfg: RolloutConfig, carrier: Carrier = Carrier.merged) -> str:
    with pytest.raises(UserError) as error:
        check_servers(cfg, carrier, dry_run=False)
    return str(error.value)


def test_running_servers_that_can_be_used(fakes: Any) -> None:
    check_servers(config([s.url for s in fakes(2)]), Carrier.merged, dry_run=False)


@pytest.mark.parametrize("url", ["10.0.0.1:8200", "ftp://host", "http://", "http://u:p@host:1"])
def test_a_bad_url(url: str) -> None:
    assert "rollout.servers" in refused(config([url]))


def test_a_server_named_twice() -> None:
    assert "twice" in refused(config(["http://a:1", "http://a:1"]))


def test_no_token(fakes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (server,) = fakes(1)
    assert "rollout.server.token_env" in refused(config([server.url], token_env=None))
    monkeypatch.setenv(VARIABLE, "another")
    message = refused(config([server.url]))
    assert server.url in message and VARIABLE in message and "another" not in message
    monkeypatch.delenv(VARIABLE)
    assert VARIABLE in refused(config([server.url]))


def test_no_server_there(fakes: Any) -> None:
    (server,) = fakes(1)
    server.stop()
    assert server.url in refused(config([server.url]))


def test_another_kind_of_server_there(fakes: Any) -> None:
    (server,) = fakes(1, refused={"/v1/models": 404})
    message = refused(config([server.url]))
    assert server.url in message and "404" in message


@pytest.mark.parametrize("carrier", [Carrier.modules, Carrier.embeds])
def test_adapters_that_servers_do_not_take(carrier: Carrier) -> None:
    assert "rollout=vllm" in refused(config([]), carrier)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("cores", ["0-"]),
        ("cores", ["99999"]),
        ("python", "/no/such/python"),
        ("transfer", "nccl"),
    ],
)
def test_options_of_own_servers(option: str, value: Any) -> None:
    from conf.model import Transfer

    given = Transfer(value) if option == "transfer" else value
    message = refused(config([], **{option: given}))
    assert f"rollout.server.{option}" in message


def test_sequences_that_are_too_long_for_a_server(fakes: Any, make: Make) -> None:
    servers = fakes(1, longest=30)
    with pytest.raises(UserError) as error:
        make(servers)
    assert servers[0].url in str(error.value) and "30" in str(error.value)


@pytest.mark.parametrize("stage", ["eval", "label"])
def test_stages_of_several_policies_use_no_running_servers(stage: str) -> None:
    with pytest.raises(UserError) as error:
        refuse_running_servers(config(["http://a:1"]), stage)
    assert "rollout.servers" in str(error.value) and f"stage={stage}" in str(error.value)
    refuse_running_servers(config([]), stage)


def test_a_run_is_refused_before_anything_loads(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "alpha"}\n' * 4)
    given = ["stage=grpo", "rollout=server", f"model.path={tiny_model()}", f"data.path={rows}"]
    given += ["reward.function=tests.toys:even_tokens", f"run.dir={tmp_path}", "tracking=none"]
    given += ["data.max_prompt_length=24", "rollout.max_response_length=8"]
    given += ["stage.prompts_per_step=4"]
    check(compose(given))
    with pytest.raises(UserError) as error:
        check(compose([*given, "adapter=houlsby"]))
    assert "rollout=vllm" in str(error.value)
    with pytest.raises(UserError) as error:
        check(compose([*given, "rollout.servers=[http://127.0.0.1:9]"]))
    assert "rollout.server.token_env" in str(error.value)


def test_a_client_tells_what_went_wrong(fakes: Any) -> None:
    (running,) = fakes(1)
    server = Server(running.url, "another", limit_s=5.0)
    with pytest.raises(ServerFault) as fault:
        server.write(Request([1], {"max_tokens": 1}))
    assert running.url in str(fault.value) and "401" in fault.value.cause
    server.close()
    with pytest.raises(ServerFault):
        server.probe(limit_s=1.0)
