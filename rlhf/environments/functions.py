"""The tools that have a name: environment.tools=[calculator, python, lookup, shell].

This file is executed in the sandbox, for each call anew, and so is a file of one's own (FILES is
set there then): it needs the standard library alone.
"""

import ast
import math
import operator
import os
from collections.abc import Callable
from typing import Any

# The directory environment.files, inside the sandbox; None where it is not set.
FILES: str | None = None

_MOST_LINES, _LINE = 20, 240  # of a look-up: lines, and characters of each
_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "ceil": math.ceil,
    "cos": math.cos,
    "exp": math.exp,
    "factorial": math.factorial,
    "floor": math.floor,
    "gcd": math.gcd,
    "log": math.log,
    "max": max,
    "min": min,
    "round": round,
    "sin": math.sin,
    "sqrt": math.sqrt,
    "tan": math.tan,
}
_CONSTANTS = {"pi": math.pi, "e": math.e}


def calculator(expression: str) -> str:
    """
    Compute an arithmetic expression, such as (17 - 4) * 2 ** 10 or sqrt(2).

    Args:
        expression: Numbers, + - * / // % **, brackets, pi, e, and functions such as sqrt, log, max.
    """
    value = _value(ast.parse(expression.strip(), mode="eval").body)
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_value(left), _value(right))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*map(_value, arguments))
    raise ValueError(f"{ast.unparse(node)!r} is no arithmetic")


def python(code: str) -> None:
    """
    Run Python code. The result is what it prints, and the value of its last expression.

    Args:
        code: Python 3 code, which has the standard library alone.
    """
    tree = ast.parse(code, "code")
    names: dict[str, object] = {"__name__": "__main__"}
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr):
        exec(compile(tree, "code", "exec"), names)
        return
    tree.body.pop()
    exec(compile(tree, "code", "exec"), names)
    value = eval(compile(ast.Expression(last.value), "code", "eval"), names)  # noqa: S307
    if value is not None:
        print(repr(value))


def lookup(query: str) -> str:
    """
    Search files for a text; upper and lower case are equal. The result is the lines that hold it.

    Args:
        query: The text to search for.
    """
    wanted = query.strip().casefold()
    if not wanted:
        raise ValueError("the query is empty")
    lines: list[str] = []
    for folder, folders, names in os.walk(FILES or "."):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(folder, name)
            lines += _matches(path, wanted, _MOST_LINES - len(lines))
            if len(lines) == _MOST_LINES:
                return "\n".join([*lines, f"(the first {_MOST_LINES} lines)"])
    return "\n".join(lines) or "nothing"


def _matches(path: str, wanted: str, most: int) -> list[str]:
    """At most so many lines of a file that hold the text, with the file's name and their number."""
    lines: list[str] = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if len(lines) == most:
                break
            if wanted in line.casefold():
                name = os.path.relpath(path, FILES or ".")
                lines.append(f"{name}:{number}: {line.strip()[:_LINE]}")
    return lines


def shell(command: str) -> None:
    """
    Run a command in a shell. The result is what it prints.

    Args:
        command: A command of a POSIX shell, such as ls or grep -c word file.
    """
    if FILES is not None:
        os.chdir(FILES)
    os.execve("/bin/sh", ["sh", "-c", command], {"PATH": "/usr/bin:/bin", "HOME": "/box"})
