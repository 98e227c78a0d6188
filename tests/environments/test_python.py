"""Classes as environments: what is no environment is refused by name; a game played by hand."""

from collections.abc import Mapping
from typing import ClassVar

import pytest

from conf.reward import EnvironmentConfig, EnvironmentKind
from rlhf.environments import factory
from rlhf.environments.games import GuessNumber
from rlhf.types import Step, Tools, UserError

HERE = "tests.environments.test_python"


def python(name: str, **options: object) -> EnvironmentConfig:
    return EnvironmentConfig(kind=EnvironmentKind.python, path=name, options=options)


class Echo:
    """Answers with what was written."""

    tools: ClassVar[Tools] = [{"type": "function", "function": {"name": "echo"}}]

    def __init__(self, prefix: str, times: int = 1) -> None:
        self.prefix, self.times = prefix, times

    def reset(self, row: Mapping[str, object], seed: int) -> str:
        return f"{row['text']} {seed}"

    def step(self, text: str) -> Step:
        return Step(self.prefix + text * self.times)

    def close(self) -> None: ...


class Deaf:
    def reset(self, row: Mapping[str, object], seed: int) -> str:
        return ""


def test_each_episode_has_an_environment_of_its_own() -> None:
    make = factory.make_factory(python(f"{HERE}:Echo", prefix="> ", times=2))
    one, other = make(), make()
    assert one is not other
    assert one.reset({"text": "hello"}, 7) == "hello 7"
    assert one.step("ab") == Step("> abab")


def test_tools_of_a_class_are_its_attribute() -> None:
    assert factory.tools_of(python(f"{HERE}:Echo", prefix="")) == Echo.tools
    assert factory.tools_of(python("rlhf.environments.games:GuessNumber")) is None
    assert factory.tools_of(EnvironmentConfig()) is None


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        (python(f"{HERE}:Deaf"), ["environment.path", "Deaf", "step, close"]),
        (python(f"{HERE}:Missing"), ["environment.path", "Missing", "Deaf, Echo"]),
        (python("no_such_module:A"), ["environment.path", "no_such_module"]),
        (python("nothing"), ["environment.path=nothing"]),
        (python(f"{HERE}:Echo"), ["environment.options", "prefix"]),
        (python(f"{HERE}:Echo", prefix="", tims=2), ["environment.options", "tims", "times"]),
        (EnvironmentConfig(kind=EnvironmentKind.python), ["environment.path"]),
        (
            EnvironmentConfig(kind=EnvironmentKind.python, path=f"{HERE}:Echo", game="x"),
            ["environment.game=x", "textarena", "python"],
        ),
    ],
)
def test_what_is_no_environment_is_refused_by_name(
    environment: EnvironmentConfig, named: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        factory.check(environment)
    assert all(name in str(error.value) for name in named), error.value


def test_a_guessing_game_by_hand() -> None:
    game = GuessNumber(low=1, high=8, guesses=4)
    assert game.reset({}, seed=3) == ""
    number = game.number
    game.reset({}, seed=3)
    assert game.number == number, "the same seed hides the same number"
    game.number = 6
    assert game.step("is it 2?") == Step("higher", info={"invalid": 0.0, "success": False})
    assert game.step("8") == Step("lower", info={"invalid": 0.0, "success": False})
    assert game.step("what") == Step("no number", info={"invalid": 1.0, "success": False})
    end = Step("", reward=1.0, done=True, info={"invalid": 0.0, "success": True})
    assert game.step("6 or 7") == end
    game.reset({}, seed=3)
    game.number = 6
    steps = [game.step(text) for text in ("1", "2", "3", "4")]
    assert [step.done for step in steps] == [False, False, False, True]
    assert steps[3].reward == 0.0 and steps[3].info["success"] is False


def test_seeds_hide_all_numbers() -> None:
    game = GuessNumber(low=1, high=4)
    hidden = set()
    for seed in range(40):
        game.reset({}, seed)
        hidden.add(game.number)
    assert hidden == {1, 2, 3, 4}
    with pytest.raises(ValueError, match="guesses"):
        GuessNumber(guesses=0)
