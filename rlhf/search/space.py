"""The space of a search: which options take which values, checked against the options' own
declarations before anything runs.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from conf.schema import GROUPS, Config
from conf.stages import STAGES
from rlhf.cli import options, presets, writing
from rlhf.cli.options import Described
from rlhf.process.wording import describe
from rlhf.types import UserError

_WORDS = ("low", "high", "log", "step", "choices", "when")
# Options that say where a trial lives: the search sets them.
_OURS = ("run.name", "run.dir", "run.resume", "run.overwrite", "run.dry_run")
_ROUNDING = 1e-9  # of a range's last step, relative to the step


class Kind(Enum):
    """What a parameter's values are."""

    float = "float"
    int = "int"
    choice = "choice"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """An option that is searched, or a group whose presets are."""

    key: str  # such as stage.learning_rate, or the group adapter
    kind: Kind
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    choices: tuple[Any, ...] = ()
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def applies(self, values: Mapping[str, Any]) -> bool:
        """Whether it is searched beside the `values` of the parameters before it."""
        for key, allowed in self.when.items():
            if key not in values or not _among(values[key], allowed):
                return False
        return True

    @property
    def labels(self) -> tuple[str, ...]:
        """The choices as texts: 1 and true, or two lists, are then different values."""
        return tuple(writing.in_grammar(choice) for choice in self.choices)

    def chosen(self, label: str) -> Any:
        """The choice with this label."""
        return self.choices[self.labels.index(label)]

    def grid(self) -> list[Any]:
        """All values, for a grid: labels of choices, or the range's numbers. Raises UserError for a
        range without a step.
        """
        if self.kind is Kind.choice:
            return list(self.labels)
        step = self.step or (1.0 if self.kind is Kind.int else None)
        if step is None or self.log:
            raise UserError(
                f"stage.space: {self.key} has no end of values, so a grid can't hold it. Give it "
                "a step without log, or choices."
            )
        count = round((self.high - self.low) / step) + 1
        out: list[Any] = []
        for number in range(count):
            value = self.low + number * step
            out.append(int(value) if self.kind is Kind.int else value)
        return out


def _among(value: Any, allowed: Sequence[Any]) -> bool:
    return any(writing.same(value, other) for other in allowed)


def draw(parameters: Sequence[Parameter], suggest: Callable[[Parameter], Any]) -> dict[str, Any]:
    """A value for each parameter that applies, in their order."""
    values: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.applies(values):
            values[parameter.key] = suggest(parameter)
    return values


def complete(key: str) -> str:
    """An option's whole name: one that begins with no group of the configuration is the stage's
    own.
    """
    first = key.partition(".")[0]
    if any(first == field.name for field in fields(Config)):
        return key
    return f"stage.{key}"


# ---- from the configuration ----


def parameters(space: Mapping[str, Any], stage: str) -> list[Parameter]:
    """The parameters of ``stage.space``, for the preset `stage`. Raises UserError for an option
    that there isn't, and for values that its declaration doesn't allow.
    """
    declared = _declared(presets.stage_schema(stage))
    out: list[Parameter] = []
    for key, given in _flat(space, ""):
        if any(key == other.key for other in out):
            raise UserError(f"stage.space: {key} stands in it twice.")
        parameter = _parameter(key, given, _declaration(key, declared, stage))
        _check_when(parameter, out)
        out.append(parameter)
    if not out:
        raise UserError(
            "stage.space is empty: give at least one option, such as "
            "stage.space.learning_rate={low: 1e-5, high: 1e-3, log: true}."
        )
    return out


def _flat(space: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Keys with what they are given, from ``{"adapter.rank": {...}}`` and ``{adapter: {rank:
    {...}}}`` alike.
    """
    for name, value in space.items():
        key = complete(f"{prefix}{name}")
        if not isinstance(value, Mapping):
            raise UserError(
                f"stage.space: {key} is {describe(value)}: expected {{low, high}} or {{choices}}."
            )
        if _is_range(value):
            yield key, value
        else:
            yield from _flat(value, f"{key}.")


def _is_range(value: Mapping[str, Any]) -> bool:
    """Whether these are a parameter's values, and not options one level down."""
    own = [word for word in _WORDS if word in value and word != "when"]
    return any(not isinstance(value[word], Mapping) for word in own)


def _declared(schema: str) -> dict[str, Described]:
    """Every option of the configuration with this stage, by its key."""
    all_options = [*options.options_of(STAGES[schema], "stage."), *_group_options()]
    return {option.key: option for option in all_options}


def _group_options() -> Iterator[Described]:
    for option in options.options_of(Config, ""):
        if option.key != "stage":
            yield option


def _declaration(key: str, declared: Mapping[str, Described], stage: str) -> Described | None:
    """The option's declaration; None for a group of presets."""
    if key in GROUPS:
        return None
    if key in _OURS:
        raise UserError(f"stage.space: {key} says where a trial lives, and is set by the search.")
    general = options.general(key, list(declared))[0]
    if general not in declared:
        close = presets.nearest(key, [*declared, *GROUPS])
        raise UserError(f"stage.space: stage={stage} has no option {key}. Nearest: {close}.")
    return declared[general]


def _parameter(key: str, given: Mapping[str, Any], declared: Described | None) -> Parameter:
    unknown = [word for word in given if word not in _WORDS]
    if unknown:
        raise UserError(
            f"stage.space: {key} has {unknown[0]!r}: expected some of {', '.join(_WORDS)}."
        )
    when = _when(key, given.get("when") or {})
    if given.get("choices") is not None:
        others = [word for word in ("low", "high", "log", "step") if word in given]
        if others:
            raise UserError(f"stage.space: {key} has choices and {others[0]}: give one of them.")
        return _of_choices(key, given["choices"], when, declared)
    return _of_range(key, given, when, declared)


def _when(key: str, given: Any) -> dict[str, tuple[Any, ...]]:
    if not isinstance(given, Mapping):
        raise UserError(f"stage.space: {key}.when is {describe(given)}: expected {{option: value}}")
    out = {}
    for other, values in _flat_conditions(given, ""):
        several = values if isinstance(values, list) else [values]
        out[complete(other)] = tuple(several)
    return out


def _flat_conditions(given: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in given.items():
        if isinstance(value, Mapping):
            yield from _flat_conditions(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _check_when(parameter: Parameter, before: Sequence[Parameter]) -> None:
    """A condition names a parameter of choices that stands before. Raises UserError."""
    known = {other.key: other for other in before}
    for key, values in parameter.when.items():
        place = f"stage.space: {parameter.key}.when"
        if key not in known:
            raise UserError(
                f"{place} names {key}, which is none of the parameters before it: "
                f"{', '.join(known) or 'there are none'}."
            )
        choices = known[key].choices
        for value in values:
            if not _among(value, choices):
                shown = ", ".join(known[key].labels) or "none: it is a range"
                raise UserError(f"{place} has {key}={value!r}: expected one of its choices {shown}")


# ---- choices ----


def _of_choices(
    key: str, choices: Any, when: Mapping[str, tuple[Any, ...]], declared: Described | None
) -> Parameter:
    if not isinstance(choices, list) or not choices:
        raise UserError(f"stage.space: {key}.choices is {describe(choices)}: expected a list.")
    for choice in choices:
        if declared is not None:
            _check_value(key, choice, declared)
        elif not isinstance(choice, str):
            raise UserError(
                f"stage.space: {key} has the choice {choice!r}: expected a preset of the group, "
                f"such as {presets.choices(key)[0]}."
            )
    parameter = Parameter(key=key, kind=Kind.choice, choices=tuple(choices), when=when)
    if len(set(parameter.labels)) < len(choices):
        raise UserError(f"stage.space: {key}.choices has a value twice: {choices}.")
    return parameter


def _check_value(key: str, value: Any, declared: Described) -> None:
    """One value against type, range and choices of its option. Raises UserError."""
    kind, fits = declared.kind, True
    if value is None:
        fits = kind.endswith(" or null") or kind == "any"
    else:
        fits = _fits(value, kind.removesuffix(" or null"))
    if not fits or not declared.info.allows(value):
        raise UserError(f"stage.space: {key}={value!r} is not allowed: expected {declared.facts}.")


def _fits(value: Any, kind: str) -> bool:
    """Whether a value has the type that `kind` is in words (rlhf.cli.options.type_text)."""
    if kind.startswith("one of "):
        return str(value) in kind.removeprefix("one of ").split("|")
    if kind.startswith("list"):
        return isinstance(value, list)
    match kind:
        case "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "float":
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case "true or false":
            return isinstance(value, bool)
        case "text":
            return isinstance(value, str)
        case "dictionary":
            return isinstance(value, dict)
    return True


# ---- ranges ----


def _of_range(
    key: str,
    given: Mapping[str, Any],
    when: Mapping[str, tuple[Any, ...]],
    declared: Described | None,
) -> Parameter:
    kind = declared.kind.removesuffix(" or null") if declared is not None else "group"
    if kind not in ("int", "float"):
        raise UserError(
            f"stage.space: {key} is no number ({kind}): expected choices, and no low and high."
        )
    low = _number(key, given, "low")
    high = _number(key, given, "high")
    step = None
    if given.get("step") is not None:
        step = _number(key, given, "step")
    log = given.get("log", False)
    place = f"stage.space: {key}"
    if not isinstance(log, bool):
        raise UserError(f"{place}.log={log!r}: expected true or false.")
    if not low < high:
        raise UserError(f"{place} has low={low:g} and high={high:g}: expected low below high.")
    if log and (low <= 0 or step is not None):
        raise UserError(f"{place} has log: expected low above 0 and no step, not {dict(given)}.")
    if step is not None and not _divides(step, high - low):
        raise UserError(f"{place}.step={step:g}: expected a part of high - low = {high - low:g}.")
    assert declared is not None
    for number in (low, high, step):
        if kind == "int" and number is not None and not number.is_integer():
            raise UserError(f"{place} has {number:g}: the option is a whole number.")
    for number in (low, high):
        value = int(number) if kind == "int" else number
        _check_value(key, value, declared)
    return Parameter(key=key, kind=Kind(kind), low=low, high=high, log=log, step=step, when=when)


def _divides(step: float, length: float) -> bool:
    if step <= 0:
        return False
    steps = length / step
    return steps >= 1 - _ROUNDING and math.isclose(steps, round(steps), rel_tol=_ROUNDING)


def _number(key: str, given: Mapping[str, Any], word: str) -> float:
    value = given.get(word)
    is_truth = isinstance(value, bool)
    if is_truth or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(
            f"stage.space: {key}.{word} is {describe(value)}: expected a number ({word} of "
            "{low, high}), or choices in place of the range."
        )
    return float(value)
