"""kind=python: a class of one's own is the environment."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from conf.reward import EnvironmentConfig
from rlhf.process.libraries import load_named
from rlhf.types import Environment, Tools, UserError

_METHODS = ("reset", "step", "close")  # of the protocol rlhf.types.Environment


def make(environment: EnvironmentConfig, tokenizer: Any = None) -> Callable[[], Environment]:
    """What makes an environment of ``environment.path`` for one episode. Raises UserError where it
    is no such class, or doesn't take ``environment.options``.
    """
    made, options = _class_of(environment), dict(environment.options)
    check_arguments(made, options, f"environment.path={environment.path}")
    return lambda: made(**options)


def tools_of(environment: EnvironmentConfig) -> Tools | None:
    """The class's attribute `tools`, JSON schemas of the functions that a policy may call in it;
    None where it has none. Raises UserError.
    """
    return getattr(_class_of(environment), "tools", None)


def _class_of(environment: EnvironmentConfig) -> Callable[..., Any]:
    path = environment.path
    assert path is not None  # EnvironmentConfig.check_complete
    made = load_named(path, "environment.path", "class")
    missing = [name for name in _METHODS if not callable(getattr(made, name, None))]
    if missing:
        raise UserError(
            f"environment.path={path}: an environment has the methods {', '.join(_METHODS)}, of "
            f"which this class lacks {', '.join(missing)}."
        )
    return made


def check_arguments(made: Callable[..., Any], options: Mapping[str, Any], place: str) -> None:
    """`made` can be called with ``environment.options``. Raises UserError."""
    try:
        signature = inspect.signature(made)
    except ValueError:
        return  # some classes written in C tell no signature
    try:
        signature.bind(**options)
    except TypeError as error:
        raise UserError(
            f"environment.options={dict(options)}: {error}; {place} takes {signature}."
        ) from error
