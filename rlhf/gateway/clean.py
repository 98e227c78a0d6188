"""Personal data, taken out of texts before anything is written: e-mail addresses, telephone and
card numbers, IBANs, IP addresses (as step patterns of stage=data finds them), the names in a list,
and the user's own name.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.prepare.personal import KNOWN, Pattern, redacted, word_pattern

# keys of messages whose values are no texts of anybody
_KEPT = ("role", "type", "id", "tool_call_id", "registry_version")
_SHORTEST = 3  # characters of a user's name that is looked for: shorter ones stand in any text


@dataclass(frozen=True, slots=True)
class Cleaner:
    """What is looked for."""

    patterns: tuple[Pattern, ...]

    @classmethod
    def of(cls, names: str | None) -> "Cleaner":
        """names: a file with a name a line. Raises UserError for one without any."""
        known = tuple(KNOWN.values())
        if names is None:
            return cls(known)
        return cls((*known, _pattern("name", word_pattern(names).pattern.pattern)))

    def clean(self, value: Any, user: str, counts: Counter[str]) -> Any:
        """A text, or a list or object of texts, without personal data; keys stay. `counts` gets the
        finds by their kind.
        """
        if isinstance(value, str):
            text, found = redacted(value, self._looking_for(user))
            counts.update(found)
            return text
        if isinstance(value, list):
            return [self.clean(inner, user, counts) for inner in value]
        if isinstance(value, dict):
            out = {}
            for key, inner in value.items():
                out[key] = inner if key in _KEPT else self.clean(inner, user, counts)
            return out
        return value

    def _looking_for(self, user: str) -> Sequence[Pattern]:
        """The patterns, the user's own name last: an address that holds it is found whole."""
        name = user.strip()
        if len(name) < _SHORTEST:
            return self.patterns
        return (*self.patterns, _pattern("user", rf"(?<!\w){re.escape(name)}(?!\w)"))


def _pattern(name: str, expression: str) -> Pattern:
    return Pattern(name, re.compile(expression, re.IGNORECASE))
