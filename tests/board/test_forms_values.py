"""One field's value as text and back."""

from typing import Any

import pytest

from rlhf.board.forms.basic import stages
from rlhf.board.forms.fields import Field, Scalar, Widget, form_of
from rlhf.board.forms.rows import ROWS, default_of
from rlhf.board.forms.values import Problem, plain, read, scalar, shown, texts, told


def field_of(stage: str, key: str) -> Field:
    return next(each for each in form_of(stage, True) if each.key == key)


@pytest.mark.parametrize("stage", stages())
def test_every_default_survives_the_way_through_text(stage: str) -> None:
    for each in form_of(stage, True).options:
        if each.widget not in ROWS and not each.required:
            value = default_of(each)
            assert read(each, texts(each, value)) == value, each.key


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("stage.kl_coef", " 1e-2 ", 0.01),
        ("stage.steps", "7", 7),
        ("engine.share_prompts", "", None),
        ("engine.share_prompts", "true", True),
        ("adapter.targets", "q_proj\r\n\r\nv_proj", ["q_proj", "v_proj"]),
        ("stage.dpo_weights", "1\n0.5", [1.0, 0.5]),
        ("stage.dpo_weights", "", None),
        ("data.path", "", None),
        ("data.gym.suffix", " Answer: ", " Answer: "),
        ("engine.zero_stage", "2", 2),
    ],
)
def test_texts_as_values(key: str, text: str, value: Any) -> None:
    assert read(field_of("ppo", key), [text]) == value


@pytest.mark.parametrize(
    ("key", "text", "word"),
    [
        ("stage.kl_coef", "-1", "range"),
        ("stage.kl_coef", "", "empty"),
        ("stage.kl_coef", "nan", "number"),
        ("stage.kl_coef", "1e999", "number"),
        ("stage.kl_coef", "1,5", "number"),
        ("stage.steps", "0", "range"),
        ("stage.steps", "1.5", "whole"),
        ("stage.steps", "9" * 5000, "whole"),
        ("stage.steps", "٣", "whole"),
        ("adapter.name", " ", "empty"),
        ("adapter.name", "a\nb", "line"),
        ("adapter.name", "a\x00b", "line"),
        ("adapter.name", "${oc.env:HOME}", "reference"),
        ("adapter.targets", "", "empty"),
        ("engine.zero_stage", "9", "choice"),
        ("stage.advantage", "", "empty"),
        ("stage.dropout", "yes", "choice"),
        ("stage.dpo_losses", "sigmoid\nnone", "choice"),
        ("data.gym.suffix", "x" * 100_001, "long"),
    ],
)
def test_texts_that_are_no_values(key: str, text: str, word: str) -> None:
    with pytest.raises(Problem) as caught:
        read(field_of("ppo", key), [text])
    assert caught.value.word == f"forms.error.{word}"


def test_any_of_several_values() -> None:
    many = field_of("eval", "stage.judges")
    assert many.widget is Widget.many
    assert read(many, ["", "classifier", "lexicon"]) == ["classifier", "lexicon"]
    assert read(many, [""]) == []
    with pytest.raises(Problem):
        read(many, ["other"])


@pytest.mark.parametrize(
    "value", [3, 2.5, True, None, "text", "3", "true", "", "null", [1, "a"], "a [b", {"a": [1]}]
)
def test_anything_comes_back_with_its_type(value: Any) -> None:
    read_back = scalar(shown(value, Scalar.anything), Scalar.anything)
    assert read_back == value and type(read_back) is type(value)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999", "9" * 400, "[" * 90_000 + "x"])
def test_numbers_that_are_none_stay_texts(text: str) -> None:
    assert scalar(text, Scalar.anything) == text


def test_dataclasses_and_enumerations_as_json() -> None:
    from conf.choices import TermKind
    from conf.reward import RewardTerm

    made = plain({"a": [RewardTerm(kind=TermKind.math)]})
    assert made["a"][0]["kind"] == "math" and made["a"][0]["paths"] == []
    assert told("x").values == {"text": "x"}


def test_ranges_in_signs() -> None:
    from conf.options import OptionInfo
    from rlhf.board.forms.values import in_signs

    assert in_signs(OptionInfo(doc="", at_least=1)) == "≥ 1"
    assert in_signs(OptionInfo(doc="", above=0, at_most=1)) == "(0, 1]"
    assert in_signs(OptionInfo(doc="", below=0.5)) == "< 0.5"
    assert in_signs(OptionInfo(doc="")) == ""
