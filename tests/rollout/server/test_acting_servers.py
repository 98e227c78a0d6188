"""Episodes whose turns servers write: each goes on by itself."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from conf.reward import EnvironmentConfig, EnvironmentKind
from rlhf.types import Prompt, Rollout, UserError
from rollout.episodes import EpisodeGenerator
from rollout.server.generator import ServerGenerator
from tests.acting import Broken, Counting, Slow
from tests.rollout.server import test_servers
from tests.rollout.server.test_servers import Make, in_thread, wait_for, whole

# fixtures
fakes, make, model, token = (
    test_servers.fakes,
    test_servers.make,
    test_servers.model,
    test_servers.token,
)


def ended(answer: Any) -> Any:
    """A turn that the policy ended."""
    answer["choices"][0]["finish_reason"] = "stop"
    return answer


@pytest.fixture
def acting(make: Make, tiny_model: Callable[..., Path], model: Any) -> Callable[..., Any]:
    def start(servers: Any, environment: Any = Counting, **changes: Any) -> EpisodeGenerator:
        inner = make(servers, **changes)
        inner.sync(whole(model), 1)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model())
        limits = EnvironmentConfig(kind=EnvironmentKind.python, max_tokens=34)
        sizes = {"max_prompt": 6, "max_turn": 4}
        return EpisodeGenerator(inner, tokenizer, limits, environment, **sizes)

    return start


def prompts(count: int, **fields: object) -> list[Prompt]:
    made = [Prompt(str(i), "x", (5, 6 + i, 7), "x", {"turns": 3}) for i in range(count)]
    return [dataclasses.replace(prompt, fields=prompt.fields | fields) for prompt in made]


def test_what_is_written_depends_on_no_server(fakes: Any, acting: Any) -> None:
    one = acting(fakes(1, change=ended)).generate(prompts(4), n=2, seed=3)
    servers = fakes(3, change=ended)
    three = acting(servers).generate(prompts(4), n=2, seed=3)
    assert [r.token_ids for r in one] == [r.token_ids for r in three]
    assert len({tuple(r.token_ids) for r in one}) == 8
    assert all(len(r.turns) == 3 and r.finish_reason == "stop" for r in one)
    # 8 episodes of 3 turns, each a request by itself
    asked = [len(server.fake.asked) for server in servers]
    assert sum(asked) == 24 and min(asked) >= 4
    # a server that has an episode's first turns gets the others
    begun = [[tuple(body["token_ids"][:7]) for body in server.fake.asked] for server in servers]
    later = [{start for start in starts if len(start) == 7} for starts in begun]
    assert sum(map(len, later)) == len(set.union(*later)) == 8


def test_no_episode_waits_for_another(fakes: Any, acting: Any) -> None:
    """One environment takes its time in every turn, while the other episodes end."""
    (server,) = fakes(1, change=ended)
    quick, slow = prompts(1), prompts(2, slow=0.4)[1:]
    generator = acting([server], Slow)
    began = time.monotonic()
    thread, results = in_thread(lambda: generator.generate([*quick, *slow], seed=3))
    wait_for(lambda: any(made.closed for made in Counting.made[-2:]))
    assert time.monotonic() - began < 0.8  # turn by turn: 1.2 s
    thread.join()
    assert [len(rollout.turns) for rollout in results[0]] == [3, 3]


def test_weights_wait_for_all_turns(fakes: Any, acting: Any, model: Any) -> None:
    (server,) = fakes(1, change=ended, delay_s=0.2)
    generator = acting([server])
    thread, results = in_thread(lambda: generator.generate(prompts(2), seed=3))
    wait_for(lambda: bool(server.fake.asked))
    generator.sync(whole(model), 2)
    assert results, "the sync came before the episodes' end"
    thread.join()
    assert {(rollout.version, rollout.versions is None) for rollout in results[0]} == {(1, True)}
    assert generator.version == 2


def test_in_flight_weights_change_between_turns(fakes: Any, acting: Any, model: Any) -> None:
    (server,) = fakes(1, change=ended, delay_s=0.3)
    generator = acting([server], in_flight=True)
    thread, results = in_thread(lambda: generator.generate(prompts(1), seed=3))
    wait_for(lambda: len(server.fake.asked) > 1)
    generator.sync(whole(model), 2)
    assert not results, "the sync did not wait"
    thread.join()
    rollout: Rollout = results[0][0]
    first, last = rollout.turns[0], rollout.turns[-1]
    assert rollout.version == 1 and rollout.versions is not None
    assert len(rollout.versions) == len(rollout.token_ids)
    assert set(rollout.versions[first.start : first.end]) == {1}
    assert set(rollout.versions[last.start : last.end]) == {2}


def test_a_server_that_fails_between_turns(fakes: Any, acting: Any) -> None:
    """Its requests go to the other, and the episodes are what they would have been."""
    expected = acting(fakes(1, change=ended)).generate(prompts(4), seed=3)
    first, second = fakes(2, change=ended, delay_s=0.1)
    generator = acting([first, second], request_limit_s=2.0)
    thread, results = in_thread(lambda: generator.generate(prompts(4), seed=3))
    wait_for(lambda: len(first.fake.asked) > 2)
    first.stop()
    thread.join()
    assert [r.token_ids for r in results[0]] == [r.token_ids for r in expected]


def test_a_failed_environment_ends_the_others(fakes: Any, acting: Any) -> None:
    Counting.made.clear()
    (server,) = fakes(1, change=ended, delay_s=0.05)
    generator = acting([server], Broken)
    given = [*prompts(1, broken=1), *prompts(3, turns=50)[1:]]
    with pytest.raises(UserError, match=r"prompt 0.*turn 1.*the board fell"):
        generator.generate(given, seed=3)
    assert [made.closed for made in Counting.made] == [1, 1, 1]
    assert isinstance(generator.inner, ServerGenerator)
    generator.inner.generate(prompts(1), seed=3)  # it is free again
