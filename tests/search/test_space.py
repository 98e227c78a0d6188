"""The space of a search: what it refuses before anything runs, and what it is made of."""

from typing import Any

import pytest

from rlhf.cli import config
from rlhf.search.space import Kind, complete, draw, parameters
from rlhf.types import UserError

RATE = {"low": 1e-5, "high": 1e-3, "log": True}


def test_ranges_and_choices_by_any_spelling() -> None:
    nested = {"stage": {"learning_rate": RATE}, "adapter": {"rank": {"choices": [8, 16]}}}
    dotted = {"stage.learning_rate": RATE, "adapter.rank": {"choices": [8, 16]}}
    short = {"learning_rate": RATE, "adapter": {"rank": {"choices": [8, 16]}}}
    rate, rank = parameters(nested, "sft")
    assert (rate.key, rate.kind, rate.low, rate.log) == (
        "stage.learning_rate",
        Kind.float,
        1e-5,
        True,
    )
    assert (rank.key, rank.kind, rank.choices) == ("adapter.rank", Kind.choice, (8, 16))
    assert parameters(dotted, "sft") == parameters(short, "sft") == [rate, rank]
    assert complete("steps") == "stage.steps" and complete("data.path") == "data.path"


def test_the_command_line_has_it_as_a_dictionary_or_by_keys() -> None:
    whole = "stage.space={stage.learning_rate:{low:1e-5,high:1e-3,log:true}}"
    keys = [f"stage.space.learning_rate.{key}" for key in ("low=1e-5", "high=1e-3", "log=true")]
    for overrides in ([whole], keys):
        cfg = config.compose(["stage=search", *overrides])
        (rate,) = parameters(cfg.stage.space, "sft")
        assert (rate.key, rate.low, rate.high, rate.log) == (
            "stage.learning_rate",
            1e-5,
            1e-3,
            True,
        )


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "empty"),
        (
            {"stage.learning_rat": RATE},
            "no option stage.learning_rat. Nearest: stage.learning_rate",
        ),
        ({"learning_rate": 3}, "stage.learning_rate is a number 3"),
        ({"learning_rate": {"low": 1e-5}}, r"learning_rate\.high is null"),
        ({"learning_rate": {"low": 1.0, "high": 0.1}}, "low below high"),
        ({"learning_rate": {"low": 0.0, "high": 0.1, "log": True}}, "low above 0"),
        ({"learning_rate": {"low": -1.0, "high": 0.1}}, "learning_rate=-1.0 is not allowed"),
        ({"learning_rate": {**RATE, "high": 1e-3, "steps": 3}}, "has 'steps'"),
        ({"learning_rate": {**RATE, "choices": [1e-3]}}, "choices and low"),
        ({"batch_size": {"low": 1.5, "high": 4}}, "whole number"),
        ({"batch_size": {"low": 0, "high": 4}}, "batch_size=0 is not allowed"),
        ({"batch_size": {"choices": [8, 2.5]}}, "batch_size=2.5 is not allowed: expected int"),
        ({"batch_size": {"choices": [8, 8]}}, "a value twice"),
        ({"batch_size": {"choices": 8}}, "expected a list"),
        ({"batch_size": {"low": 8, "high": 15, "step": 4}}, "a part of high - low = 7"),
        ({"packing": {"low": 0, "high": 1}}, "is no number"),
        ({"packing": {"choices": [True, "yes"]}}, "packing='yes' is not allowed"),
        ({"scheduler": {"choices": ["linea"]}}, "scheduler='linea' is not allowed"),
        ({"run.name": {"choices": ["a", "b"]}}, "set by the search"),
        ({"adapter": {"low": 1, "high": 2}}, "is no number"),
        (
            {"adapter.rank": {"choices": [8], "when": {"adapter": "lora"}}},
            "names adapter, which is none of the parameters before it",
        ),
        (
            {
                "adapter": {"choices": ["none", "lora"]},
                "adapter.rank": {"choices": [8], "when": {"adapter": "lor"}},
            },
            "adapter='lor': expected one of its choices none, lora",
        ),
    ],
)
def test_what_cannot_work_is_refused(space: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parameters(space, "sft")


def test_a_condition_leaves_a_parameter_out() -> None:
    space = {
        "adapter": {"choices": ["none", "lora"]},
        "adapter.rank": {"choices": [8, 16], "when": {"adapter": ["lora"]}},
        "adapter.alpha": {"low": 1.0, "high": 9.0, "when": {"adapter.rank": 16}},
    }
    found = parameters(space, "sft")
    values = {"adapter": "lora", "adapter.rank": 8, "adapter.alpha": 2.0}
    assert draw(found, lambda each: values[each.key]) == {"adapter": "lora", "adapter.rank": 8}
    assert draw(found, lambda each: (values | {"adapter": "none"})[each.key]) == {"adapter": "none"}
    assert len(draw(found, lambda each: (values | {"adapter.rank": 16})[each.key])) == 3


def test_a_grid_needs_an_end_of_values() -> None:
    space = {"batch_size": {"low": 8, "high": 16, "step": 4}, "packing": {"choices": [True, False]}}
    sizes, packing = parameters(space, "sft")
    assert sizes.grid() == [8, 12, 16] and packing.grid() == ["true", "false"]
    (rate,) = parameters({"learning_rate": RATE}, "sft")
    with pytest.raises(UserError, match=r"learning_rate has no end of values"):
        rate.grid()


def test_choices_that_equal_each_other_are_two() -> None:
    """1 and True are equal in Python, and in optuna's choices."""
    (found,) = parameters({"data": {"cache": {"choices": [True, False]}}}, "sft")
    assert found.labels == ("true", "false") and found.chosen("true") is True
    (found,) = parameters(
        {"adapter.targets": {"choices": [["q_proj"], ["q_proj", "v_proj"]]}}, "sft"
    )
    assert found.chosen(found.labels[1]) == ["q_proj", "v_proj"]
