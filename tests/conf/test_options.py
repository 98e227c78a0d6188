"""Every option is declared once, with a sentence and a range that its default obeys; ranges are
checked, and the error holds the key, the value and what was expected.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from conf.labelling import ABConfig
from conf.options import (
    MISSING,
    OptionInfo,
    check_options,
    default_of,
    info_of,
    nested,
    option,
    same_option,
)
from conf.preparation import STEPS
from conf.schema import Config, GymConfig, RewardTerm, SourceConfig, TaskConfig, TinyConfig
from conf.stages import STAGES, WatchConfig


def _classes() -> Iterator[type]:
    yield Config
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.type):
            yield field.type  # type: ignore[misc]
    yield from (ABConfig, GymConfig, RewardTerm, SourceConfig, TaskConfig, TinyConfig, WatchConfig)
    yield from STAGES.values()
    yield from STEPS.values()


CLASSES = list(dict.fromkeys(_classes()))


@dataclass(slots=True, kw_only=True)
class Inner:
    """Options of an inner group."""

    depth: int = option(2, "How deep.", unit="metres", at_least=1)


@dataclass(slots=True, kw_only=True)
class Outer:
    """Options of an example."""

    share: float | None = option(None, "A share; null: none.", above=0, at_most=1, section="first")
    steps: int = option(3, "Steps.", unit="steps", at_least=1)
    title: str = option("t", "A title.", filled=True)
    level: int = option(0, "A level.", choices=(0, 1, 2))
    names: list[str] = option(["a"], "Names.")
    inner: Inner = nested(Inner)


@dataclass(slots=True, kw_only=True)
class Derived(Outer):
    """The same options with other defaults."""

    steps: int = same_option(Outer, "steps", 7, "Other steps.")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_option_has_a_sentence_and_a_default_inside_its_range(cls: type) -> None:
    for field in dataclasses.fields(cls):
        info = info_of(field)
        assert info.doc.endswith("."), field.name
        assert "\n\n" not in info.doc or dataclasses.is_dataclass(field.type), field.name
        default = default_of(field)
        assert default == MISSING or info.allows(default), field.name


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_option_that_may_be_null_by_default_says_what_null_means(cls: type) -> None:
    """Options whose null means only that nothing is given need no word of it."""
    for field in dataclasses.fields(cls):
        info = info_of(field)
        numeric = any(kind in (int, float) for kind in getattr(field.type, "__args__", ()))
        if default_of(field) is None and numeric:
            assert "null" in info.doc, f"{cls.__name__}.{field.name}: {info.doc}"


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"share": 0.0}, ("x.share=0.0", "(0, 1]", "null")),
        ({"share": math.nan}, ("x.share=nan", "finite", "null")),
        ({"share": math.inf}, ("x.share=inf", "finite")),
        ({"steps": 0}, ("x.steps=0", "at least 1 step.")),
        ({"title": " "}, ("x.title=' '", "not empty")),
        ({"level": 3}, ("x.level=3", "0, 1, 2")),
    ],
)
def test_a_value_out_of_range_is_refused_by_key_value_and_range(
    values: dict[str, object], parts: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match="out of range") as error:
        check_options(Outer(**values), "x")  # type: ignore[arg-type]
    for part in parts:
        assert part in str(error.value)


def test_values_inside_the_range_pass_and_none_is_a_matter_of_the_type() -> None:
    check_options(Outer())
    check_options(Outer(share=1.0, steps=1, level=2), "x")


def test_each_object_has_a_list_of_its_own() -> None:
    first, second = Outer(), Outer()
    first.names.append("b")
    assert second.names == ["a"]
    assert first.inner is not second.inner


def test_the_same_option_with_another_default_keeps_its_range() -> None:
    (field,) = (field for field in dataclasses.fields(Derived) if field.name == "steps")
    assert Derived().steps == 7
    assert info_of(field) == OptionInfo(doc="Other steps.", unit="steps", at_least=1)
    with pytest.raises(ValueError, match="steps=0"):
        check_options(Derived(steps=0))


def test_a_field_that_is_no_option_is_named() -> None:
    @dataclass
    class Plain:
        width: int = 3

    with pytest.raises(TypeError, match="width"):
        check_options(Plain())


@pytest.mark.parametrize(
    ("info", "text"),
    [
        (OptionInfo(doc="."), ""),
        (OptionInfo(doc=".", at_least=1, unit="tokens"), "at least 1 token"),
        (OptionInfo(doc=".", at_least=2, unit="tokens"), "at least 2 tokens"),
        (OptionInfo(doc=".", above=0, unit="s"), "above 0 s"),
        (OptionInfo(doc=".", above=0, unit="nats per token"), "above 0 nats per token"),
        (OptionInfo(doc=".", at_least=0, below=0.5), "in [0, 0.5)"),
        (OptionInfo(doc=".", at_least=1e6, at_most=1e13), "in [1e6, 1e13]"),
        (OptionInfo(doc=".", above=1e-8), "above 1e-8"),
        (OptionInfo(doc=".", at_least=1, at_most=100_000), "in [1, 100000]"),
        (OptionInfo(doc=".", at_most=3), "at most 3"),
    ],
)
def test_a_range_in_words(info: OptionInfo, text: str) -> None:
    assert info.range_text() == text
