"""Words, boundaries and capitals, for the steps that exchange words: text in scripts with and
without spaces between words.
"""

from functools import cache
from pathlib import Path
from typing import Any

from rlhf.types import UserError

# Scripts that put no space between words: a word of theirs may begin and end anywhere.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_SPACED_LETTER = rf"[[\p{{L}}\p{{M}}\p{{N}}_]--[{_UNSPACED}]]"
_HAN = r"\p{Han}"


@cache
def _compiled(pattern: str) -> Any:
    import regex

    return regex.compile(pattern, regex.V1)


def bounded(term: str) -> str:
    """A pattern for `term` as a whole word: no letter of a script with spaces may go on where the
    term begins or ends with one.
    """
    import regex

    letter = _compiled(_SPACED_LETTER)
    before = f"(?<!{_SPACED_LETTER})" if letter.match(term[0]) else ""
    after = f"(?!{_SPACED_LETTER})" if letter.match(term[-1]) else ""
    return f"{before}{regex.escape(term, special_only=True, literal_spaces=True)}{after}"


def has_han(text: str) -> bool:
    """Whether a text holds a Chinese character."""
    return _compiled(_HAN).search(text) is not None


def in_case_of(model: str, word: str) -> str:
    """`word`, where it is all small letters, with the capitals of `model`: ALL, First, or none.
    Capitals of its own stay.
    """
    if not word.islower():
        return word
    cased = [c for c in model if c.isupper() or c.islower()]
    if len(cased) > 1 and all(c.isupper() for c in cased):
        return word.upper()
    if cased and cased[0].isupper():
        return word[0].upper() + word[1:]
    return word


def read_yaml(path: str, key: str) -> Any:
    """A YAML file's content. Raises UserError: no such file, not YAML, not UTF-8, empty."""
    import yaml

    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{key}={path}: no such file.")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"{key}={path}: not a readable YAML file ({' '.join(str(error).split())})."
        ) from error
    if not content:
        raise UserError(f"{key}={path} is empty: expected at least one entry.")
    return content


def word_list(value: Any, where: str) -> list[str]:
    """A YAML value as words: a text or a list of texts. Raises UserError; YAML reads no, yes, on
    and numbers as something else.
    """
    if value is None:
        return []
    words = value if isinstance(value, list) else [value]
    for word in words:
        if not isinstance(word, str):
            raise UserError(
                f"{where}: expected words, found {word!r}; put it in quotes if it is a word."
            )
        if not word.strip():
            raise UserError(f"{where}: expected words, found an empty one.")
    return [word.strip() for word in words]
