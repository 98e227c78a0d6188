"""Texts that came through something that broke them: markup, wrong encodings, noise, one thing said
over and over.
"""

import re
from collections.abc import Sequence

import numpy as np

from rlhf.data.prepare.items import Item, parts
from rlhf.data.prepare.texts import ngrams
from rlhf.data.prepare.words import alphanumeric, is_plain, visible
from rlhf.data.report.looked import by_row
from rlhf.data.report.records import Finding, Marked, Section, Settings, Severity, Table, finding
from rlhf.data.report.remedies import REMEDIES
from rlhf.data.report.texts import counted_words, words
from rlhf.process.libraries import require

_TAGS = (
    "a|b|i|u|p|br|hr|li|ul|ol|td|tr|th|em|h[1-6]|div|span|font|table|tbody|strong|center|"
    "script|style|img|input|form|button|body|html|head|iframe"
)
HTML = re.compile(
    rf"</?(?:{_TAGS})(?:\s[^<>]*)?/?>|&(?:amp|lt|gt|quot|apos|nbsp|#\d{{1,6}}|#x[0-9a-f]{{1,6}});",
    re.IGNORECASE,
)
_FENCED = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)  # code keeps its tags and its symbols
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd\ud800-\udfff]")
MIN_WORDLIKE = 0.5  # share of visible characters that are letters, marks or digits
_VISIBLE = 12  # visible characters that a text needs before its symbols are counted
MAX_RUN = 10  # equal characters in a row (dots, dashes and other rules may go on)
_RUN = re.compile(rf"([^.\-_=*#~+ \n\t])\1{{{MAX_RUN}}}")
MIN_DISTINCT = 0.5  # different 3-grams of words / all of them
_REPEATABLE = 20  # words that a text needs before its repetitions are counted


def html_problem(text: str) -> str | None:
    """Whether a text has a tag or an entity outside code, and which."""
    if "<" not in text and "&" not in text:
        return None
    match = HTML.search(_without_code(text))
    if match:
        return f"holds {match.group()}"
    return None


def _without_code(text: str) -> str:
    return _FENCED.sub(" ", text) if "`" in text else text


def encoding_problem(text: str) -> str | None:
    """Whether a text has mojibake, by ftfy's heuristic, or characters that no text has: control
    characters, replacement characters, lone surrogates.
    """
    if is_plain(text, b"\t\n\r"):
        return None
    match = _CONTROL.search(text)
    if match:
        return f"holds U+{ord(match.group()):04X}"
    # its heuristic knows sequences of other characters only
    if not text.isascii() and require("ftfy.badness", "data").is_bad(text):
        return "decoded with the wrong encoding"
    return None


def garbled_problem(text: str) -> str | None:
    """Whether a text is mostly symbols, or has a long run of the same character."""
    plain = _without_code(text)
    shown = visible(plain)
    # letters and digits are in words, with what stands inside of those
    if shown >= _VISIBLE and alphanumeric(plain) < MIN_WORDLIKE * shown:
        share = len("".join(words(plain))) / shown
        if share < MIN_WORDLIKE:
            return f"{1 - share:.0%} of its characters are neither letters nor digits"
    run = _RUN.search(plain) if _has_run(plain) else None
    if run:
        return f"{run[1]!r} more than {MAX_RUN} times in a row"
    return None


def _has_run(text: str) -> bool:
    """Whether more than MAX_RUN equal characters stand in a row: a pattern would look back at each
    of them.
    """
    if text.isascii():
        codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8)
    else:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return MAX_RUN * b"\1" in (codes[1:] == codes[:-1]).tobytes()


def repetition_problem(text: str) -> str | None:
    """Whether a text has few different 3-grams of words."""
    content = counted_words(text)
    if content.number < _REPEATABLE:
        return None
    size = content.span(3)
    # every different word begins a gram of its own, but for the last ones
    if len(set(content.tokens)) - size + 1 >= MIN_DISTINCT * (len(content.tokens) - size + 1):
        return None
    grams = list(ngrams(content.tokens, size))
    share = len(set(grams)) / len(grams)
    if share < MIN_DISTINCT:
        return f"{1 - share:.0%} of its 3-grams of words stood before"
    return None


_CHECKS = {
    "html": html_problem,
    "encoding": encoding_problem,
    "garbled": garbled_problem,
    "repetition": repetition_problem,
}
_MESSAGES = {
    "html": (Severity.warn, "rows hold HTML tags or entities"),
    "encoding": (Severity.warn, "rows hold mojibake, control or replacement characters"),
    "garbled": (Severity.warn, "rows are mostly symbols or one character"),
    "repetition": (Severity.info, "rows say the same words over and over"),
}


def noise_of_part(items: list[Item]) -> list[tuple[int, tuple[str, str]]]:
    """(row, (check, how)) of the first text of each row that has a problem, for every check: what a
    process does by itself.
    """
    out = []
    for number, item in enumerate(items):
        texts = parts(item.columns)
        for check, problem in _CHECKS.items():
            reasons = ((where, problem(text)) for where, text in texts)
            first = next(((where, reason) for where, reason in reasons if reason), None)
            if first is not None:
                how = " ".join(map(str, first))
                out.append((number, (check, how)))
    return out


def noise(items: Sequence[Item], settings: Settings) -> Section:
    """Every check of broken text, each text of a row by itself."""
    problems = {check: Marked(settings.named) for check in _CHECKS}
    for row, (check, reason) in by_row(noise_of_part, items):
        problems[check].add(items[row], reason)
    findings: list[Finding] = []
    for check, rows in problems.items():
        severity, message = _MESSAGES[check]
        findings += finding(check, severity, f"{len(rows)} {message}", REMEDIES[check], rows)
    figures = {check: len(rows) for check, rows in problems.items()}
    table = Table(
        "Broken text",
        ("check", "rows"),
        tuple((_MESSAGES[check][1], n) for check, n in figures.items()),
    )
    return Section("noise", "Broken text", figures, tuple(findings), (table,))
