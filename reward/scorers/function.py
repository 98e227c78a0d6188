"""Scores by a Python function of the user's, with TRL's reward signature."""

import asyncio
import importlib
import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch

from reward.base import Stateless, name_prompt
from rlhf.models.encoding import is_chat
from rlhf.types import NonFiniteScore, Rollout, Scores, UserError


def load_function(spec: str, key: str = "reward.function") -> Callable[..., Any]:
    """The function that ``pkg.module:function`` names, `key` being the option that holds it. Raises
    UserError.
    """
    module_name, colon, name = spec.partition(":")
    if not colon or not module_name or not name:
        raise UserError(f"{key}={spec}: expected pkg.module:function.")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{key}={spec}: importing {module_name} failed: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [
            n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_")
        ]
        raise UserError(
            f"{key}={spec}: {module_name} has no function {name}. Its functions: "
            f"{', '.join(sorted(known)) or 'none'}."
        )
    return function


class FunctionScorer(Stateless):
    """A Python function, plain or async, with TRL's reward signature: ``f(prompts, completions,
    completion_ids, **columns) -> list[float]``.

    Prompts are the rows' own (strings or messages); completions strings, or ``[{"role":
    "assistant", ...}]`` for messages; columns are the rows' other fields, None where a row lacks
    one. A function without ``**kwargs`` gets what it names.
    """

    def __init__(self, spec: str, key: str = "reward.function") -> None:
        self.place = f"{key}={spec}"
        self.function = load_function(spec, key)
        self.term = spec.partition(":")[2]

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """One term, named as the function. Raises UserError naming the prompt when the function
        raises or returns no finite number.
        """
        if not rollouts:
            return Scores(total=[], terms={self.term: []})
        try:
            values = self._call(rollouts)
        except UserError:
            raise
        except Exception as error:
            raise self._blame(rollouts, error) from error
        if not hasattr(values, "__len__") or len(values) != len(rollouts):
            found = (
                f"{len(values)} values"
                if hasattr(values, "__len__")
                else f"{type(values).__name__} {values!r}"
            )
            raise UserError(
                f"{self.place}: expected a list of {len(rollouts)} numbers, one per completion, "
                f"found {found}; "
                f"the first completion is to {name_prompt(rollouts[0])}."
            )
        total = [
            self._number(value, rollout) for value, rollout in zip(values, rollouts, strict=True)
        ]
        return Scores(total=total, terms={self.term: list(total)})

    def _call(self, rollouts: Sequence[Rollout]) -> Any:
        prompts = [r.prompt.text if r.prompt.source is None else r.prompt.source for r in rollouts]
        completions = [
            [{"role": "assistant", "content": r.text}] if is_chat(p) else r.text
            for p, r in zip(prompts, rollouts, strict=True)
        ]
        given: dict[str, Any] = {
            "prompts": prompts,
            "completions": completions,
            "completion_ids": [list(r.token_ids) for r in rollouts],
        }
        for column in dict.fromkeys(key for r in rollouts for key in r.prompt.fields):
            given.setdefault(column, [r.prompt.fields.get(column) for r in rollouts])
        parameters = inspect.signature(self.function).parameters.values()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            missing = [
                p.name
                for p in parameters
                if p.default is p.empty and p.kind is not p.VAR_POSITIONAL and p.name not in given
            ]
            if missing:
                raise UserError(
                    f"{self.place}: takes {', '.join(missing)}, which no row has. The rows give "
                    f"{', '.join(given)}."
                )
            given = {p.name: given[p.name] for p in parameters if p.name in given}
        result = self.function(**given)
        return asyncio.run(_await(result)) if inspect.isawaitable(result) else result

    def _blame(self, rollouts: Sequence[Rollout], error: Exception) -> UserError:
        """The error with the first prompt that fails by itself, or with the whole batch where none
        does.
        """
        culprit, found = (
            f"a batch of {len(rollouts)} responses, none of which fails by itself; the first is "
            f"to {name_prompt(rollouts[0])}",
            error,
        )
        for rollout in rollouts:
            try:
                self._call([rollout])
            except Exception as alone:  # noqa: BLE001 - it is reported, whatever it is
                culprit, found = name_prompt(rollout), alone
                break
        return UserError(f"{self.place} raised {type(found).__name__}: {found}; for {culprit}.")

    def _number(self, value: Any, rollout: Rollout) -> float:
        plain = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        if isinstance(plain, numbers.Real) and math.isfinite(plain):
            return float(plain)
        raise NonFiniteScore(
            f"{self.place}: returned {value!r} for {name_prompt(rollout)}; expected a finite "
            "number."
        )


async def _await(result: Any) -> Any:
    return await result
