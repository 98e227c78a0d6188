"""From the group `environment` to what makes the environment of an episode."""

from collections.abc import Callable, Mapping
from typing import Any

from conf.reward import EnvironmentConfig, EnvironmentKind
from rlhf.environments import gymnasium, http, python, reasoning_gym, textarena, tools
from rlhf.types import Environment, Tools, UserError

Factory = Callable[[], Environment]

# What makes a factory of options and tokenizer, by kind; raises UserError for options that it
# can't work with.
SOURCES: Mapping[EnvironmentKind, Callable[[EnvironmentConfig, Any], Factory]] = {
    EnvironmentKind.python: python.make,
    EnvironmentKind.tools: tools.make,
    EnvironmentKind.reasoning_gym: reasoning_gym.make,
    EnvironmentKind.textarena: textarena.make,
    EnvironmentKind.gymnasium: gymnasium.make,
    EnvironmentKind.http: http.make,
}


_GAMES = (EnvironmentKind.reasoning_gym, EnvironmentKind.textarena, EnvironmentKind.gymnasium)
# The kinds that read an option; the others are of every kind.
_READ_BY: Mapping[str, tuple[EnvironmentKind, ...]] = {
    "path": (EnvironmentKind.python,),
    "options": (EnvironmentKind.python, EnvironmentKind.tools, *_GAMES),
    "tools": (EnvironmentKind.tools,),
    "files": (EnvironmentKind.tools,),
    "tool_limit_s": (EnvironmentKind.tools,),
    "tool_output": (EnvironmentKind.tools,),
    "game": _GAMES,
    "url": (EnvironmentKind.http,),
    "token_env": (EnvironmentKind.http,),
    "retries": (EnvironmentKind.http,),
}


def _check_read(environment: EnvironmentConfig) -> None:
    """No option is set that only other kinds read. Raises UserError."""
    default = EnvironmentConfig()
    for name, kinds in _READ_BY.items():
        value = getattr(environment, name)
        if environment.kind not in kinds and value != getattr(default, name):
            others = ", ".join(kind.value for kind in kinds)
            raise UserError(
                f"environment.{name}={value}: only environment={others} reads it, not "
                f"{environment.kind.value}."
            )


def make_factory(environment: EnvironmentConfig, tokenizer: Any = None) -> Factory:
    """What makes an environment of this kind (any but none), one for each episode. `tokenizer`:
    the policy's, whose template may say how it writes calls. Raises UserError naming the option
    that can't be used.
    """
    try:
        environment.check_complete()
    except ValueError as error:
        raise UserError(str(error)) from error
    _check_read(environment)
    return SOURCES[environment.kind](environment, tokenizer)


def check(environment: EnvironmentConfig) -> None:
    """All that can be known before weights load; games of other people's libraries begin a trial.
    Raises UserError.
    """
    if environment.kind is not EnvironmentKind.none:
        make_factory(environment)


def tools_of(environment: EnvironmentConfig) -> Tools | None:
    """JSON schemas of the functions that the policy may call, for its template; None where there
    are none. Raises UserError.
    """
    if environment.kind is EnvironmentKind.python:
        return python.tools_of(environment)
    if environment.kind is EnvironmentKind.tools:
        return tools.tools_of(environment)
    return None
