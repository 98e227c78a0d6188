"""Functions that a policy may call: their JSON schemas, their source, and what fits them."""

import difflib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.environments import functions
from rlhf.process.libraries import load_named
from rlhf.types import Tools, UserError

_KEY = "environment.tools"
BUILT_IN: Mapping[str, Callable[..., Any]] = {
    "calculator": functions.calculator,
    "python": functions.python,
    "lookup": functions.lookup,
    "shell": functions.shell,
}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the policy may call."""

    name: str
    schema: dict[str, Any]  # as OpenAI has it
    source: str  # of its module
    own: bool  # of the user's, rather than built in

    @property
    def parameters(self) -> dict[str, Any]:
        parameters: dict[str, Any] = self.schema["function"].get("parameters", {})
        return parameters


def load(names: Sequence[str]) -> dict[str, Tool]:
    """The functions of ``environment.tools`` by their names. Raises UserError."""
    tools: dict[str, Tool] = {}
    for spec in names:
        tool = _tool(spec)
        if tool.name in tools:
            raise UserError(f"{_KEY}={list(names)}: there are two functions {tool.name}.")
        tools[tool.name] = tool
    return tools


def _tool(spec: str) -> Tool:
    own = ":" in spec
    if not own and spec not in BUILT_IN:
        near = difflib.get_close_matches(spec, BUILT_IN, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(
            f"{_KEY}=[{spec}]: expected {', '.join(BUILT_IN)}, or pkg.module:function.{hint}"
        )
    function = load_named(spec, _KEY, "function") if own else BUILT_IN[spec]
    _check_arguments(function, spec)
    name, module = function.__name__, sys.modules[function.__module__]
    if getattr(module, name, None) is not function:
        raise UserError(
            f"{_KEY}=[{spec}]: the function is not {function.__module__}.{name}, by which the "
            "sandbox loads it. Give a function of a module, undecorated."
        )
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError) as error:
        raise UserError(f"{_KEY}=[{spec}]: the source can't be read: {error}.") from error
    return Tool(name, _schema(function, spec), source, own)


def _check_arguments(function: Callable[..., Any], spec: str) -> None:
    """A call names each argument. Raises UserError."""
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(
                f"{_KEY}=[{spec}]: its argument {parameter.name} has no name of its own in a call. "
                "Name each argument."
            )


def _schema(function: Callable[..., Any], spec: str) -> dict[str, Any]:
    """By type hints and the docstring."""
    from transformers.utils import (
        DocstringParsingException,
        TypeHintParsingException,
        get_json_schema,
    )

    try:
        schema: dict[str, Any] = get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException) as error:
        raise UserError(
            f"{_KEY}=[{spec}]: {error} A tool has a docstring whose section Args describes each "
            "argument, and type hints of str, int, float, bool, list, dict, Literal and None."
        ) from error
    schema["function"].pop("return", None)
    return schema


def schemas(tools: Mapping[str, Tool]) -> Tools:
    return [tool.schema for tool in tools.values()]


def misfit(tool: Tool, arguments: Mapping[str, Any]) -> str | None:
    """Why the arguments of a call don't fit; None where they do."""
    import jsonschema

    properties = tool.parameters.get("properties", {})
    unknown = [name for name in arguments if name not in properties]
    if unknown:
        return f"no argument {unknown[0][:80]!r}; expected {', '.join(properties) or 'none'}"
    # get_json_schema says "nullable", which is no word of JSON Schema
    given = {
        name: value
        for name, value in arguments.items()
        if value is not None or not properties[name].get("nullable")
    }
    errors = jsonschema.Draft202012Validator(tool.parameters).iter_errors(given)
    first = next(errors, None)
    if first is None:
        return None
    where = "".join(f"{part}: " for part in first.absolute_path)
    return f"{where}{first.message[:200]}"
