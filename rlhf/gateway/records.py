"""What the gateway keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class Refused(Exception):
    """A request that is not answered: a status, and a text that names no arm."""

    def __init__(self, status: int, message: str, code: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True, slots=True)
class Arm:
    """A served model, as it stands now."""

    name: str
    url: str  # {version} stands for the registry's number
    model: str
    weight: float
    token: str | None = None
    version: str | None = None  # NAME@ALIAS or NAME@NUMBER
    number: int | None = None  # of the version that is served now

    @property
    def address(self) -> str:
        """Where its server is now."""
        return self._filled(self.url)

    @property
    def served(self) -> str:
        """The name of its model at its server now."""
        return self._filled(self.model)

    @property
    def label(self) -> str:
        """The version for rows and the operator: NAME@NUMBER; the model's name without one."""
        if self.version is None or self.number is None:
            return self.model
        return f"{self.version.partition('@')[0]}@{self.number}"

    def _filled(self, text: str) -> str:
        return text.replace("{version}", "" if self.number is None else str(self.number))


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer that was given: to whom, by which arm; texts while they are kept."""

    id: str
    user: str  # pseudonym
    arm: str
    label: str  # of the arm's version
    epoch: int  # the test that ran
    away: bool  # by another arm than the user's own
    count: int  # choices of the answer
    messages: Sequence[Any] | None = None  # the prompt
    choices: Sequence[str] | None = None
    tools: Sequence[Any] | None = None
    whole: bool = True  # every choice ended by itself


@dataclass(frozen=True, slots=True)
class Said:
    """Feedback of a user about an answer."""

    answer: str
    index: int
    user: str  # pseudonym
    consent: bool
    thumb: bool | None = None  # up, down
    over: tuple[str, int] | None = None  # the answer and choice that this one was preferred to
    edit: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """A user's outcome in the test, in the order in which users became complete. It has no name."""

    arm: str
    weights: Mapping[str, float]  # shares of the arms when the user was assigned
    value: float  # mean of the first thumbs, in [0, 1]
