"""Words, boundaries and capitals in any script: the one place that says what a word is and how
words are counted, for every step and for the report.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from rlhf.types import UserError

# Scripts that put no space between words: a word of theirs may begin and end anywhere, so each
# character (with its marks) is a token. The number: how many tokens make a word in running text,
# rounded; segmenters give 1.5 to 1.7 for Chinese (CTB, PKU), 3 to 4 for Thai (BEST).
_TOKENS_A_WORD = {
    "Han": 1.6,
    "Bopomofo": 1.6,
    "Hiragana": 2.0,
    "Katakana": 3.0,
    "Yi": 1.6,
    "Thai": 3.5,
    "Lao": 3.5,
    "Khmer": 3.5,
    "Myanmar": 2.5,
    "Tai_Le": 2.5,
    "New_Tai_Lue": 2.5,
    "Tai_Tham": 2.5,
    "Tai_Viet": 2.5,
    "Javanese": 3.0,
    "Balinese": 3.0,
    "Tibetan": 3.0,  # its points stand between syllables
}
_UNSPACED = "".join(rf"\p{{{script}}}" for script in _TOKENS_A_WORD)
_SPACED_LETTER = rf"[[\p{{L}}\p{{M}}\p{{N}}_]--[{_UNSPACED}]]"
_SPACED = rf"[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]"
SPACED_LETTERS = rf"[[\p{{L}}\p{{M}}]--[{_UNSPACED}]]"
MARKS = r"\p{M}"
_HAN = r"\p{Han}"
_SYLLABLES = {"Hangul": 2.5, "Ethiopic": 2.0}  # letters that a character stands for
_LETTERS_A_WORD = 5.0  # roughly, in scripts with spaces
_JOINERS = "'\u2019-"  # stay inside a word: don't, e-mail


@cache
def _compiled(pattern: str) -> Any:
    import regex

    return regex.compile(pattern, regex.V1)


def ranges(pattern: str) -> str:
    """A class's characters of the basic plane, as the inside of a class of `re`."""
    # without surrogates; what stands beside the gap is in none of the classes
    plane = "".join(map(chr, chain(range(0xD800), range(0xE000, 0x10000))))
    runs = (match.group() for match in _compiled(rf"{pattern}+").finditer(plane))
    return "".join(rf"\u{ord(run[0]):04x}-\u{ord(run[-1]):04x}" for run in runs)


# Patterns of `re` are several times faster than regex's. They know the basic plane: regex serves
# the few texts with characters beyond it.
_ASCII_WORD = re.compile(r"[A-Za-z0-9]+(?:['-][A-Za-z0-9]+)*")
_ASCII = [bytes([code]) for code in range(128)]
_WHITE = b"".join(byte for byte in _ASCII if byte.decode().isspace())
_ALNUM = b"".join(byte for byte in _ASCII if byte.isalnum())
_NO_LETTERS = b"".join(byte for byte in _ASCII if not byte.isalpha())
_PRINTED = bytes(range(0x20, 0x7F))
_HAS_LETTER = re.compile(r"[^\W\d_]")
# of the bytes of a text, blanks for all that is in no word
_WORDS_ALONE = bytes(
    code if chr(code).isalnum() or chr(code) in "'-" else 32 for code in range(128)
)
_WORDS_ALONE += bytes(128 * [32])
_FEW = 16  # characters of a text for each joiner in it, from which looking at each is worth it


@cache
def _basic() -> re.Pattern[str]:
    spaced, unspaced, marks = ranges(_SPACED), ranges(f"[{_UNSPACED}]"), ranges(MARKS)
    return re.compile(f"[{unspaced}][{marks}]*|[{spaced}]+(?:[{_JOINERS}][{spaced}]+)*")


def words(text: str) -> list[str]:
    """The words of a text as tokens: runs of letters and digits (with the hyphens and apostrophes
    inside them), and single characters of scripts without spaces, with their marks.
    """
    if text.isascii():
        return _ascii_words(text)
    if len(text.encode("utf-16-le", "surrogatepass")) == 2 * len(text):
        return _basic().findall(text)
    pattern = rf"[{_UNSPACED}]\p{{M}}*|{_SPACED}+(?:[{_JOINERS}]{_SPACED}+)*"
    return _compiled(pattern).findall(text)


def _ascii_words(text: str) -> list[str]:
    """What _ASCII_WORD finds, with what isn't in a word made blank: half the time."""
    plain = text.encode("ascii").translate(_WORDS_ALONE)
    joiners = plain.count(b"'") + plain.count(b"-")
    if _FEW * joiners > len(plain):
        return _ASCII_WORD.findall(text)
    inside = bytearray(plain)
    for joiner in (b"'", b"-"):
        at = plain.find(joiner)
        while at >= 0:
            before = plain[at - 1 : at]
            after = plain[at + 1 : at + 2]
            if not (before.isalnum() and after.isalnum()):
                inside[at] = 32
            at = plain.find(joiner, at + 1)
    return inside.decode("ascii").split()


@cache
def tokens_a_word(character: str) -> float:
    """How many tokens make a word where a token begins with this character: 1 in scripts with
    spaces.
    """
    for script, tokens in _TOKENS_A_WORD.items():
        if _compiled(rf"\p{{{script}}}").match(character):
            return tokens
    return 1.0


def is_spaced(token: str) -> bool:
    """Whether a token of `words` is of a script with spaces between words."""
    return tokens_a_word(token[0]) == 1.0


def lettered(tokens: Sequence[str]) -> list[str]:
    """The tokens of `words` that hold a letter: more than numbers."""
    joined = "".join(tokens)
    if joined.isascii() and joined == joined.lower():
        return list(filter(str.islower, tokens))
    return [token for token in tokens if token.isalpha() or _HAS_LETTER.search(token)]


@dataclass(frozen=True, slots=True)
class Counted:
    """A text's words, as all rules count them."""

    tokens: list[str]
    number: float  # of words: a token of a script without spaces is a part of one

    def span(self, words: int) -> int:
        """How many tokens `words` neighbouring words of this text are."""
        if self.number == len(self.tokens):
            return words
        return max(words, round(words * len(self.tokens) / self.number))


def counted(text: str) -> Counted:
    """The words of a text with their number: a Chinese character is 1 / 1.6 of a word."""
    tokens = words(text)
    if text.isascii():
        return Counted(tokens, len(tokens))
    first = Counter(token[0] for token in tokens)
    number = sum(times / tokens_a_word(character) for character, times in first.items())
    return Counted(tokens, len(tokens) if number == len(tokens) else number)


@cache
def _letters_in(character: str) -> float:
    """How many letters a character is worth."""
    for script, worth in _SYLLABLES.items():
        if _compiled(rf"\p{{{script}}}").match(character):
            return worth
    tokens = tokens_a_word(character)
    return 1.0 if tokens == 1.0 else _LETTERS_A_WORD / tokens


def letters(text: str) -> float:
    """How much a text says, in letters: a character of a script without spaces, or a syllable of
    Korean, says as much as several letters; marks, digits and symbols say nothing.
    """
    if text.isascii():
        return _without(text, _NO_LETTERS)
    counts = Counter(text)
    return sum(times * _letters_in(c) for c, times in counts.items() if c.isalpha())


def _without(text: str, left_out: bytes) -> int:
    """How many characters of an ASCII text are none of these."""
    return len(text.encode("ascii").translate(None, left_out))


def is_plain(text: str, beside: bytes) -> bool:
    """Whether all characters of a text are ASCII that is printed, or among those `beside`."""
    return text.isascii() and _without(text, _PRINTED + beside) == 0


def visible(text: str) -> int:
    """How many characters of a text are no white space."""
    if text.isascii():
        return _without(text, _WHITE)
    return len("".join(text.split()))


def alphanumeric(text: str) -> int:
    """How many characters of a text are letters or digits."""
    if text.isascii():
        return len(text) - _without(text, _ALNUM)
    return sum(map(str.isalnum, text))


def spaced_words(text: str) -> list[str]:
    """The words of a text in scripts with spaces between words."""
    return list(filter(is_spaced, words(text)))


def symbols(text: str) -> int:
    """The characters that are no letter, mark, digit or white space."""
    return _symbols(text, words(text))


def symbol_share(text: str, tokens: Sequence[str]) -> float:
    """Share of symbols among the characters that aren't white space. `tokens`: its words."""
    if text.isascii():
        return _without(text, _WHITE + _ALNUM) / max(1, _without(text, _WHITE))
    return _symbols(text, tokens) / max(1, visible(text))


def _symbols(text: str, tokens: Sequence[str]) -> int:
    """Every letter, mark and digit is in a word, so what the words leave out are the symbols."""
    inside = "".join(tokens)
    joiners = sum(map(inside.count, _JOINERS))
    return visible(text) - len(inside) + joiners


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


def changed_at(path: str) -> int:
    """When a file, or what is in a directory, changed last; 0 where there is none. What was read
    from it may be kept until then.
    """
    place = Path(path).expanduser()
    files = [place, *place.glob("*")] if place.is_dir() else [place]
    return max((file.stat().st_mtime_ns for file in files if file.exists()), default=0)
