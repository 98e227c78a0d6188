"""Command lines in scripts: what bash would pass to a program, as far as the text alone tells.

Variables and arrays that the script sets are put in, here-documents are read, comments left out.
What only a shell can know (``$(...)``, variables of the environment) stays as it is written.
"""

import ast
import operator
import re
import shlex
from collections.abc import Callable
from pathlib import Path

_ARRAY = re.compile(r"^\s*(\w+)=\(\s*$(.*?)^\s*\)\s*$", re.MULTILINE | re.DOTALL)
_HEREDOC = re.compile(r"^.*<<-?\s*['\"]?(\w+)['\"]?\s*$\n(.*?)^\s*\1\s*$", re.MULTILINE | re.DOTALL)
_ASSIGNED = re.compile(r"^(\w+)=(.*)$", re.DOTALL)
_VARIABLE = re.compile(r"\$\{(\w+)(?:\[@\])?\}|\$(\w+)")
_COMMENT = re.compile(r"(?:^|\s)#.*$")


def is_shells(text: object) -> bool:
    """Whether a value is one that only a shell could fill in."""
    return isinstance(text, str) and ("$" in text or "`" in text)


def script_text(path: Path) -> str:
    """The text of a script; of a Python file its docstring, where examples have their command."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(text)) or ""
    return text


def commands(text: str) -> list[list[str]]:
    """The commands of a script, as words; what isn't a command that can be read is left out."""
    variables: dict[str, str] = {}
    lines = _lines(_with_arrays(text, variables))
    out = []
    for line in lines:
        for words in _commands_of(_filled(line, variables)):
            assigned = _ASSIGNED.match(words[0])
            if assigned and len(words) == 1:
                variables[assigned[1]] = assigned[2]
            else:
                out.append(words)
    return out


def _with_arrays(text: str, variables: dict[str, str]) -> str:
    """The text without its arrays, which become variables, and with its here-documents as commands
    of their own.
    """
    for match in _ARRAY.finditer(text):
        kept = [_COMMENT.sub("", line) for line in match[2].splitlines()]
        variables[match[1]] = " ".join(kept)
    text = _ARRAY.sub("", text)
    return _HEREDOC.sub(lambda match: f"{match[2]}\n", text)


def _lines(text: str) -> list[str]:
    """Lines that a backslash continues are put together; a comment in between ends nothing."""
    out: list[str] = []
    going_on = False
    for line in text.splitlines():
        stripped = line.rstrip()
        if stripped.lstrip().startswith("#"):
            continue
        body = stripped[:-1] if stripped.endswith("\\") else stripped
        if going_on:
            out[-1] += " " + body
        else:
            out.append(body)
        going_on = stripped.endswith("\\")
    return out


def _filled(line: str, variables: dict[str, str]) -> str:
    for _ in range(5):  # a variable may hold another
        filled = _VARIABLE.sub(lambda m: variables.get(m[1] or m[2], m[0]), line)
        if filled == line:
            break
        line = filled
    return line


def _commands_of(line: str) -> list[list[str]]:
    """The commands of a line as words; none where its quotes don't close."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    lexer.commenters = ""  # a word may hold a #, as data#500
    try:
        words = list(lexer)
    except ValueError:
        return []
    out: list[list[str]] = [[]]
    for word in _with_sums(words):
        if word.startswith("#"):
            break
        if word and set(word) <= set(";&|"):
            out.append([])
        else:
            out[-1].append(word)
    return [command for command in out if command]


def _with_sums(words: list[str]) -> list[str]:
    """`$(...)` as one word, and `$(expr 16 / 4 / 2)` of numbers as its value."""
    out: list[str] = []
    for word in words:
        if out and out[-1].startswith("$(") and ")" not in out[-1]:
            out[-1] += f" {word}"
        else:
            out.append(word)
    return [_sum(word) for word in out]


_DOES: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}


def _sum(word: str) -> str:
    match = re.fullmatch(r"\$\(expr ([\d +*/-]+)\)", word)
    if match is None:
        return word
    first, *rest = match[1].split()
    pairs = list(zip(rest[::2], rest[1::2], strict=False))
    if not first.isdigit() or len(rest) % 2 or any(sign not in _DOES for sign, _ in pairs):
        return word
    total = int(first)
    for sign, number in pairs:  # of one rank, as in the division of a batch
        if not number.isdigit() or (sign == "/" and int(number) == 0):
            return word
        total = _DOES[sign](total, int(number))
    return str(total)
