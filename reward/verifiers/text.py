"""Verifiers that need no more than text: exact, numeric, choice, regex, JSON schema, format. The
larger ones have files of their own.
"""

import json
import math
from pathlib import Path
from typing import Any

import regex

from conf.choices import FormatStyle
from conf.schema import RewardTerm
from reward.verifiers.extract import (
    after_marker,
    boxed,
    close,
    fenced,
    letter_of,
    normalise,
    number_of,
    numbers_in,
)

# a pattern that takes longer on one response goes back and forth without end
_PATTERN_SECONDS = 2.0
STYLES = {
    FormatStyle.think: r"<think>(?!.*<think>)(.*?)</think>.*",
    FormatStyle.think_answer: r"\s*<think>(?:(?!</?think>|</?answer>).)*</think>\s*<answer>(?:(?!</?think>|</?answer>).)*</answer>\s*",
}


class Exact:
    """1 where the answer's normalised text is the row's, or one of the row's where it has a
    list.
    """

    workers = 1

    def __init__(self, term: RewardTerm) -> None:
        self.columns: tuple[str, ...] = (term.column or "answer",)
        self.marker, self.ignore_case, self.ignore_punctuation = (
            term.marker,
            term.ignore_case,
            term.ignore_punctuation,
        )

    def _plain(self, text: str) -> str:
        return normalise(
            text, ignore_case=self.ignore_case, ignore_punctuation=self.ignore_punctuation
        )

    def reference(self, *values: Any) -> set[str]:
        answers = values[0] if isinstance(values[0], list) else [values[0]]
        out = {
            self._plain(str(a))
            for a in answers
            if isinstance(a, (str, int, float)) and not isinstance(a, bool)
        }
        if (
            not answers
            or len(
                [a for a in answers if isinstance(a, (str, int, float)) and not isinstance(a, bool)]
            )
            < len(answers)
            or "" in out
        ):
            raise ValueError(
                "expected a text that is more than punctuation, or a list of such texts, found "
                f"{values[0]!r}"
            )
        return out

    def score(self, response: str, reference: set[str]) -> float:
        answer = response if self.marker is None else after_marker(response, self.marker)
        return float(answer is not None and self._plain(answer) in reference)


class Numeric:
    r"""1 where the answer is the row's number within the tolerance.

    With a marker only what it points at counts: the first number of a line ("#### 42 apples"), the
    last one in \boxed{} or a tag ("x = 42"). Without one: \boxed{} where there is one, else after
    "####" where there is one, else the last number of the response.
    """

    workers = 1

    def __init__(self, term: RewardTerm) -> None:
        self.columns: tuple[str, ...] = (term.column or "answer",)
        self.marker, self.tolerance = term.marker, term.tolerance

    def reference(self, *values: Any) -> Any:
        number = (
            number_of(values[0])
            if not isinstance(values[0], str)
            else self._answer(values[0], None)
        )
        if number is None:
            raise ValueError(
                f"expected a number, or a text that ends with one, found {values[0]!r}"
            )
        return number

    def score(self, response: str, reference: Any) -> float:
        found = self._answer(response, self.marker)
        return float(found is not None and close(found, reference, self.tolerance))

    @staticmethod
    def _answer(text: str, marker: str | None) -> Any:
        if marker is None:
            marker = r"\boxed{}" if boxed(text) is not None else "####" if "####" in text else None
        span = text if marker is None else after_marker(text, marker)
        numbers = [] if span is None else numbers_in(span)
        if not numbers:
            return None
        line = marker is not None and marker != r"\boxed{}" and not marker.startswith("<")
        return numbers[0] if line else numbers[-1]


class Choice:
    """1 where the chosen letter is the row's."""

    workers = 1

    def __init__(self, term: RewardTerm) -> None:
        self.columns: tuple[str, ...] = (term.column or "answer",)
        self.letters, self.marker = term.letters, term.marker

    def reference(self, *values: Any) -> str:
        text = str(values[0]).strip()
        found = (
            text.upper()
            if len(text) == 1 and text.upper() in self.letters
            else letter_of(text, self.letters, None)
        )
        if found is None:
            raise ValueError(f"expected one of the letters {self.letters}, found {values[0]!r}")
        return found

    def score(self, response: str, reference: str) -> float:
        return float(letter_of(response, self.letters, self.marker) == reference)


def compile_pattern(pattern: str, flags: int = 0) -> Any:
    """A compiled pattern. Raises ValueError with what is wrong and where."""
    try:
        return regex.compile(pattern, flags)
    except regex.error as error:
        raise ValueError(f"{pattern!r} is no valid pattern ({error})") from error


def found_in(pattern: Any, text: str, *, whole: bool) -> bool:
    """Whether the pattern matches somewhere, or all of the text. Raises TimeoutError for a pattern
    that backtracks without end.
    """
    try:
        return (pattern.fullmatch if whole else pattern.search)(
            text, timeout=_PATTERN_SECONDS
        ) is not None
    except TimeoutError as error:
        raise TimeoutError(
            f"the pattern {pattern.pattern!r} took more than {_PATTERN_SECONDS} s on {len(text)} "
            "characters: make it simpler"
        ) from error


class Regex:
    """1 where the pattern is found anywhere in the response: the term's own, or each row's."""

    workers = 1

    def __init__(self, term: RewardTerm) -> None:
        self.pattern = None if term.pattern is None else compile_pattern(term.pattern)
        self.columns: tuple[str, ...] = (term.column or "pattern",) if self.pattern is None else ()

    def reference(self, *values: Any) -> Any:
        if not values:
            return self.pattern
        if not isinstance(values[0], str):
            raise ValueError(f"expected a pattern, found {values[0]!r}")
        return compile_pattern(values[0])

    def score(self, response: str, reference: Any) -> float:
        return float(found_in(reference, response, whole=False))


class Format:
    """1 where the whole response matches; a point also matches a line's end."""

    workers = 1
    columns: tuple[str, ...] = ()

    def __init__(self, term: RewardTerm) -> None:
        pattern = term.pattern if term.style is None else STYLES[term.style]
        assert pattern is not None
        self.pattern = compile_pattern(pattern, regex.DOTALL)

    def reference(self, *values: Any) -> Any:
        return None

    def score(self, response: str, reference: Any) -> float:
        return float(found_in(self.pattern, response, whole=True))


def parse_json(text: str) -> Any:
    """Strict JSON: no NaN, no number that becomes infinite. Raises ValueError, also for text nested
    too deeply to read.
    """

    def finite(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"{digits} is out of range")
        return value

    try:
        return json.loads(text, parse_float=finite, parse_constant=finite)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


class JsonSchema:
    """1 where the response is JSON that the schema allows: the term's file, or each row's own
    schema (an object, or its text).

    The JSON is what `marker` points at; without one the content of the last fenced block, else the
    whole response.
    """

    workers = 1

    def __init__(self, term: RewardTerm) -> None:
        self.marker = term.marker
        self.validator: Any = None
        if term.schema_file is not None:
            place = Path(term.schema_file).expanduser()
            if not place.is_file():
                raise ValueError(f"schema_file={term.schema_file}: no such file")
            try:
                self.validator = self._compile(json.loads(place.read_text(encoding="utf-8")))
            except ValueError as error:
                raise ValueError(f"schema_file={term.schema_file}: {error}") from error
        self.columns: tuple[str, ...] = (term.column or "schema",) if self.validator is None else ()

    @staticmethod
    def _compile(schema: Any) -> Any:
        from jsonschema import SchemaError
        from jsonschema.validators import validator_for
        from referencing import Registry

        kind = validator_for(schema)
        try:
            kind.check_schema(schema)
        except SchemaError as error:
            raise ValueError(
                f"no valid JSON schema at {error.json_path}: {error.message}"
            ) from error
        # an empty registry: a reference to another address fails instead of being fetched
        return kind(schema, registry=Registry())

    def reference(self, *values: Any) -> Any:
        if not values:
            return self.validator
        return self._compile(json.loads(values[0]) if isinstance(values[0], str) else values[0])

    def score(self, response: str, reference: Any) -> float:
        if self.marker is not None:
            text = after_marker(response, self.marker)
        else:
            block = fenced(response, ("json",))
            text = response if block is None else block
        if text is None:
            return 0.0
        try:
            value = parse_json(text)
        except ValueError:
            return 0.0  # not JSON: a wrong answer
        try:
            return float(reference.is_valid(value))
        except RecursionError:
            return 0.0  # the response nests too deeply
