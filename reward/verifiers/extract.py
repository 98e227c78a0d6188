r"""Finds the answer in a response: pure functions from text to text, None where there is no answer.

A marker says where the answer is:

    ####      "#### 42": the rest of the line after its last occurrence (GSM8K, Cobbe et al. 2021,
              arXiv:2110.14168); likewise any other text that is not one of the two below
    \boxed{}  "so \boxed{\frac{1}{2}}.": the content of the last one whose braces are balanced
              (MATH, Hendrycks et al. 2021)
    <answer>  "<answer>yes</answer>": the content of the last pair of tags, of any name
"""

import re
import string
import unicodedata
from decimal import Context, Decimal, InvalidOperation
from typing import Any

BOXED = r"\boxed{}"
_TAG = re.compile(r"<([A-Za-z_][\w-]*)>")
_LONGEST_NUMBER = 400  # characters; longer numbers are no answers, and cost time
_PRECISION = Context(prec=450, Emax=10**6, Emin=-(10**6), traps=[InvalidOperation])
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}])[-+])?(?:\$\s?)?"
    rf"(?P<top>(?:{_DIGITS})(?:[eE][-+]?\d{{1,6}})?)(?:\s*/\s*(?P<bottom>{_DIGITS}))?"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([-+\d.,]+)\s*\}\s*\{\s*([-+\d.,]+)\s*\}")
_FENCE = re.compile(
    r"^[ \t]*(```+|~~~+)[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*\1[ \t]*$", re.DOTALL | re.MULTILINE
)


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} or \fbox{...} whose braces are balanced."""
    for start in sorted((m.end() for m in re.finditer(r"\\f?box(?:ed)?\s*\{", text)), reverse=True):
        depth = 1
        for i in range(start, len(text)):
            if text[i] in "{}" and text[i - 1] != "\\":
                depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return text[start:i].strip()
    return None


def after_marker(text: str, marker: str) -> str | None:
    """The text that `marker` points at (see the module)."""
    if marker == BOXED:
        return boxed(text)
    tag = _TAG.fullmatch(marker)
    if tag:
        return _inside_tag(text, tag[1])
    start = text.rfind(marker)
    if start < 0:
        return None
    line = text[start + len(marker) :].split("\n", 1)[0].strip()
    return line or None


def _inside_tag(text: str, name: str) -> str | None:
    opening = f"<{name}>"
    end = text.rfind(f"</{name}>")
    if end < 0:
        return None
    start = text.rfind(opening, 0, end)
    if start < 0:
        return None
    return text[start + len(opening) : end].strip()


def answer_of(text: str, marker: str | None) -> str | None:
    """The text that `marker` points at; all of it without a marker."""
    if marker is None:
        return text
    return after_marker(text, marker)


def number_of(value: Any) -> Decimal | None:
    """The last number of a text, or a number itself; None for anything else, true and false
    included.
    """
    numbers = []
    if isinstance(value, str):
        numbers = numbers_in(value)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        numbers = [Decimal(str(value))]
    if not numbers or not numbers[-1].is_finite():
        return None
    return numbers[-1]


def numbers_in(text: str) -> list[Decimal]:
    """The numbers of a text in reading order: with signs, thousands with commas, decimals,
    exponents, a/b and LaTeX fractions of plain numbers.

    A minus right after a word or a bracket is an operator. Currency and percent signs are ignored:
    50% is 50.
    """
    text = (
        text.replace("\u2212", "-")
        .replace("{,}", ",")
        .replace("\\,", "")
        .replace("\\!", "")
        .replace("\\$", "$")
    )
    matches = _NUMBER.finditer(_FRACTION.sub(r"\1/\2", text))
    numbers = (_decimal(match) for match in matches)
    return [number for number in numbers if number is not None]


def _decimal(match: re.Match[str]) -> Decimal | None:
    if len(match[0]) > _LONGEST_NUMBER:
        return None
    top = _PRECISION.create_decimal(match["top"].replace(",", ""))
    if match["bottom"] is not None:
        bottom = Decimal(match["bottom"].replace(",", ""))
        if bottom == 0:
            return None
        top = _PRECISION.divide(top, bottom)
    if not top.is_finite():
        return None
    if match["sign"] == "-":
        return (
            top.copy_negate()
        )  # a plain minus would round to the 28 digits of the default context
    return top


def close(number: Decimal, expected: Decimal, tolerance: float) -> bool:
    """Whether |number - expected| <= tolerance x max(1, |expected|), in decimal arithmetic: 0.1 +
    0.2 is 0.3, and large integers stay exact.
    """
    difference = _PRECISION.subtract(number, expected).copy_abs()
    scale = max(Decimal(1), expected.copy_abs())
    return difference <= _PRECISION.multiply(Decimal(str(tolerance)), scale)


def normalise(text: str, *, ignore_case: bool, ignore_punctuation: bool) -> str:
    """A text in Unicode NFKC with single spaces; where asked, with folded case, and without
    punctuation except the point, comma and sign of a number (3.5 is not 35).
    """
    text = unicodedata.normalize("NFKC", text)
    if ignore_case:
        text = text.casefold()
    if ignore_punctuation:
        text = re.sub(r"(?<!\d)[.,]|[.,](?!\d)|-(?!\d)|(?<=\w)-", " ", text)
        text = "".join(" " if _is_punctuation(c) and c not in ".,-" else c for c in text)
    return " ".join(text.split())


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def fenced(text: str, languages: tuple[str, ...]) -> str | None:
    """The content of the last fenced block whose language is among `languages` or not named."""
    blocks = [match[3] for match in _FENCE.finditer(text) if match[2].lower() in ("", *languages)]
    return blocks[-1] if blocks else None


def fenced_or_all(text: str, languages: tuple[str, ...]) -> str:
    """`fenced`, or the whole text where it has no such block."""
    block = fenced(text, languages)
    return text if block is None else block


def letter_of(text: str, letters: str, marker: str | None) -> str | None:
    r"""The letter that a response chose: in the text that `marker` points at; without a marker in
    \boxed{}, after "answer is", at the start, or the only letter in brackets.
    """
    if marker is not None:
        return _lone_letter(after_marker(text, marker), letters)
    in_box = _lone_letter(boxed(text), letters)
    if in_box is not None:
        return in_box
    letter = f"[{re.escape(letters)}]"
    announced = re.findall(
        rf"(?i:answer|choice|option)(?i:\s+is)?\s*:?[\s*_(\[]*({letter})(?![\w'])", text
    )
    if announced:
        return str(announced[-1])
    bracketed = set(re.findall(rf"\(({letter})\)", text))
    if len(bracketed) > 1:
        return None
    start = re.match(rf"[\s*_(\[]*({letter})(?:[\s*_]*[)\].:]|[\s*_]*$|[\s*_]*\n)", text)
    if start:
        return start[1]
    return bracketed.pop() if bracketed else None


def _lone_letter(span: str | None, letters: str) -> str | None:
    """The letter of a span that begins with a letter and its decoration: "(b)", "**B**",
    "\text{B}", "B. Paris".
    """
    if span is None:
        return None
    span = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", span).strip()
    match = re.match(r"[\s*_(\[$]*(\w)(?:[\s*_$]*[)\].:]|[\s*_$]*$)", span)
    return match[1].upper() if match and match[1].upper() in letters else None
