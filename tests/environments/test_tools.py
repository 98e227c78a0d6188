"""The environment of tools: what is called runs, what can't be called is answered and counted."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from conf.reward import EnvironmentConfig, EnvironmentKind
from rlhf.environments import factory, functions
from rlhf.environments.tools import ToolEnvironment, ends_with
from rlhf.types import Step, UserError

HERE = "tests.environments.own_tools"


def written(name: str, **arguments: object) -> str:
    call = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{call}\n</tool_call>"


def config(tools: Sequence[str], **options: Any) -> EnvironmentConfig:
    options = {"tool_limit_s": 1.0} | options
    return EnvironmentConfig(kind=EnvironmentKind.tools, tools=list(tools), **options)


def made(tools: Sequence[str], **options: Any) -> ToolEnvironment:
    environment = factory.make_factory(config(tools, **options))()
    assert isinstance(environment, ToolEnvironment)
    environment.reset({}, 1)
    return environment


def said(step: Step) -> list[tuple[str, str]]:
    """Names and contents of the messages."""
    assert isinstance(step.observation, list)
    assert all(message["role"] == "tool" for message in step.observation)
    return [(message["name"], message["content"]) for message in step.observation]


def counts(step: Step) -> list[object]:
    return [step.info[key] for key in ("calls", "broken_calls", "failed_calls")]


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("(17 - 4) * 2 ** 10", "13312"),
        ("-7 // 2 + 7 % 3", "-3"),
        ("1 / 3", "0.333333333333"),
        ("sqrt(2) + max(1, 2, 3) * pi", "10.8389915231"),
        ("123456789123456789 * 987654321", "121932631234567900112635269"),
        ("+4", "4"),
    ],
)
def test_the_calculator(expression: str, value: str) -> None:
    assert functions.calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["", "1 +", "__import__('os')", "a", "abs", "max(1, key=2)", "[1]", "'a' * 3", "1 if 1 else 2"],
)
def test_what_is_no_arithmetic(expression: str) -> None:
    with pytest.raises((ValueError, SyntaxError)):
        functions.calculator(expression)


def test_tools_run_and_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The moon is far.\nThe sun is FAR too.\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("Nothing here.\nfar away\n")
    env = made(["calculator", "python", "lookup", "shell"], files=str(tmp_path))
    step = env.step(written("calculator", expression="2 ** 40"))
    assert said(step) == [("calculator", "1099511627776")]
    assert counts(step) == [1.0, 0.0, 0.0] and not step.done and step.reward == 0.0
    step = env.step(written("python", code="x = [1, 2]\nprint(x)\nsum(x)"))
    assert said(step) == [("python", "[1, 2]\n3")]
    step = env.step(written("lookup", query="far"))
    found = "a.txt:1: The moon is far.\na.txt:2: The sun is FAR too.\nsub/b.txt:2: far away"
    assert said(step) == [("lookup", found)]
    assert said(env.step(written("lookup", query="mars"))) == [("lookup", "nothing")]
    step = env.step(written("shell", command="ls; cat sub/b.txt | wc -l"))
    assert said(step) == [("shell", "a.txt\nsub\n2")]


def test_what_fails_is_an_error_in_a_line() -> None:
    env = made(["calculator", "python"])
    step = env.step(written("python", code="print('before')\n1 / 0"))
    assert said(step) == [("python", "before\nerror: ZeroDivisionError: division by zero")]
    assert counts(step) == [1.0, 0.0, 1.0]
    step = env.step(written("python", code="while True: pass"))
    assert counts(step) == [1.0, 0.0, 1.0] and "CPU" in said(step)[0][1]


def test_broken_calls_are_answered_each() -> None:
    env = made(["calculator"])
    text = "\n".join(
        [
            written("calculator", expression="1 + 1"),
            written("calculater", expression="1"),
            written("calculator", expresion="1"),
            written("calculator", expression=1),
            written("calculator"),
            "<tool_call>{</tool_call>",
        ]
    )
    step = env.step(text)
    contents = [content for _, content in said(step)]
    assert contents[0] == "2" and all(content.startswith("error: ") for content in contents[1:])
    words = ["calculator", "expresion", "string", "required", "JSON"]
    assert [w in c for w, c in zip(words, contents[1:], strict=True)] == [True] * 5, contents
    assert counts(step) == [6.0, 5.0, 0.0]


def test_a_turn_has_a_bound_of_calls_and_of_time() -> None:
    env = made(["python"], step_limit_s=1.0)
    step = env.step("".join([written("python", code="import time; time.sleep(0.5)")] * 9))
    contents = [content for _, content in said(step)]
    assert "8 calls" in contents[8] and "time" in contents[7]
    calls, broken, failed = counts(step)
    assert (calls, broken) == (9.0, 1.0) and failed in (6.0, 7.0, 8.0)


def test_results_are_cut() -> None:
    env = made(["python"], tool_output=20)
    ((_, content),) = said(env.step(written("python", code="print('ä' * 1000)")))
    assert content == "ä" * 20 + " ... (cut)"


def test_an_answer_ends_the_episode() -> None:
    env = made(["calculator"])
    step = env.step("I think it is 42.")
    assert step.done and step.reward == 0.0 and "success" not in step.info
    make = factory.make_factory(config(["calculator"], options={"answer": "result"}))
    env = make()  # type: ignore[assignment]
    env.reset({"result": 42}, 1)
    right = env.step("It is 42.")
    assert right.done and right.reward == 1.0 and right.info["success"] is True
    env.reset({"result": 43}, 1)
    wrong = env.step("It is 42.")
    assert wrong.done and wrong.reward == 0.0 and wrong.info["success"] is False
    with pytest.raises(ValueError, match="result"):
        env.reset({"answer": 1}, 1)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("42", "42", True),
        ("The answer is **42**.", "42", True),
        ("It costs $1,250.00!", "1250", True),
        ("x = -42", "42", False),
        ("x = 142", "42", False),
        ("3.42", "42", False),
        ("42 or 43", "42", False),
        ("123456789123", "123456789124", False),
        ("0.3333333", "0.33333333333", True),
        ("The capital is PARIS.", "Paris", True),
        ("Paris, in France", "Paris", False),
        ("comparis", "paris", False),
        ("", "42", False),
        ("none", "42", False),
    ],
)
def test_what_ends_with_an_answer(text: str, answer: str, right: bool) -> None:
    assert ends_with(text, answer) is right


def test_text_prompts_get_texts() -> None:
    environment = factory.make_factory(config(["calculator"]))()
    environment.reset({"prompt": "What is 1 + 1?"}, 1)
    step = environment.step(written("calculator", expression="1 + 1"))
    assert isinstance(step, Step)
    assert step.observation == "\n<tool_response>\n2\n</tool_response>\n"


def test_functions_of_ones_own() -> None:
    environment = config([f"{HERE}:stock", "calculator"])
    tools = factory.tools_of(environment)
    assert tools is not None and [tool["function"]["name"] for tool in tools] == [
        "stock",
        "calculator",
    ]
    parameters = tools[0]["function"]["parameters"]
    assert parameters["required"] == ["item"]
    assert parameters["properties"]["item"] == {
        "type": "string",
        "enum": ["apple", "pear"],
        "description": "What is asked for.",
    }
    env = made([f"{HERE}:stock", "calculator"])
    step = env.step(written("stock", item="pear", places=[1, 2]) + written("stock", item="plum"))
    (_, first), (_, second) = said(step)
    assert first == '{"pear": 7, "places": [1, 2]}'
    assert second.startswith("error: item: 'plum'")
    assert said(env.step(written("stock", item="pear", places=None)))[0][1] == (
        '{"pear": 7, "places": null}'
    )


@pytest.mark.parametrize(
    ("tools", "options", "named"),
    [
        (["calculater"], {}, ["environment.tools", "calculater", "calculator"]),
        (["calculator", "calculator"], {}, ["environment.tools", "calculator"]),
        ([f"{HERE}:missing"], {}, ["environment.tools", "missing", "stock"]),
        ([f"{HERE}:untyped"], {}, ["untyped", "type hint"]),
        ([f"{HERE}:undocumented"], {}, ["undocumented", "docstring"]),
        ([f"{HERE}:variadic"], {}, ["variadic", "numbers"]),
        ([f"{HERE}:nested"], {}, ["nested", "sandbox"]),
        (["tests.environments.unloadable_tools:size"], {}, ["size", "numpy"]),
        (["lookup"], {}, ["lookup", "environment.files"]),
        (["lookup"], {"files": "/no/such/directory"}, ["environment.files", "/no/such/directory"]),
        (["calculator"], {"options": {"anser": "a"}}, ["environment.options.anser", "answer"]),
        ([], {}, ["environment.tools"]),
    ],
)
def test_bad_tools_are_named(tools: list[str], options: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UserError) as error:
        factory.check(config(tools, **options))
    assert all(word in str(error.value) for word in named), error.value


def test_a_shell_needs_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.environments.running.isolation", lambda wanted: False)
    with pytest.raises(UserError, match="namespaces"):
        factory.check(config(["shell"]))
    factory.check(config(["calculator"]))
