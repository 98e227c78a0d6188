"""Step patterns: e-mail addresses, telephone numbers, IP addresses, payment cards, IBANs, and words
of a list.

A pattern finds candidates, a check keeps those that are real: Luhn's digit for cards (ISO/IEC
7812-1), remainder 1 modulo 97 for IBANs (ISO 13616), the number of digits for telephone numbers
(ITU-T E.164), the standard library's parser for IP addresses.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from conf.preparation.cleaning import Found, Patterns, Personal
from rlhf.data.prepare.items import Context, Item, replace_texts
from rlhf.data.prepare.texts import emptied
from rlhf.data.prepare.words import SPACED_LETTERS, changed_at, ranges
from rlhf.types import UserError


def luhn(digits: str) -> bool:
    """Whether the last digit is Luhn's check digit of the others."""
    total = 0
    for position, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if position % 2 else 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def is_card(text: str) -> bool:
    """13 to 19 digits that begin as a network's do (2 to 6), with Luhn's digit."""
    digits = re.sub(r"\D", "", text)
    return 13 <= len(digits) <= 19 and digits[0] in "23456" and luhn(digits)


def is_iban(text: str) -> bool:
    """15 to 34 characters whose number, country and check digits moved to the end, leaves 1 modulo
    97.
    """
    code = re.sub(r"[ -]", "", text).upper()
    if not 15 <= len(code) <= 34:
        return False
    return int("".join(str(int(c, 36)) for c in code[4:] + code[:4])) % 97 == 1


def is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_phone(text: str) -> bool:
    """8 to 15 digits after a plus sign, 10 or 11 without."""
    digits = re.sub(r"\D", "", text)
    if text.lstrip("( ").startswith("+"):
        return 8 <= len(digits) <= 15
    return 10 <= len(digits) <= 11


@dataclass(frozen=True, slots=True)
class Pattern:
    """What finds candidates, and what tells the real ones."""

    name: str
    pattern: re.Pattern[str]
    real: Callable[[str], bool] = lambda text: True
    # what a text without can't hold one: cheaper to know than to look
    digits: int = 0  # at least so many
    # (characters, how often, beside at least so many digits): one of these is enough
    needs: tuple[tuple[str, int, int], ...] = ()
    holds: re.Pattern[str] | None = None

    def mark(self) -> str:
        return f"[{self.name.upper()}]"

    def possible(self, text: str, digits: int) -> bool:
        """Whether a text with so many digits may hold one."""
        if digits < self.digits:
            return False
        if self.needs and not self._has_needs(text, digits):
            return False
        return self.holds is None or self.holds.search(text) is not None

    def _has_needs(self, text: str, digits: int) -> bool:
        for character, least, beside in self.needs:
            if digits >= beside and text.count(character) >= least:
                return True
        return False


# Written for ASCII: \w and \d are A-Z, a-z, 0-9 and _, so that an address between Chinese
# characters stands alone.
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_EMAIL = (
    r"(?<![\w.%+-])[A-Za-z0-9](?:[\w.%+-]{0,62}[\w%+-])?"
    rf"@(?:{_LABEL}\.)+[A-Za-z]{{2,24}}(?![\w@])"
)
_IBAN = (
    r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]{4}){2,7}(?:[ -]?[A-Z0-9]{1,3})?(?![A-Za-z0-9])"
)
_DIGIT_BEFORE, _DIGIT_AFTER = r"(?<![\w.+-])", r"(?![\w-]|\.\d)"
_CARD = rf"{_DIGIT_BEFORE}\d(?:[ -]?\d){{12,18}}{_DIGIT_AFTER}"
_IP = (
    r"(?<![\w.:])(?:(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)"
    r"|(?:[0-9A-Fa-f]{1,4}:){2,7}(?::?[0-9A-Fa-f]{1,4}){1,6}(?![\w:])"
    # not Python's x[::2] and x[:, ::2]
    r"|(?<!\[)::(?:[0-9A-Fa-f]{1,4}:){0,6}[0-9A-Fa-f]{1,4}(?![\w:\]]))"
)
_PHONE = (
    # +44 20 7946 0958
    rf"{_DIGIT_BEFORE}(?:\+\d{{1,3}}[ .-]?(?:\(\d{{1,4}}\)[ .-]?)?"
    rf"\d{{1,4}}(?:[ .-]?\d{{2,4}}){{1,5}}"
    rf"|\(\d{{3}}\)[ .-]?\d{{3}}[ .-]\d{{4}}|\d{{3}}[ .-]\d{{3}}[ .-]\d{{4}}"  # (212) 555-0123
    rf"|1[3-9]\d{{9}}|1[3-9]\d[ -]\d{{4}}[ -]\d{{4}}){_DIGIT_AFTER}"  # 138 0013 8000
)

_DIGITS = "0123456789"
# The beginning of an IBAN; a part of an address of either kind. Written so that each begins with a
# class: `re` looks for those fast.
_IBAN_HEAD = re.compile(r"[A-Z][A-Z][0-9][0-9]")
_IP_PART = re.compile(r"[0-9:](?:(?<=:)[0-9A-Fa-f:]|(?<=[0-9])\.[0-9])")

# In the order in which they are looked for: a card is no telephone number, an IBAN no card.
KNOWN: Mapping[Personal, Pattern] = {
    Personal.email: Pattern("email", re.compile(_EMAIL, re.ASCII), needs=(("@", 1, 0),)),
    Personal.iban: Pattern("iban", re.compile(_IBAN, re.ASCII), is_iban, 2, (), _IBAN_HEAD),
    Personal.credit_card: Pattern("credit_card", re.compile(_CARD, re.ASCII), is_card, digits=13),
    Personal.ip: Pattern(
        "ip", re.compile(_IP, re.ASCII), is_ip, needs=((".", 3, 4), (":", 2, 0)), holds=_IP_PART
    ),
    Personal.phone: Pattern("phone", re.compile(_PHONE, re.ASCII), is_phone, digits=8),
}


def word_pattern(path: str) -> Pattern:
    """The words and phrases of a file, a line each. Raises UserError for a file without any."""
    lines = [
        line.strip() for line in Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    ]
    words = [line for line in lines if line and not line.startswith("#")]
    if not words:
        raise UserError(
            f"step patterns: words={path}: expected a word or phrase a line, found none."
        )
    alternatives = "|".join(
        r"\s+".join(map(re.escape, line.split()))
        for line in sorted(set(words), key=lambda w: (-len(w), w))
    )
    # A letter beside a word makes it another one, except in scripts without spaces, where every
    # neighbour is a letter.
    letter = ranges(SPACED_LETTERS)
    before, after = f"(?<![{letter}])", f"(?![{letter}])"
    return Pattern("word", re.compile(rf"{before}(?:{alternatives}){after}", re.IGNORECASE))


@cache
def _kept_word_pattern(path: str, changed: int) -> Pattern:
    """`word_pattern`, once for all parts of the rows; `changed`: when the file did."""
    return word_pattern(path)


def _digits(text: str) -> int:
    """How many of a text's characters are 0 to 9."""
    if text.isascii():
        others = text.encode("ascii").translate(None, _DIGITS.encode("ascii"))
        return len(text) - len(others)
    return sum(map(text.count, _DIGITS))


def redacted(text: str, patterns: Sequence[Pattern]) -> tuple[str, Counter[str]]:
    """`text` with each real find replaced by its mark, and the finds by pattern. Looks again until
    nothing is found: a mark may free a neighbour. Marks themselves are no finds, whatever the words
    that are looked for.
    """
    counts: Counter[str] = Counter()
    marks = {pattern.mark() for pattern in patterns}
    while True:
        before = counts.total()
        digits = _digits(text)
        for pattern in patterns:
            if not pattern.possible(text, digits):
                continue

            def mark(match: re.Match[str], matched: Pattern = pattern) -> str:
                if not matched.real(match.group()) or _is_mark(match, marks):
                    return match.group()
                counts[matched.name] += 1
                return matched.mark()

            text = pattern.pattern.sub(mark, text)
        if counts.total() == before:
            return text, counts


def _is_mark(match: re.Match[str], marks: Set[str]) -> bool:
    """Whether a find is a mark, or the word inside one."""
    start, end = match.span()
    around = match.string[max(0, start - 1) : end + 1]
    return match.group() in marks or around in marks


def patterns(options: Patterns, items: Iterator[Item], context: Context) -> Iterator[Item]:
    """Redact or reject. Patterns are looked for one after the other, each in what the ones before
    left.
    """
    active = [(pattern, options.found) for kind, pattern in KNOWN.items() if kind in options.find]
    if options.words is not None:
        listed = _kept_word_pattern(options.words, changed_at(options.words))
        active.append((listed, options.words_found))
    marks = [pattern for pattern, _ in active]
    rejecting = [pattern.name for pattern, action in active if action is Found.reject]
    for item in items:
        counts: Counter[str] = Counter()

        def clean(where: str, text: str, counts: Counter[str] = counts) -> str:
            text, replaced = redacted(text, marks)
            counts.update(replaced)
            return text

        columns = replace_texts(item.columns, clean)
        context.tallies.update(counts)
        bad = [name for name in rejecting if counts[name]]
        reason = f"holds {', '.join(bad)}" if bad else None
        if reason is None and counts:
            emptying = emptied(item.columns, columns)
            reason = f"{emptying} after redaction" if emptying is not None else None
        if reason is not None:
            context.rejected(item, reason)
            continue
        if counts:
            item.columns = columns
        yield item
