"""How the options of another toolkit are declared: a `Key` for each, with ours or the reason why
there is none.

A key that ends with ``*`` stands for all that begin so and have no entry of their own; ``[]``
stands for any item of a list (``datasets[].path``).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any


class Fate(Enum):
    """What becomes of a key."""

    taken = "taken over"
    computed = "computed"
    idle = "without effect here"
    impossible = "not possible"
    unknown = "unknown"


@dataclass(frozen=True, slots=True)
class Answer:
    """What becomes of a key with its value: our options (a group's name chooses a preset), and what
    has to be said about it. stops: the file is for a task that no stage of ours has.
    """

    fate: Fate
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    stops: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that a key's computation may look at."""

    command: str  # theirs, such as rlhf or train_dpo
    given: Mapping[str, Any]  # key: value, as the file has them
    defaults: Mapping[str, Any]  # theirs, for keys that are left out
    file: Path
    ranks: int = 1
    rows: int | None = None  # of the training data
    stage: str = ""  # ours
    schema: str = ""  # the stage's entry in conf.stages.STAGES

    def get(self, *names: str) -> Any:
        """The value of the first key that is set, or of the first that has a default; None where
        there is none.
        """
        for values in (self.given, self.defaults):
            for name in names:
                if values.get(name) is not None:
                    return values[name]
        return None

    @property
    def online(self) -> bool:
        """Whether the stage writes responses."""
        return self.schema == "ppo"


Convert = Callable[[Settings, Any], Answer]
Compute = Callable[[Settings], Answer]
Read = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Key:
    """An option of another toolkit. options: those of ours that it may set."""

    name: str
    options: tuple[str, ...]
    convert: Convert


class NotPossible(Exception):
    """A task that no stage of ours has; the message says which."""


@dataclass(frozen=True, slots=True)
class Toolkit:
    """Another toolkit: its keys, its defaults, and which stage of ours a file is for."""

    name: str
    title: str
    keys: tuple[Key, ...]
    # our stage's preset; raises NotPossible
    stage: Callable[[Settings], str]
    # its own defaults where they differ from ours, given what the file says
    defaults: Callable[[Settings], dict[str, Any]]
    # keys that only its files have, and keys that they have beside others
    telltales: tuple[str, ...] = ()

    def find(self, name: str) -> Key | None:
        """The entry of a key; the longest pattern where none has its name."""
        patterns = []
        for key in self.keys:
            if key.name == name:
                return key
            if key.name.endswith("*") and name.startswith(key.name[:-1]):
                patterns.append(key)
        return max(patterns, key=lambda key: len(key.name), default=None)


# ---- entries of a table ----

_OFF: tuple[Any, ...] = ("", "none", "None", "no", "false", "default", "auto", [], {})


def is_off(value: Any) -> bool:
    """Whether a value switches its option off."""
    if isinstance(value, int | float):
        return value == 0
    return any(type(value) is type(off) and value == off for off in _OFF)


def same(value: Any) -> Any:
    """A value as it stands."""
    return value


def to(name: str, option: str, read: Read = same, note: str = "") -> Key:
    """`name` is our `option`; `read` turns its value into ours."""

    def convert(settings: Settings, value: Any) -> Answer:
        return Answer(Fate.taken, {option: read(value)}, note)

    return Key(name, (option,), convert)


def computes(names: Sequence[str], options: Sequence[str], compute: Compute) -> tuple[Key, ...]:
    """Keys whose values together become our `options`."""

    def convert(settings: Settings, value: Any) -> Answer:
        return compute(settings)

    return tuple(Key(name, tuple(options), convert) for name in names)


def _words(names: Sequence[str]) -> list[str]:
    """Names that stand by themselves, or several in one text."""
    return " ".join(names).split()


def idle(reason: str, *names: str) -> tuple[Key, ...]:
    """Keys without effect here, and why."""

    def convert(settings: Settings, value: Any) -> Answer:
        return Answer(Fate.idle, note=reason)

    return tuple(Key(name, (), convert) for name in _words(names))


def missing(reason: str, *names: str) -> tuple[Key, ...]:
    """Keys that have no option here, and why; without effect where they are switched off."""

    def convert(settings: Settings, value: Any) -> Answer:
        if is_off(value):
            return Answer(Fate.idle, note="switched off, as here")
        return Answer(Fate.impossible, note=reason)

    return tuple(Key(name, (), convert) for name in _words(names))


def above_one(reason: str, *names: str) -> tuple[Key, ...]:
    """Keys of sizes that have no option here where they are above 1, and why."""

    def convert(settings: Settings, value: Any) -> Answer:
        if is_off(value) or value == 1:
            return Answer(Fate.idle, note="off, as here")
        return Answer(Fate.impossible, note=reason)

    return tuple(Key(name, (), convert) for name in _words(names))


def stops(reason: str, *names: str) -> tuple[Key, ...]:
    """Keys of tasks that no stage here has: nothing is written where one of them is on."""

    def convert(settings: Settings, value: Any) -> Answer:
        if is_off(value):
            return Answer(Fate.idle, note="switched off, as here")
        return Answer(Fate.impossible, note=reason, stops=True)

    return tuple(Key(name, (), convert) for name in _words(names))


# ---- values ----


def number(value: Any) -> int | float:
    """A number, also one that YAML reads as a text (1e-5). Raises ValueError."""
    if isinstance(value, bool) or value is None:
        raise ValueError("expected a number")
    if isinstance(value, int | float):
        return value
    text = str(value)
    try:
        return int(text)
    except ValueError:
        return float(text)


def whole(value: Any) -> int:
    """A whole number. Raises ValueError."""
    read = number(value)
    if read != int(read):
        raise ValueError("expected a whole number")
    return int(read)


def whole_or_zero(value: Any) -> int:
    """A whole number, 0 for what other toolkits write as 0 or less: no limit."""
    return max(0, whole(value))


def flag(value: Any) -> bool:
    """True or false. Raises ValueError."""
    text = str(value).lower()
    if text in ("true", "1", "yes", "on"):
        return True
    if text in ("false", "0", "no", "off", "none"):
        return False
    raise ValueError("expected true or false")


def negated(value: Any) -> bool:
    """The opposite of a flag."""
    return not flag(value)


def listing(value: Any) -> list[str]:
    """A list of texts; one text is taken apart at its commas and blanks."""
    if isinstance(value, list):
        return [str(item) for item in value]
    return str(value).replace(",", " ").split()


def positive_or_null(value: Any) -> int | float | None:
    """A number, or None for what other toolkits write as 0 or less: no limit."""
    read = number(value)
    return read if read > 0 else None
