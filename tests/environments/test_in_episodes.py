"""Tools, games and servers in whole episodes, with a policy that writes what it is told."""

import dataclasses
import json
import multiprocessing
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from conf.reward import EnvironmentConfig, EnvironmentKind, OnTimeout
from rlhf.environments import factory
from rlhf.environments.apart import Apart, prepare
from rlhf.environments.tables import value
from rlhf.models.encoding import prompt_ids
from rlhf.models.loading import train_tokenizer
from rlhf.models.templates import template_text
from rlhf.types import Message, Prompt, UserError
from rollout.episodes import EpisodeGenerator
from tests.acting import Scripted
from tests.environments.test_games import Dice
from tests.environments.test_http import Site

TABLE = EnvironmentConfig(
    kind=EnvironmentKind.tools,
    tools=["rlhf.environments.tables:table", "calculator"],
    options={"answer": "answer"},
    max_tokens=600,
    tool_limit_s=1.0,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    out = train_tokenizer(["user assistant system tool"] * 2, 300, 2048)
    out.chat_template = template_text("hermes")
    return out


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.close()


def asked(tokenizer: Any, key: str, **fields: object) -> Prompt:
    source: list[Message] = [{"role": "user", "content": key}]
    ids = tuple(prompt_ids(tokenizer, source))
    return Prompt(key, tokenizer.decode(ids), ids, source, fields)


def playing(
    tokenizer: Any, environment: EnvironmentConfig, script: Mapping[str, list[str]]
) -> EpisodeGenerator:
    """Episodes of a policy whose turns are `script`, by the row's prompt."""

    def write(name: str, turn: int) -> list[int]:
        text = script[name.split("/", maxsplit=1)[0]][turn]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, tokenizer.eos_token_id]

    make = factory.make_factory(environment, tokenizer)
    tools = factory.tools_of(environment)
    inner = Scripted(tokenizer, write)
    return EpisodeGenerator(
        inner, tokenizer, environment, make, tools=tools, max_prompt=1200, max_turn=300
    )


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_tools_answer_an_episode_each(tokenizer: Any) -> None:
    script = {
        "017": [call("table", key="017"), f"It is {value('017')}."],
        "018": [call("tabel", key="018"), call("table", key="018"), "It is nothing."],
        "019": ["I guess 0"],
    }
    generator = playing(tokenizer, TABLE, script)
    prompts = [asked(tokenizer, key, answer=value(key)) for key in script]
    found = generator.generate(prompts, seed=1)
    assert [len(rollout.turns) for rollout in found] == [2, 3, 1]
    assert [rollout.success for rollout in found] == [True, False, False]
    assert [sum(turn.reward for turn in rollout.turns) for rollout in found] == [1.0, 0.0, 0.0]
    assert f"<tool_response>\n{value('017')}\n" in found[0].turns[0].observation
    assert "no function 'tabel'" in found[1].turns[0].observation
    assert [rollout.info for rollout in found] == [
        {"calls": 1.0, "broken_calls": 0.0, "failed_calls": 0.0},
        {"calls": 2.0, "broken_calls": 1.0, "failed_calls": 0.0},
        {"calls": 0.0, "broken_calls": 0.0, "failed_calls": 0.0},
    ]
    shown = found[0].prompt.text
    assert '"name": "table"' in shown and '"name": "calculator"' in shown


def test_a_row_without_its_answer_stops_the_run(tokenizer: Any) -> None:
    generator = playing(tokenizer, TABLE, {"017": ["0"]})
    with pytest.raises(UserError, match=r"017.*answer"):
        generator.generate([asked(tokenizer, "017")], seed=1)


def test_a_server_answers_an_episode(tokenizer: Any, site: Site) -> None:
    def answer(path: str, message: Mapping[str, Any]) -> tuple[int, object]:
        if path.endswith("/reset"):
            return 200, {"observation": f"guess, {message['row']['player']}"}
        right = message.get("text") == "4"
        return 200, {"observation": "higher", "reward": float(right), "done": right}

    site.answer = answer
    environment = EnvironmentConfig(kind=EnvironmentKind.http, url=site.url, max_tokens=200)
    generator = playing(tokenizer, environment, {"g": ["3", "4"]})
    (rollout,) = generator.generate([asked(tokenizer, "g", player="Ann")], seed=1)
    assert rollout.finish_reason == "stop" and [turn.reward for turn in rollout.turns] == [0, 1]
    assert "guess, Ann" in rollout.prompt.text and "higher" in rollout.turns[0].observation
    assert [path for path, _, _ in site.asked] == ["/game/reset"] + ["/game/step"] * 2 + [
        "/game/close"
    ]


def test_a_server_that_makes_no_sense_stops_the_run(tokenizer: Any, site: Site) -> None:
    site.answer = lambda path, message: (200, {"observation": "x", "reward": "much"})
    environment = EnvironmentConfig(kind=EnvironmentKind.http, url=site.url, max_tokens=200)
    generator = playing(tokenizer, environment, {"g": ["3"]})
    with pytest.raises(UserError, match=r"prompt g.*turn 1.*'3'.*much"):
        generator.generate([asked(tokenizer, "g")], seed=1)


def test_a_question_of_reasoning_gym_in_an_episode(tokenizer: Any) -> None:
    environment = EnvironmentConfig(
        kind=EnvironmentKind.reasoning_gym, game="spell_backward", max_tokens=400, max_turns=2
    )
    generator = playing(tokenizer, environment, {"q": ["no", "no"]})
    found = generator.generate([asked(tokenizer, "q")], n=2, seed=1)
    assert found[0].prompt.text == found[1].prompt.text, "one seed, one question"
    assert [rollout.finish_reason for rollout in found] == ["turns", "turns"]
    assert [rollout.success for rollout in found] == [False, False]
    assert not multiprocessing.active_children(), "their processes have ended"


def test_a_game_that_hangs_ends_its_episode_alone(tokenizer: Any) -> None:
    settings = EnvironmentConfig(
        kind=EnvironmentKind.python,
        path="tests.environments.test_games:Dice",
        step_limit_s=2.0,
        max_turns=2,
        max_tokens=200,
    )
    prepare()
    generator = playing(tokenizer, settings, {"a": ["hang"], "b": ["roll", "roll"]})
    generator._make = lambda: Apart(Dice, 2.0)
    prompts = [asked(tokenizer, "a"), asked(tokenizer, "b")]
    found = generator.generate(prompts, seed=1)
    assert [rollout.finish_reason for rollout in found] == ["time", "turns"]
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not multiprocessing.active_children(), "the one that hangs is ended"
    stops = dataclasses.replace(settings, on_timeout=OnTimeout.stop)
    generator = playing(tokenizer, stops, {"a": ["hang"]})
    generator._make = lambda: Apart(Dice, 2.0)
    with pytest.raises(UserError, match=r"prompt a.*turn 1.*step_limit_s"):
        generator.generate([asked(tokenizer, "a")], seed=1)
