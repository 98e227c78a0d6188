"""The gate: what a version's figures must be before an alias goes to it."""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.registry.records import Figure
from rlhf.types import UserError

_RULE = re.compile(r"\s*(\S+?)\s*(>=|<=|>|<)\s*([-+]?[\d.]+(?:e[-+]?\d+)?)\s*", re.IGNORECASE)
_COMPARES: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
Figures = Mapping[str, Figure]


@dataclass(frozen=True, slots=True)
class Rule:
    """A bound on one figure."""

    figure: str
    sign: str  # >=, <=, > or <
    bound: float

    def __str__(self) -> str:
        return f"{self.figure} {self.sign} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule says of a version."""

    passed: bool
    text: str  # with the figures

    def as_json(self) -> dict[str, Any]:
        return {"passed": self.passed, "text": self.text}


@dataclass(frozen=True, slots=True)
class Gate:
    """Rules over a version's own figures, and over the difference to the version that holds the
    alias: how far a figure may lie below its (`drops`) or above (`rises`).
    """

    rules: tuple[Rule, ...] = ()
    drops: Mapping[str, float] | None = None
    rises: Mapping[str, float] | None = None

    def findings(self, own: Figures, holder: Figures | None) -> list[Finding]:
        """What every rule says. `holder`: figures of the version that holds the alias; None where
        none does, and then nothing is compared, which is said.
        """
        out = [_bound(rule, own) for rule in self.rules]
        for name, most in (self.drops or {}).items():
            out.append(_difference(name, most, own, holder, falling=True))
        for name, most in (self.rises or {}).items():
            out.append(_difference(name, most, own, holder, falling=False))
        return out


def parse_rule(text: str) -> Rule:
    """A rule such as ``eval/score_shift_sd >= 0.2``. Raises UserError."""
    match = _RULE.fullmatch(text)
    number = None
    if match is not None:
        try:
            number = float(match[3])
        except ValueError:
            number = None
    if match is None or number is None:
        raise UserError(
            f"stage.rules: {text!r} is no rule. Expected FIGURE >= NUMBER (or <=, >, <), such as "
            "'eval/score_shift_sd >= 0.2'."
        )
    return Rule(match[1], match[2], number)


def gate_of(rules: Sequence[str], drops: Mapping[str, float], rises: Mapping[str, float]) -> Gate:
    """The gate that the options ask for. Raises UserError for a text that is no rule."""
    return Gate(tuple(parse_rule(rule) for rule in rules), dict(drops), dict(rises))


def _bound(rule: Rule, own: Figures) -> Finding:
    figure = own.get(rule.figure)
    if figure is None:
        return Finding(False, f"{rule}: {rule.figure} was not measured")
    passed = _COMPARES[rule.sign](figure.value, rule.bound)
    return Finding(passed, f"{rule}: it is {figure.value:g} ({figure.source})")


def _difference(
    name: str, most: float, own: Figures, holder: Figures | None, *, falling: bool
) -> Finding:
    word = "drop" if falling else "rise"
    rule = f"largest {word} of {name} {most:g}"
    if name not in own:
        return Finding(False, f"{rule}: it was not measured")
    if holder is None:
        return Finding(True, f"{rule}: no version holds the alias, so nothing is compared")
    if name not in holder:
        return Finding(False, f"{rule}: it was not measured of the version that holds the alias")
    before, now = holder[name].value, own[name].value
    moved = before - now if falling else now - before
    return Finding(moved <= most, f"{rule}: it went from {before:g} to {now:g}")
