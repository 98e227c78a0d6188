"""Overrides as text: what Hydra reads back is the value that was written."""

from typing import Any

import pytest

from rlhf.cli.writing import override, same
from rlhf.types import UserError

NASTY = [
    "plain",
    "",
    " blanks around ",
    "true",
    "NULL",
    "inf",
    "nan",
    "1e5",
    "007",
    "-3",
    "a,b",
    "a=b",
    "{a: 1}",
    "[1, 2]",
    "it's",
    'say "so"',
    "back\\slash",
    "ends in \\",
    'mixed \\" and \\\\"',
    "choice(a, b)",
    "a:b",
    "#500",
    "~/x",
    "~stage",
    "100 % 'sure', \"really\"",
    "日本語、中文 ü",
    "\u202eright to left",
    "a\tb",
    "$(rm -rf x) `x` $HOME ; &&",
]


@pytest.mark.parametrize("text", NASTY)
def test_a_text_comes_back_as_it_is(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    assert parser.parse_override(override("a.b", text)).value() == text
    assert parser.parse_override(override("a.b", [text, "x"])).value() == [text, "x"]
    inside = parser.parse_override(override("a.b", {"k": {"l": text}})).value()
    assert inside == {"k": {"l": text}}


@pytest.mark.parametrize("value", [None, True, False, 0, -7, 1.0, 1e-5, 2.5e16, [], {}, [1, [2.5]]])
def test_other_values_keep_their_types(value: Any) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    read = OverridesParser.create().parse_override(override("a", value)).value()
    assert same(read, value)


@pytest.mark.parametrize("key", ["with blank", "a:b", "a,b", "x=y", "k.v", ".*layers\\.0", "a(b)"])
def test_keys_of_dictionaries_are_escaped(key: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    read = OverridesParser.create().parse_override(override("a", {key: 1})).value()
    assert read == {key: 1}


@pytest.mark.parametrize("value", ["${run.name}", ["a", "${oc.env:HOME}"], {"'": 1}, {"true": 1}])
def test_what_the_grammar_cannot_hold_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match=r"run\.name"):
        override("run.name", value)


def test_equal_values_of_other_types_differ() -> None:
    assert same({"a": [1, 2.0]}, {"a": [1, 2.0]})
    assert not same(1, True) and not same(1, 1.0) and not same("1", 1)
    assert not same({"a": 1}, {"b": 1}) and not same([1], [1, 2]) and not same(None, False)
