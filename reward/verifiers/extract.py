r"""Where the answer stands in a response. Pure functions from text to text; None where there is
none.

"#### 42"                       marker "####": the rest of the line after its last occurrence
(GSM8K, Cobbe et al. 2021, arXiv:2110.14168) "so \boxed{\frac{1}{2}}."       marker "\boxed{}": what
stands between the balanced braces of the last one (MATH, Hendrycks et al. 2021)
"<answer>yes</answer>"          marker "<answer>": what stands between the last pair of tags
"""

import re
import string
import unicodedata
from decimal import Context, Decimal, InvalidOperation
from typing import Any

BOXED = r"\boxed{}"
_TAG = re.compile(r"<([A-Za-z_][\w-]*)>")
_LONGEST_NUMBER = 400  # characters; longer ones are no answer that anyone means, and cost time
_PRECISION = Context(prec=450, Emax=10**6, Emin=-(10**6), traps=[InvalidOperation])
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]}}])[-+])?(?:\$\s?)?(?P<top>(?:{_DIGITS})(?:[eE][-+]?\d{{1,6}})?)(?:\s*/\s*(?P<bottom>{_DIGITS}))?"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([-+\d.,]+)\s*\}\s*\{\s*([-+\d.,]+)\s*\}")
_FENCE = re.compile(
    r"^[ \t]*(```+|~~~+)[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*\1[ \t]*$", re.DOTALL | re.MULTILINE
)


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} or \fbox{...} whose braces close."""
    for start in sorted((m.end() for m in re.finditer(r"\\f?box(?:ed)?\s*\{", text)), reverse=True):
        depth = 1
        for i in range(start, len(text)):
            if text[i] in "{}" and text[i - 1] != "\\":
                depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return text[start:i].strip()
    return None


def after_marker(text: str, marker: str) -> str | None:
    """What `marker` points at; see the module."""
    if marker == BOXED:
        return boxed(text)
    tag = _TAG.fullmatch(marker)
    if tag:
        close = text.rfind(f"</{tag[1]}>")
        start = text.rfind(marker, 0, close) if close >= 0 else -1
        return text[start + len(marker) : close].strip() if start >= 0 else None
    start = text.rfind(marker)
    if start < 0:
        return None
    line = text[start + len(marker) :].split("\n", 1)[0].strip()
    return line or None


def number_of(value: Any) -> Decimal | None:
    """The number in a span of text (its last one), or a number itself; None for anything else, true
    and false included.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        found = Decimal(str(value))
        return found if found.is_finite() else None
    numbers = numbers_in(value) if isinstance(value, str) else []
    return numbers[-1] if numbers else None


def numbers_in(text: str) -> list[Decimal]:
    """Numbers in reading order: signs, thousands with commas, decimals, exponents, a/b and LaTeX
    fractions of plain numbers.

    A minus right after a word or a bracket is an operator. Currency and percent signs are passed
    over: 50% is 50.
    """
    text = (
        text.replace("\u2212", "-")
        .replace("{,}", ",")
        .replace("\\,", "")
        .replace("\\!", "")
        .replace("\\$", "$")
    )
    out = []
    for match in _NUMBER.finditer(_FRACTION.sub(r"\1/\2", text)):
        number = _decimal(match)
        if number is not None:
            out.append(number)
    return out


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
    # a plain minus would round to the context's 28 digits
    return top.copy_negate() if match["sign"] == "-" else top


def close(found: Decimal, expected: Decimal, tolerance: float) -> bool:
    """Whether |found - expected| <= tolerance x max(1, |expected|), in decimal arithmetic: 0.1 +
    0.2 is 0.3, and large integers stay exact.
    """
    difference = _PRECISION.subtract(found, expected).copy_abs()
    return difference <= _PRECISION.multiply(
        Decimal(str(tolerance)), max(Decimal(1), expected.copy_abs())
    )


def normalise(text: str, *, ignore_case: bool, ignore_punctuation: bool) -> str:
    """Unicode NFKC, single spaces; case folded; punctuation removed but for the point, comma and
    sign of a number (3.5 is not 35).
    """
    text = unicodedata.normalize("NFKC", text)
    if ignore_case:
        text = text.casefold()
    if ignore_punctuation:
        text = re.sub(r"(?<!\d)[.,]|[.,](?!\d)|-(?!\d)|(?<=\w)-", " ", text)
        text = "".join(
            c
            if c in ".,-"
            or not (c in string.punctuation or unicodedata.category(c).startswith("P"))
            else " "
            for c in text
        )
    return " ".join(text.split())


def fenced(text: str, languages: tuple[str, ...]) -> str | None:
    """The content of the last fenced block that names one of `languages` or none."""
    blocks = [match[3] for match in _FENCE.finditer(text) if match[2].lower() in ("", *languages)]
    return blocks[-1] if blocks else None


def letter_of(text: str, letters: str, marker: str | None) -> str | None:
    r"""The letter that a response chose: after `marker`, else in \boxed{}, after "answer is", at
    its start, or the only one in brackets.
    """
    if marker is not None:
        return _lone_letter(after_marker(text, marker), letters)
    found = _lone_letter(boxed(text), letters)
    if found is not None:
        return found
    one = f"[{re.escape(letters)}]"
    said = re.findall(rf"(?i:answer|choice|option)(?i:\s+is)?\s*:?[\s*_(\[]*({one})(?![\w'])", text)
    if said:
        return str(said[-1])
    bracketed = set(re.findall(rf"\(({one})\)", text))
    if len(bracketed) > 1:
        return None
    start = re.match(rf"[\s*_(\[]*({one})(?:[\s*_]*[)\].:]|[\s*_]*$|[\s*_]*\n)", text)
    if start:
        return start[1]
    return bracketed.pop() if bracketed else None


def _lone_letter(span: str | None, letters: str) -> str | None:
    """A span that is a letter and nothing more than its decoration: "(b)", "**B**", "\text{B}", "B.
    Paris".
    """
    if span is None:
        return None
    span = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", span).strip()
    match = re.match(r"[\s*_(\[$]*(\w)(?:[\s*_$]*[)\].:]|[\s*_$]*$)", span)
    return match[1].upper() if match and match[1].upper() in letters else None
