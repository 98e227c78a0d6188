"""Verifiers that need nothing but the text: exact, numeric, choice, regex, format, JSON schema."""

import json
import math
from pathlib import Path
from typing import Any

import regex

from conf.choices import FormatStyle
from conf.schema import RewardTerm
from reward.verifiers.extract import (
    BOXED,
    answer_of,
    boxed,
    close,
    fenced_or_all,
    letter_of,
    normalise,
    number_of,
    numbers_in,
)

# a pattern that takes longer on a response backtracks without end
_PATTERN_SECONDS = 2.0
STYLES = {
    FormatStyle.think: r"<think>(?!.*<think>)(.*?)</think>.*",
    FormatStyle.think_answer: (
        r"\s*<think>(?:(?!</?think>|</?answer>).)*</think>"
        r"\s*<answer>(?:(?!</?think>|</?answer>).)*</answer>\s*"
    ),
}


class Exact:
    """1 where the answer's normalised text equals the row's, or any of them where the row has a
    list; else 0.
    """

    workers = 1

    def __init__(self, term: RewardTerm) -> None:
        self.columns: tuple[str, ...] = (term.column or "answer",)
        self.marker = term.marker
        self.ignore_case, self.ignore_punctuation = term.ignore_case, term.ignore_punctuation

    def _plain(self, text: str) -> str:
        return normalise(
            text, ignore_case=self.ignore_case, ignore_punctuation=self.ignore_punctuation
        )

    def reference(self, *values: Any) -> set[str]:
        answers = values[0] if isinstance(values[0], list) else [values[0]]
        usable = [
            answer
            for answer in answers
            if isinstance(answer, (str, int, float)) and not isinstance(answer, bool)
        ]
        texts = {self._plain(str(answer)) for answer in usable}
        if not answers or len(usable) < len(answers) or "" in texts:
            raise ValueError(
                "expected a text that is more than punctuation, or a list of such texts, found "
                f"{values[0]!r}"
            )
        return texts

    def score(self, response: str, reference: set[str]) -> float:
        answer = answer_of(response, self.marker)
        return float(answer is not None and self._plain(answer) in reference)


class Numeric:
    r"""1 where the answer is the row's number within the tolerance, else 0.

    With a marker only the text that it points at counts: the first number of a line ("#### 42
    apples"), the last number in \boxed{} or in a tag ("x = 42"). Without a marker: \boxed{} where
    the response has it, else "####" where it has that, else the last number of the response.
    """

    workers = 1

    def __init__(self, term: RewardTerm) -> None:
        self.columns: tuple[str, ...] = (term.column or "answer",)
        self.marker, self.tolerance = term.marker, term.tolerance

    def reference(self, *values: Any) -> Any:
        if isinstance(values[0], str):
            number = self.answer_in(values[0], None)
        else:
            number = number_of(values[0])
        if number is None:
            raise ValueError(
                f"expected a number, or a text that ends with one, found {values[0]!r}"
            )
        return number

    def score(self, response: str, reference: Any) -> float:
        number = self.answer_in(response, self.marker)
        return float(number is not None and close(number, reference, self.tolerance))

    @staticmethod
    def answer_in(text: str, marker: str | None) -> Any:
        """The number that a text gives as its answer; None where it gives none."""
        if marker is None and boxed(text) is not None:
            marker = BOXED
        elif marker is None and "####" in text:
            marker = "####"
        numbers = numbers_in(answer_of(text, marker) or "")
        if not numbers:
            return None
        points_at_line = marker is not None and marker != BOXED and not marker.startswith("<")
        return numbers[0] if points_at_line else numbers[-1]


class Choice:
    """1 where the chosen letter is the row's, else 0."""

    workers = 1

    def __init__(self, term: RewardTerm) -> None:
        self.columns: tuple[str, ...] = (term.column or "answer",)
        self.letters, self.marker = term.letters, term.marker

    def reference(self, *values: Any) -> str:
        text = str(values[0]).strip()
        letter: str | None = text.upper()
        if len(text) != 1 or text.upper() not in self.letters:
            letter = letter_of(text, self.letters, None)
        if letter is None:
            raise ValueError(f"expected one of the letters {self.letters}, found {values[0]!r}")
        return letter

    def score(self, response: str, reference: str) -> float:
        return float(letter_of(response, self.letters, self.marker) == reference)


def compile_pattern(pattern: str, flags: int = 0) -> Any:
    """A compiled pattern. Raises ValueError with what is wrong, and at which position."""
    try:
        return regex.compile(pattern, flags)
    except regex.error as error:
        raise ValueError(f"{pattern!r} is no valid pattern ({error})") from error


def matches(pattern: Any, text: str, *, whole: bool) -> bool:
    """Whether the pattern matches the whole text, or a part of it. Raises TimeoutError for a
    pattern that backtracks without end.
    """
    match = pattern.fullmatch if whole else pattern.search
    try:
        return match(text, timeout=_PATTERN_SECONDS) is not None
    except TimeoutError as error:
        raise TimeoutError(
            f"the pattern {pattern.pattern!r} took more than {_PATTERN_SECONDS} s on {len(text)} "
            "characters: make it simpler"
        ) from error


class Regex:
    """1 where the pattern matches a part of the response, else 0. The pattern is the term's, or
    each row's own.
    """

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
        return float(matches(reference, response, whole=False))


class Format:
    """1 where the pattern matches the whole response, else 0; a point in it also matches a line
    break.
    """

    workers = 1
    columns: tuple[str, ...] = ()

    def __init__(self, term: RewardTerm) -> None:
        pattern = term.pattern if term.style is None else STYLES[term.style]
        assert pattern is not None
        self.pattern = compile_pattern(pattern, regex.DOTALL)

    def reference(self, *values: Any) -> Any:
        return None

    def score(self, response: str, reference: Any) -> float:
        return float(matches(self.pattern, response, whole=True))


def parse_json(text: str) -> Any:
    """The value of a text of strict JSON: without NaN, and without numbers that a float can't hold.
    Raises ValueError, also for text that is nested too deeply.
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
    """1 where the response is JSON that the schema allows, else 0. The schema is the term's file,
    or each row's own (an object, or its text).

    The JSON is the text that `marker` points at; without a marker the content of the last fenced
    block, or else the whole response.
    """

    workers = 1

    def __init__(self, term: RewardTerm) -> None:
        self.marker = term.marker
        self.validator: Any = None
        if term.schema_file is not None:
            path = Path(term.schema_file).expanduser()
            if not path.is_file():
                raise ValueError(f"schema_file={term.schema_file}: no such file")
            try:
                self.validator = self._compile(json.loads(path.read_text(encoding="utf-8")))
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
        schema = values[0]
        if isinstance(schema, str):
            schema = json.loads(schema)
        return self._compile(schema)

    def score(self, response: str, reference: Any) -> float:
        text = answer_of(response, self.marker)
        if self.marker is None:
            text = fenced_or_all(response, ("json",))
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
