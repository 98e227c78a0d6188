"""What the registry keeps: versions, and events of their history."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

PREFIX = "registry:"  # of a model path that names a version


class Action(Enum):
    """What an event of the history says."""

    register = "register"
    measure = "measure"
    promote = "promote"
    withheld = "withheld"  # a promotion that the gate refused
    rollback = "rollback"


# the events that give an alias to a version
MOVES = (Action.promote, Action.rollback)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file of a version: its path inside the model's directory, hash and size in bytes."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Draft:
    """A model that is to become a version."""

    name: str
    path: str  # its directory, absolute
    files: tuple[ModelFile, ...]
    digest: str  # sha256 over all files, 64 hexadecimal digits
    weights: str | None  # the fingerprint by which manifests know it
    lineage: Mapping[str, Any]
    card: str | None  # the model card, Markdown


@dataclass(frozen=True, slots=True)
class Version:
    """A registered model."""

    draft: Draft
    number: int  # from 1
    time: str
    who: str

    @property
    def label(self) -> str:
        """``NAME@NUMBER``."""
        return f"{self.draft.name}@{self.number}"


@dataclass(frozen=True, slots=True)
class Why:
    """Who does something, and for what reason."""

    who: str
    reason: str


@dataclass(frozen=True, slots=True)
class Event:
    """A line of the history. `detail` is what belongs to its action: figures, the gate's findings,
    the version that held the alias before.
    """

    id: int
    time: str
    why: Why
    action: Action
    name: str
    number: int
    alias: str | None
    detail: Mapping[str, Any]
    chain: str  # hash over this event and all before it


@dataclass(frozen=True, slots=True)
class Figure:
    """A number that was measured of a version, and where it comes from."""

    value: float
    source: str
