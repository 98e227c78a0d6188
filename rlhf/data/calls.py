"""Calls of functions and the functions that may be called, as OpenAI has them, out of the JSON that
data files hold; and the checks of single values that they share with messages.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from rlhf.data.json_text import each_once
from rlhf.process.wording import describe, nearest_hint
from rlhf.types import RowError, Tools

_HALVES = re.compile("[\ud800-\udfff]")


# ---- values ----


def is_nothing(value: Any) -> bool:
    """Whether a value says nothing: null, or an empty text, list or object."""
    return value is None or (isinstance(value, (str, list, tuple, Mapping)) and not value)


def checked_text(value: Any, key: str, *, empty: bool = False) -> str:
    """A value that is a text. Raises RowError, `key` being what it names."""
    if not isinstance(value, str):
        raise RowError(f"key {key!r}: expected text, found {describe(value)}")
    if not value and not empty:
        raise RowError(f"key {key!r}: expected text, found an empty one")
    refuse_halves(value, key)
    return value


def refuse_halves(text: str, key: str) -> None:
    if _HALVES.search(text):
        raise RowError(
            f"key {key!r}: expected text, found half of a surrogate pair (U+D800 to U+DFFF), "
            "which no encoding holds"
        )


def missing(key: str, keys: list[Any]) -> RowError:
    """The error of a row or message without a required key, with the nearest that it has."""
    hint = nearest_hint(key, [k for k in keys if isinstance(k, str)], "; nearest key: '", "'")
    names = ", ".join(map(str, keys)) or "none"
    return RowError(f"key {key!r}: expected, but missing; found keys: {names}{hint}")


def parsed(text: str, key: str, expected: str) -> Any:
    """What a JSON text holds. Raises RowError."""

    def no_number(name: str) -> Any:
        raise ValueError(f"{name} is no number of JSON's")

    try:
        return json.loads(text, parse_constant=no_number, object_pairs_hook=each_once)
    except (ValueError, RecursionError) as error:
        raise RowError(
            f"key {key!r}: expected {expected}, found a text that is not read as JSON ({error}): "
            f"{describe(text)}"
        ) from None


# ---- calls and tools ----


def call_of(call: Any, key: str) -> dict[str, Any]:
    """One call as OpenAI has it, its arguments as an object. Raises RowError."""
    if isinstance(call, str):
        call = parsed(call, key, "a call as {name, arguments}")
    if not isinstance(call, Mapping):
        raise RowError(
            f"key {key!r}: expected a call as {{name, arguments}}, found {describe(call)}"
        )
    outer = {str(name): value for name, value in call.items() if value is not None}
    kind = outer.pop("type", "function")
    if kind != "function":
        raise RowError(f"key '{key}.type': expected 'function', found {describe(kind)}")
    inner = outer.pop("function", None)
    if isinstance(inner, Mapping):
        inner = {str(name): value for name, value in inner.items()}
    else:  # {name, arguments}, or {function: its name, arguments}
        inner = {"name": inner} if inner is not None else {}
        for name in ("name", "arguments", "parameters"):
            if name in outer and name not in inner:
                inner[name] = outer.pop(name)
    function = {"name": checked_text(inner.pop("name", None), f"{key}.function.name")}
    given = inner.pop("arguments", None)
    if given is None:
        given = inner.pop("parameters", None)
    arguments = _arguments(given, f"{key}.function.arguments")
    others = {name: value for name, value in inner.items() if value is not None}
    identity = {"id": outer.pop("id")} if "id" in outer else {}
    body = {**function, "arguments": arguments, **others}
    return {**identity, "type": "function", "function": body, **outer}


def _arguments(value: Any, key: str) -> dict[str, Any]:
    """The arguments of a call as an object; none at all are an empty one. Raises RowError."""
    if isinstance(value, str):
        value = parsed(value, key, "an object") if value.strip() else {}
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RowError(f"key {key!r}: expected an object, found {describe(value)}")
    refuse_halves(json.dumps(value, ensure_ascii=False, default=str), key)
    return dict(value)


def tools_of(row: Mapping[Any, Any]) -> tuple[Tools | None, str | None]:
    """The functions that a row's answers may call (None for none), as OpenAI has them, and the
    column that they are in: ``tools``, or the older ``functions``. Raises RowError.
    """
    if "tools" in row:
        tools = _tools(row["tools"], "tools")
        if tools:
            return tools, "tools"
    given = row.get("functions")
    if isinstance(given, list) and given and all(_is_function(each) for each in given):
        return _tools(given, "functions"), "functions"
    return None, "tools" if "tools" in row else None


def _is_function(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("name"), str)


def _tools(value: Any, key: str) -> Tools | None:
    expected = "a list of functions as {name, description, parameters}"
    if isinstance(value, str):
        value = parsed(value, key, expected) if value.strip() else None
    if is_nothing(value):
        return None
    listed = value if isinstance(value, (list, tuple)) else [value]
    out = []
    for i, given in enumerate(listed):
        name = f"{key}[{i}]"
        tool = parsed(given, name, "a function") if isinstance(given, str) else given
        if not isinstance(tool, Mapping):
            raise RowError(
                f"key {name!r}: expected {expected}, found {describe(tool)}. A column that holds "
                "something else can be renamed by data.columns"
            )
        out.append(_tool(tool))
    refuse_halves(json.dumps(out, ensure_ascii=False, default=str), key)
    return out


def _tool(given: Mapping[Any, Any]) -> dict[str, Any]:
    tool = _without_nulls(given)
    if "function" in tool or not isinstance(tool.get("name"), str):
        return tool
    kind = tool.pop("type", "function")
    return {"type": kind, "function": tool}


def _without_nulls(value: Any) -> Any:
    """A schema without the nulls that a Parquet file has where other rows have a key."""
    if isinstance(value, Mapping):
        return {
            str(key): _without_nulls(held)
            for key, held in value.items()
            if held is not None or key in ("default", "const")
        }
    if isinstance(value, list):
        return [_without_nulls(held) for held in value]
    return value
