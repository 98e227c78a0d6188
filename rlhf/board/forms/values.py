"""One field's value as text and back. What can't be read is a `Problem`, in words of both
languages.
"""

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from enum import Enum
from typing import Any

from conf.options import OptionInfo
from rlhf.board.forms.fields import Field, Scalar, Widget
from rlhf.cli.options import value_text

_WHOLE = re.compile(r"[+-]?\d{1,18}", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
_LONGEST = 100_000  # characters of one text


@dataclass(eq=False)
class Problem(Exception):
    """Why a value can't be used: a key of the words and what stands in it."""

    word: str
    values: Mapping[str, str] = field(default_factory=dict)


TOLD = "told"  # no key of the words: rlhf.board.said knows the text, or it stays English


def told(message: str) -> Problem:
    """What the configuration says itself, in English."""
    return Problem(TOLD, {"text": message})


def plain(value: Any) -> Any:
    """A value of the configuration as JSON has it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if is_dataclass(value) and not isinstance(value, type):
        names = value.__dataclass_fields__
        return {name: plain(getattr(value, name)) for name in names}
    return value


# ---- to text ----


def shown(value: Any, scalar: Scalar = Scalar.text) -> str:
    """One value as a field shows it."""
    if scalar is Scalar.anything:
        return _as_anything(value)
    if value is None:
        return ""
    return value if isinstance(value, str) else value_text(value)


def _as_anything(value: Any) -> str:
    if isinstance(value, str) and value and _anything(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)


def texts(of: Field, value: Any) -> list[str]:
    """The texts that a plain field (no dictionary, no steps) has for a value."""
    if of.widget is Widget.many:
        return [shown(item) for item in value or []]
    if of.widget is Widget.lines:
        return ["\n".join(shown(item, of.scalar) for item in value or [])]
    return [shown(value, of.scalar)]


# ---- from text ----


def read(of: Field, given: Sequence[str]) -> Any:
    """The value that a plain field's texts stand for. Raises Problem."""
    if of.widget is Widget.many:
        value: Any = _items(of, [text for text in given if text])
    elif of.widget is Widget.lines:
        lines = last(given).splitlines()
        value = _items(of, [line for line in lines if line.strip()])
    else:
        value = _single(of, last(given))
    if of.option is None:
        return value
    info = of.option.info
    if not info.allows(value):
        if info.filled:
            raise Problem("forms.error.empty")
        raise Problem("forms.error.range", {"range": in_signs(info) or info.range_text()})
    return value


def in_signs(info: OptionInfo) -> str:
    """The range in signs that every language has; empty without one."""
    lows = [("> ", "(", info.above), ("≥ ", "[", info.at_least)]
    highs = [("< ", ")", info.below), ("≤ ", "]", info.at_most)]
    low = [limit for limit in lows if limit[2] is not None]
    high = [limit for limit in highs if limit[2] is not None]
    if low and high:
        return f"{low[0][1]}{low[0][2]:g}, {high[0][2]:g}{high[0][1]}"
    return "".join(f"{sign}{number:g}" for sign, _, number in (*low, *high))


def last(given: Sequence[str]) -> str:
    """The text of a field that has one: a box sends a text before it, too."""
    return given[-1] if given else ""


def _items(of: Field, given: Sequence[str]) -> list[Any] | None:
    for text in given:
        if of.choices and text not in of.choices:
            raise Problem("forms.error.choice", {"text": text})
    if not given and of.nullable:
        return None
    return [scalar(text, of.scalar) for text in given]


def _single(of: Field, text: str) -> Any:
    if of.scalar is not Scalar.text or of.choices:
        text = text.strip()
    if not text and of.nullable:
        return None
    if of.choices and text not in of.choices:
        if not text:
            raise Problem("forms.error.empty")
        raise Problem("forms.error.choice", {"text": text})
    if not text and (of.scalar is not Scalar.text or of.required):
        raise Problem("forms.error.empty")
    return scalar(text, of.scalar)


def scalar(text: str, kind: Scalar) -> Any:
    """One text as a value of its kind. Raises Problem."""
    if len(text) > _LONGEST:
        raise Problem("forms.error.long", {"most": str(_LONGEST)})
    match kind:
        case Scalar.whole:
            return _number(text.strip(), _WHOLE, "forms.error.whole", int)
        case Scalar.number:
            return _number(text.strip(), _NUMBER, "forms.error.number", float)
        case Scalar.truth:
            if text not in ("true", "false"):
                raise Problem("forms.error.choice", {"text": text})
            return text == "true"
        case Scalar.anything:
            return _checked(_anything(text))
        case Scalar.text:
            return _checked(text)


def _number(text: str, pattern: re.Pattern[str], word: str, make: type) -> Any:
    if not pattern.fullmatch(text):
        raise Problem(word, {"text": text})
    value = make(text)
    if not math.isfinite(value):
        raise Problem(word, {"text": text})
    return value


def _checked(value: Any) -> Any:
    """Texts of one line, without references to other options."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _checked(key)
            _checked(inner)
    elif isinstance(value, list):
        for inner in value:
            _checked(inner)
    elif isinstance(value, str):
        if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in value):
            raise Problem("forms.error.line")
        if "${" in value:
            raise Problem("forms.error.reference")
    return value


def _anything(text: str) -> Any:
    """JSON where it is, else the text."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text
    too_large = isinstance(value, int) and abs(value) >= 10**18
    unsure = isinstance(value, float) and not math.isfinite(value)
    if too_large or unsure:
        return text
    return value


def _refuse(name: str) -> Any:
    raise ValueError(name)
