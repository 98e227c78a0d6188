"""What other parts of the toolkit say in English (sentences of options, figures of a dry run,
errors of relations between options), in the reader's language.

``words/said_*.zh.json`` has the Chinese by the English. In it ``{}`` stands for what differs (an
option's name, a value) and is kept, ``{#}`` for a number, ``{~}`` for a part that is a text of its
own. The Chinese names them by their place (``{2}``) where it has another order.
"""

import functools
import json
import re
from dataclasses import dataclass
from importlib import resources

ENGLISH = "en"
PARTS = ("options", "titles", "presets", "figures", "relations", "errors")
_HOLE = re.compile(r"\{([~#]|\d*)\}")
_HOLDS = {"#": r"([\d.,e+-]+)"}  # the rest holds anything
_LONGEST = 2000  # characters of a text that patterns are tried on


@dataclass(frozen=True, slots=True)
class Said:
    """A text and its language, None where that is the page's."""

    text: str
    language: str | None = None


def said(text: str, language: str) -> Said:
    """The text in a language; as it is, and marked as English, where that is not known."""
    if language == ENGLISH or not text:
        return Said(text)
    other = _translated(text, language)
    return Said(text, ENGLISH) if other is None else Said(other)


def part(name: str, language: str) -> dict[str, str]:
    """The texts of one of `PARTS` by the English ones."""
    path = resources.files("rlhf.board") / "words" / f"said_{name}.{language}.json"
    held: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return held


@dataclass(frozen=True, slots=True)
class _Pattern:
    english: "re.Pattern[str]"
    again: tuple[bool, ...]  # of each hole: whether it is a text of its own
    other: str

    def fill(self, match: "re.Match[str]", language: str) -> str:
        """The other language's text with what the English one has in its holes."""
        inner = []
        for text, again in zip(match.groups(), self.again, strict=True):
            inner.append((again and _translated(text, language)) or text)
        following = iter(inner)

        def put(hole: "re.Match[str]") -> str:
            return inner[int(hole[1]) - 1] if hole[1].isdigit() else next(following)

        return _HOLE.sub(put, self.other)


def _translated(text: str, language: str) -> str | None:
    exact, patterns = _known(language)
    if text in exact:
        return exact[text]
    if len(text) > _LONGEST:
        return None
    for pattern in patterns:
        match = pattern.english.fullmatch(text)
        if match is not None:
            return pattern.fill(match, language)
    return None


@functools.cache
def _known(language: str) -> tuple[dict[str, str], list[_Pattern]]:
    """Whole texts; patterns, those with most words of their own first."""
    exact: dict[str, str] = {}
    holed: dict[str, str] = {}
    for name in PARTS:
        for english, other in part(name, language).items():
            (holed if _HOLE.search(english) else exact)[english] = other
    order = sorted(holed, key=lambda english: len(_HOLE.sub("", english)), reverse=True)
    return exact, [_pattern(english, holed[english]) for english in order]


def _pattern(english: str, other: str) -> _Pattern:
    expression, at, again = "", 0, []
    for hole in _HOLE.finditer(english):
        expression += re.escape(english[at : hole.start()]) + _HOLDS.get(hole[1], "(.+?)")
        at = hole.end()
        again.append(hole[1] == "~")
    expression += re.escape(english[at:])
    return _Pattern(re.compile(expression, re.DOTALL), tuple(again), other)
