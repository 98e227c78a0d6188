"""What of an answer counts. Pure functions."""

import re
from typing import Any

import regex

from conf.labelling import TaskConfig
from eval.tasks.shapes import TaskRow
from rlhf.types import UserError

_SECONDS = 2.0  # a pattern that takes longer backtracks without end


def compile_pattern(key: str, pattern: str | None) -> Any:
    """The pattern of a task, or None. Raises UserError for one that is none."""
    if pattern is None:
        return None
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise UserError(f"{key}={pattern!r} is no valid pattern ({error}).") from error


def counted_text(
    task: TaskConfig,
    pattern: Any,
    text: str,
) -> str | None:
    """The part of an answer that counts: all of it without a pattern; None where the pattern is not
    in it. Raises TimeoutError for a pattern that backtracks without end.
    """
    if pattern is None:
        return text
    found = None
    for match in pattern.finditer(text, timeout=_SECONDS):
        found = match
        if not task.last_match:
            break
    if found is None:
        return None
    groups = [group for group in found.groups() if group is not None]
    return groups[0] if groups else found[0]


def whole_code(row: TaskRow, code: str) -> str:
    """The program that an answer makes of what the row begins (HumanEval): behind it, unless it
    defines the function itself; then behind what stands before that function, such as imports.
    """
    begun, name = row.columns.get("begun"), row.columns.get("entry_point")
    if not isinstance(begun, str) or not isinstance(name, str):
        return code
    defines = re.compile(rf"^(?:async )?def {re.escape(name)}\b", re.MULTILINE)
    if not defines.search(code):
        return begun + code
    own = defines.search(begun)
    return begun[: own.start() if own else 0] + code


def loosened(text: str) -> list[str]:
    """An answer as IFEval's loose check takes it: as it is, and without its first line, its last
    line, both, and each of these without asterisks (Zhou et al. 2023, arXiv:2311.07911).
    """
    lines = text.split("\n")
    cut = [lines, lines[1:], lines[:-1], lines[1:-1]]
    variants = ["\n".join(part).strip() for part in cut]
    return [text, *variants[1:], *(one.replace("*", "") for one in [text, *variants[1:]])]
