"""Games of other people's libraries: played by hand through the adapters, in processes that leave
the run's random generators alone and that a limit ends.
"""

# ruff: noqa: NPY002 - the global generators are what is kept

import functools
import json
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest

from conf.reward import EnvironmentConfig, EnvironmentKind
from conf.schema import GymConfig
from rlhf.data.recipes import gym
from rlhf.environments import factory
from rlhf.environments.apart import Apart, GameError, prepare
from rlhf.types import Environment, Step, UserError


class Dice:
    """Draws from the global generators, and misbehaves on demand."""

    def reset(self, row: Mapping[str, object], seed: int) -> str:
        return f"{random.random()} {np.random.random()} {list({'a', 'b', 'c', 'd', 'e'})}"

    def step(self, text: str) -> Step:
        if text == "hang":
            time.sleep(1000)
        if text == "raise":
            raise KeyError("lost")
        if text == "exit":
            raise SystemExit
        return Step(str(random.random()), reward=0.5, info={"rolled": 1.0})

    def close(self) -> None: ...


def dice(limit_s: float = 20.0) -> Apart:
    prepare()
    return Apart(Dice, limit_s)


def test_seeds_decide_and_the_runs_generators_stay() -> None:
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.random()
    random.seed(5)
    np.random.seed(5)
    one, same, other = dice(), dice(), dice()
    begun = [one.reset({}, 7), same.reset({}, 7), other.reset({}, 8)]
    assert begun[0] == begun[1] != begun[2]
    # turns of others in between make no difference
    other.step("roll")
    assert one.step("roll") == same.step("roll")
    assert one.step("roll") == Step(same.step("roll").observation, 0.5, False, {"rolled": 1.0})
    assert (random.random(), np.random.random()) == expected
    for game in (one, same, other):
        game.close()


def test_episodes_run_side_by_side() -> None:
    def play(seed: int) -> str:
        game = dice()
        begun = str(game.reset({}, seed))
        game.close()
        return begun

    with ThreadPoolExecutor(8) as pool:
        begun = list(pool.map(play, [1, 2, 3, 4] * 4))
    assert begun[:4] * 4 == begun and len(set(begun)) == 4


def test_what_a_game_raises_is_told() -> None:
    game = dice()
    game.reset({}, 1)
    with pytest.raises(GameError, match=r"KeyError: 'lost' \(in step"):
        game.step("raise")
    with pytest.raises(GameError):
        game.step("again")
    game.reset({}, 1)
    with pytest.raises(GameError, match="ended"):
        game.step("exit")
    game.close()


def test_a_hanging_game_ends_by_its_limit() -> None:
    game = dice(limit_s=0.4)
    game.reset({}, 1)
    process = psutil.Process(game._process.pid)
    with pytest.raises(TimeoutError):
        game.step("hang")
    assert not process.is_running()
    with pytest.raises(GameError):
        game.step("roll")


def test_close_ends_a_game_that_another_thread_waits_for() -> None:
    game = dice()
    game.reset({}, 1)
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            game.step("hang")
        except GameError as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.3)
    game.close()
    thread.join(10)
    assert not thread.is_alive() and len(raised) == 1


# ---- reasoning-gym ----


def config(kind: EnvironmentKind, game: str, **options: object) -> EnvironmentConfig:
    return EnvironmentConfig(kind=kind, game=game, options=options, step_limit_s=60.0)


reasoning = functools.partial(config, EnvironmentKind.reasoning_gym)
arena = functools.partial(config, EnvironmentKind.textarena)
gymnasium = functools.partial(config, EnvironmentKind.gymnasium)


def begun(environment: EnvironmentConfig, seed: int = 1) -> tuple[Environment, str]:
    made = factory.make_factory(environment)()
    first = made.reset({}, seed)
    assert isinstance(first, str)
    return made, first


def test_a_question_is_tried_until_it_is_right() -> None:
    game, question = begun(reasoning("chain_sum", min_terms=2, max_terms=2, max_digits=1))
    numbers = question.split("=")[0].split(":")[-1]
    wrong, right = game.step("17171"), game.step(f"It is <answer>{eval(numbers)}</answer>")  # noqa: S307
    assert isinstance(wrong, Step) and isinstance(right, Step)
    assert not wrong.done and "Try again" in str(wrong.observation)
    assert right.done and right.info == {"success": True}
    assert wrong.reward + right.reward == pytest.approx(1.0)
    game.close()


def test_rows_of_the_recipe_bring_their_question() -> None:
    options = GymConfig(tasks=["spell_backward"], rows=3, eval_rows=1)
    row = gym.rows(options, seed=1)["prompts.jsonl"][0]
    game = factory.make_factory(reasoning("spell_backward"))()
    assert game.reset(row, 1) == ""
    step = game.step(str(row["answer"]))
    assert isinstance(step, Step) and step.done and step.reward == 1.0
    with pytest.raises(GameError, match="chain_sum"):
        factory.make_factory(reasoning("chain_sum"))().reset(row, 1)


def test_an_answer_that_computes_for_ever_is_ended() -> None:
    game = factory.make_factory(reasoning("countdown"))()
    game._limit_s = 0.7  # type: ignore[attr-defined]
    game.reset({}, 1)
    with pytest.raises(TimeoutError):
        game.step("<answer>" + "9**" * 9 + "9</answer>")


# ---- textarena ----


def test_a_game_of_textarena_by_hand() -> None:
    pytest.importorskip("textarena")
    game, first = begun(arena("GuessTheNumber-v0", min_number=1, max_number=4))
    assert "between 1 and 4" in first
    said = [game.step(f"[{number}]") for number in (1, 2, 3, 4)]
    ends = [step for step in said if isinstance(step, Step) and step.done]
    assert ends and ends[0].reward == 1.0 and ends[0].info == {"success": True, "invalid": 0.0}
    game.close()
    again, _ = begun(arena("GuessTheNumber-v0", min_number=1, max_number=4))
    assert again.step("[1]") == said[0], "the seed hides the number"
    again.close()


def test_an_invalid_move_ends_a_game_of_textarena() -> None:
    pytest.importorskip("textarena")
    game, _ = begun(arena("GuessTheNumber-v0"))
    warned, ended = game.step("seven"), game.step("seven")
    assert isinstance(warned, Step) and isinstance(ended, Step)
    assert "invalid move" in str(warned.observation) and "seven" not in str(warned.observation)
    assert ended.done and ended.info == {"success": False, "invalid": 1.0}
    game.close()


# ---- gymnasium ----


def test_a_drawn_game_of_gymnasium_by_hand() -> None:
    pytest.importorskip("gymnasium")
    names = ["left", "down", "right", "up"]
    lake = gymnasium("FrozenLake-v1", is_slippery=False, actions=names, success_at=1.0)
    game, first = begun(lake)
    assert first == "[S]FFF\nFHFH\nFFFH\nHFFG"
    assert game.step("I go sideways") == Step(
        "no action; expected left, down, right, up", info={"invalid": 1.0, "success": False}
    )
    lost: dict[str, object] = {"invalid": 0.0, "success": False}
    moved = game.step("I go Down.")
    assert moved == Step("  (Down)\nSFFF\n[F]HFH\nFFFH\nHFFG", info=lost)
    for move in ("down", "right", "right", "down"):
        game.step(move)
    goal = Step("", reward=1.0, done=True, info={"invalid": 0.0, "success": True})
    assert game.step("right") == goal
    game.close()


def test_numbers_play_where_actions_have_no_names() -> None:
    pytest.importorskip("gymnasium")
    game, first = begun(gymnasium("Blackjack-v1"))
    assert first.startswith("(")
    assert game.step("7") == Step("no action; expected a number from 0 to 1", info={"invalid": 1.0})
    stuck = game.step("action 0")
    assert isinstance(stuck, Step) and stuck.done and stuck.reward in (-1.0, 0.0, 1.0, 1.5)
    assert "success" not in stuck.info
    game.close()


# ---- what can't be played ----


@pytest.mark.parametrize(
    ("make", "game", "options", "named"),
    [
        (reasoning, "chain_sums", {}, ["chain_sums", "chain_sum"]),
        (reasoning, "chain_sum", {"terms": 2}, ["chain_sum", "terms"]),
        (arena, "GuessTheNumbr-v0", {}, ["GuessTheNumbr-v0", "GuessTheNumber-v0"]),
        (arena, "TicTacToe-v0", {}, ["TicTacToe-v0", "alone"]),
        (arena, "GuessTheNumber-v0", {"maximum": 3}, ["GuessTheNumber-v0", "maximum"]),
        (gymnasium, "FrozenLake-v9", {}, ["FrozenLake-v9", "FrozenLake-v1"]),
        (gymnasium, "FrozenLake-v1", {"actions": ["left"]}, ["actions", "Discrete(4)"]),
        (gymnasium, "Pendulum-v1", {}, ["Pendulum-v1", "Box"]),
    ],
)
def test_a_game_that_can_not_be_played_is_refused(
    make: Callable[..., EnvironmentConfig],
    game: str,
    options: dict[str, object],
    named: list[str],
) -> None:
    environment = make(game, **options)
    pytest.importorskip(environment.kind.value)
    with pytest.raises(UserError) as error:
        factory.check(environment)
    assert all(word in str(error.value) for word in named), error.value


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"textarena.*games"):
        factory.check(arena("GuessTheNumber-v0"))


def test_rows_travel_as_json() -> None:
    game = dice()
    assert game.reset(json.loads('{"a": [1, {"b": null}], "c": "ü"}'), 1)
    game.close()
