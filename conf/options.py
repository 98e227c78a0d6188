"""Declares an option in one place: its default, one sentence, its unit, its range and its choices.

    temperature: float = option(1.0, "Softmax temperature of sampling.", above=0)

Everything else reads that declaration: the range errors (`check_options`), ``--help``,
docs/configuration.md and conf/schema.json (all three in rlhf/cli/). Standard library only.
"""

import copy
import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from types import NoneType
from typing import Any, TypeVar, get_args

MISSING: Any = "???"  # OmegaConf's marker of a mandatory value
_KEY = "option"  # the key of an OptionInfo in a dataclass field's metadata
_DEFAULT = TypeVar("_DEFAULT")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionInfo:
    """What is known about an option beside its name, type and default."""

    doc: str  # one plain sentence
    unit: str | None = None
    above: float | None = None  # the smallest value that is not allowed
    at_least: float | None = None  # the smallest value that is allowed
    below: float | None = None  # the largest value that is not allowed
    at_most: float | None = None  # the largest value that is allowed
    choices: tuple[object, ...] = ()  # allowed values; those of an enumeration are its members
    filled: bool = False  # a text or list must not be empty
    section: str | None = None  # title of the options from this one to the next that has a title

    def allows(self, value: object) -> bool:
        """Whether `value` is inside the range. None always is: the type decides about it."""
        if value is None:
            return True
        if self.filled and not (value.strip() if isinstance(value, str) else value):
            return False
        if self.choices and value not in self.choices:
            return False
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return not isinstance(value, (int, float)) or self._in_bounds(value)

    def _in_bounds(self, value: float) -> bool:
        return (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    def range_text(self) -> str:
        """The range in words, such as ``at least 1 token`` or ``in (0, 1]``; empty without one."""
        if self.choices:
            return f"one of {', '.join(str(choice) for choice in self.choices)}"
        if self.filled:
            return "not empty"
        low = self.above if self.above is not None else self.at_least
        high = self.below if self.below is not None else self.at_most
        if low is not None and high is not None:
            left = "(" if self.above is not None else "["
            right = ")" if self.below is not None else "]"
            return f"in {left}{_number(low)}, {_number(high)}{right}{self._unit_after(high)}"
        if low is not None:
            word = "above" if self.above is not None else "at least"
            return f"{word} {_number(low)}{self._unit_after(low)}"
        if high is not None:
            word = "below" if self.below is not None else "at most"
            return f"{word} {_number(high)}{self._unit_after(high)}"
        return ""

    def _unit_after(self, number: float) -> str:
        """The unit with a space before it, in the singular after 1."""
        if self.unit is None:
            return ""
        first, space, rest = self.unit.partition(" ")
        if number == 1 and len(first) > 1:
            first = first.removesuffix("s")
        return f" {first}{space}{rest}"


def _number(value: float) -> str:
    """A bound as people write it: 1e6, not 1e+06."""
    return re.sub(r"e\+?(-?)0*", r"e\1", f"{value:g}")


def option(
    default: _DEFAULT,
    doc: str,
    *,
    unit: str | None = None,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices: Sequence[object] = (),
    filled: bool = False,
    section: str | None = None,
) -> _DEFAULT:
    """An option of a configuration dataclass.

    `doc` is one plain sentence. A default of None means "not set", and `doc` says what follows from
    that. `section` is a title for this option and those below it, up to the next title.
    """
    info = OptionInfo(
        doc=doc,
        unit=unit,
        above=above,
        at_least=at_least,
        below=below,
        at_most=at_most,
        choices=tuple(choices),
        filled=filled,
        section=section,
    )
    return _field(default, info)


def nested(cls: type[_DEFAULT], *, section: str | None = None) -> _DEFAULT:
    """Options in a dataclass of their own inside another dataclass; its docstring describes it."""
    info = OptionInfo(doc=(cls.__doc__ or "").strip(), section=section)
    field: Any = dataclasses.field(default_factory=cls, metadata={_KEY: info})
    return field


def same_option(base: type, name: str, default: _DEFAULT, doc: str | None = None) -> _DEFAULT:
    """The option `name` of the dataclass `base` with another default, for a class derived from it.
    Its sentence, unit and range stay, unless `doc` replaces the sentence.
    """
    (field,) = (field for field in dataclasses.fields(base) if field.name == name)
    info = info_of(field)
    if doc is not None:
        info = dataclasses.replace(info, doc=doc)
    return _field(default, info)


def _field(default: Any, info: OptionInfo) -> Any:
    metadata = {_KEY: info}
    if isinstance(default, (list, dict)):  # each object gets a copy of its own
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def info_of(field: "dataclasses.Field[Any]") -> OptionInfo:
    """The declaration of a dataclass's field. Raises TypeError for one made without `option`."""
    info = field.metadata.get(_KEY)
    if not isinstance(info, OptionInfo):
        raise TypeError(f"{field.name}: declare it with conf.options.option(...).")
    return info


def default_of(field: "dataclasses.Field[Any]") -> Any:
    """An option's default; MISSING for one that has to be set."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def check(condition: bool, key: str, value: object, expected: str) -> None:
    """Raise ValueError that names the option, its value and what was expected."""
    if not condition:
        raise ValueError(f"{key}={value!r} is out of range: expected {expected}.")


def check_options(options: Any, key: str = "") -> None:
    """Raise ValueError for the first option of a dataclass whose value is out of its range.

    `key` is the dotted name of the dataclass in the configuration, such as ``model.tiny``; a
    preparation step has none.
    """
    for field in dataclasses.fields(options):
        info = info_of(field)
        value = getattr(options, field.name)
        if info.allows(value):
            continue
        expected = info.range_text()
        if isinstance(value, float) and not math.isfinite(value):
            expected = f"a finite number {expected}".strip()
        if NoneType in get_args(field.type):
            expected = f"{expected}, or null"
        name = f"{key}.{field.name}" if key else field.name
        check(False, name, value, expected)


def names(values: Sequence[Enum]) -> list[str]:
    """The values of enumeration members as the command line writes them."""
    return [str(value.value) for value in values]
