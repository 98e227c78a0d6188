"""Scores that are computed here, without a model: by length, by a Python function of the user's
with TRL's reward signature, and as the weighted sum of several terms:

    total = sum over terms of weight x normalised(clipped(raw))

A term is any Scorer; its `total` is the term's raw value. Scores.terms holds the raw values, so
that reward/<term> is comparable from step to step, whatever the running statistics are.
"""

import asyncio
import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from conf.choices import LengthUnit
from conf.schema import RewardTerm
from reward.base import Stateless, name_prompt
from rlhf.models.encoding import is_chat
from rlhf.process import distributed
from rlhf.process.distributed import RunningMoments
from rlhf.process.libraries import load_named
from rlhf.types import NonFiniteScore, Rollout, Scorer, Scores, UserError

_LEAST_STD = 1e-6  # below it all values are equal, and their normalised value is 0

# ---- length ----


class LengthScorer(Stateless):
    """`band_score` of each response: in tokens, the end-of-sequence token included, or in
    characters of its text.
    """

    def __init__(self, term: RewardTerm) -> None:
        self.low, self.high, self.ramp = term.low, term.high, term.ramp
        self.unit = term.unit

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        if self.unit is LengthUnit.tokens:
            lengths = [rollout.length for rollout in rollouts]
        else:
            lengths = [len(rollout.text) for rollout in rollouts]
        total = [band_score(length, self.low, self.high, self.ramp) for length in lengths]
        return Scores(total=total, terms={"length": list(total)})


def band_score(length: int, low: int | None, high: int | None, ramp: int) -> float:
    """0 for a length in [low, high]; outside it falls linearly, to -1 at a distance of `ramp` and
    beyond. None: no bound on that side.

    With high = L_max - L_cache and ramp = L_cache it is DAPO's soft overlong punishment (Yu et al.
    2025, arXiv:2503.14476, equation 13).
    """
    distance = 0
    if low is not None and length < low:
        distance = low - length
    if high is not None and length > high:
        distance += length - high
    return -min(1.0, distance / ramp)


# ---- functions ----


class FunctionScorer(Stateless):
    """Scores by a Python function, plain or async, with TRL's reward signature: ``f(prompts,
    completions, completion_ids, **columns) -> list[float]``.

    Prompts are those of the rows (strings or messages). Completions are strings, or ``[{"role":
    "assistant", ...}]`` where the prompt is messages. An episode's alternate with the answers of
    its environment, which `completion_ids` hold too; its turns come as `turns`. What prompts show
    comes as `images`: of each its pictures (path, sha256, width, height). Columns are the rows'
    other fields, None where a row lacks a field that others have. A function without
    ``**kwargs`` gets the arguments that it names.
    """

    def __init__(self, spec: str, key: str = "reward.function") -> None:
        self.source = f"{key}={spec}"
        self.function = load_function(spec, key)
        self.term = spec.partition(":")[2]

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """One term, named like the function. Raises UserError naming the prompt where the function
        raises or returns something else than finite numbers.
        """
        if not rollouts:
            return Scores(total=[], terms={self.term: []})
        try:
            values = self._call(rollouts)
        except UserError:
            raise
        except Exception as error:
            raise self._error(rollouts, error) from error
        sized = hasattr(values, "__len__")
        if not sized or len(values) != len(rollouts):
            returned = f"{type(values).__name__} {values!r}"
            if sized:
                returned = f"{len(values)} values"
            raise UserError(
                f"{self.source}: expected a list of {len(rollouts)} numbers, one per completion, "
                f"found {returned}; "
                f"the first completion is to {name_prompt(rollouts[0])}."
            )
        total = [
            self._number(value, rollout) for value, rollout in zip(values, rollouts, strict=True)
        ]
        return Scores(total=total, terms={self.term: list(total)})

    def _arguments(self, rollouts: Sequence[Rollout]) -> dict[str, Any]:
        """The arguments that the rows give."""
        prompts = [r.prompt.text if r.prompt.source is None else r.prompt.source for r in rollouts]
        given: dict[str, Any] = {
            "prompts": prompts,
            "completions": list(map(_completion, prompts, rollouts)),
            "completion_ids": [list(r.token_ids) for r in rollouts],
        }
        if any(r.turns for r in rollouts):
            given["turns"] = [r.turns for r in rollouts]
        if any(r.prompt.images for r in rollouts):
            given["images"] = [list(r.prompt.images) for r in rollouts]
        for column in dict.fromkeys(key for r in rollouts for key in r.prompt.fields):
            given.setdefault(column, [r.prompt.fields.get(column) for r in rollouts])
        return given

    def _call(self, rollouts: Sequence[Rollout]) -> Any:
        given = self._arguments(rollouts)
        parameters = inspect.signature(self.function).parameters.values()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            missing = [
                p.name
                for p in parameters
                if p.default is p.empty and p.kind is not p.VAR_POSITIONAL and p.name not in given
            ]
            if missing:
                raise UserError(
                    f"{self.source}: takes {', '.join(missing)}, which no row has. The rows give "
                    f"{', '.join(given)}."
                )
            given = {p.name: given[p.name] for p in parameters if p.name in given}
        result = self.function(**given)
        if inspect.isawaitable(result):
            return asyncio.run(_await(result))
        return result

    def _error(self, rollouts: Sequence[Rollout], error: Exception) -> UserError:
        """The error of the first response that fails by itself; the batch's where none does."""
        for rollout in rollouts:
            try:
                self._call([rollout])
            except Exception as alone:  # noqa: BLE001 - it is reported, whatever it is
                return self._raised(alone, name_prompt(rollout))
        batch = f"a batch of {len(rollouts)} responses, none of which fails by itself"
        return self._raised(error, f"{batch}; the first is to {name_prompt(rollouts[0])}")

    def _raised(self, error: Exception, culprit: str) -> UserError:
        return UserError(f"{self.source} raised {type(error).__name__}: {error}; for {culprit}.")

    def _number(self, value: Any, rollout: Rollout) -> float:
        plain = value
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            plain = value.item()
        if isinstance(plain, numbers.Real) and math.isfinite(plain):
            return float(plain)
        raise NonFiniteScore(
            f"{self.source}: returned {value!r} for {name_prompt(rollout)}; expected a finite "
            "number."
        )


def load_function(spec: str, key: str = "reward.function") -> Callable[..., Any]:
    """The function that `spec`, "pkg.module:function", names; the option `key` holds it. Raises
    UserError.
    """
    return load_named(spec, key, "function")


def _completion(prompt: Any, rollout: Rollout) -> Any:
    """A response in the form of its prompt: a string, or messages."""
    if not is_chat(prompt):
        return rollout.text
    if not rollout.turns:
        return [{"role": "assistant", "content": rollout.text}]
    messages = []
    for turn in rollout.turns:
        messages.append({"role": "assistant", "content": turn.text})
        if turn.observation:
            messages.append({"role": "environment", "content": turn.observation})
    return messages


async def _await(result: Any) -> Any:
    return await result


# ---- several terms ----


@dataclass(slots=True)
class Term:
    """A summand of the reward."""

    name: str
    scorer: Scorer
    weight: float = 1.0
    clip: float | None = None  # raw values into [-clip, clip]
    # with mean and standard deviation of all clipped values so far, this batch included
    normalise: bool = False
    moments: RunningMoments = field(default_factory=RunningMoments)


class CompositeScorer:
    """The weighted sum of terms.

    Where a term is normalised, `score` is a collective operation: every rank calls it, also a rank
    without responses.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        names = [term.name for term in terms]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"expected at least one term, each name once; found {names}")
        self.terms = list(terms)

    def begin(self, rollout: Rollout) -> None:
        """As `Scorer.begin`, of every term."""
        for term in self.terms:
            term.scorer.begin(rollout)

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """Raw values by term, the total, and extras: `<term>_clipped` (1 where a value was clipped)
        and the extras of the terms' scorers as `<term>_<name>`.

        Raises UserError naming term and prompt for a value that is not a finite number.
        """
        total = [0.0] * len(rollouts)
        values: dict[str, list[float]] = {}
        extras: dict[str, list[float]] = {}
        for term in self.terms:
            scored = term.scorer.score(rollouts)
            raw = checked(term.name, scored.total, rollouts)
            values[term.name] = raw
            extras |= {f"{term.name}_{key}": list(extra) for key, extra in scored.extras.items()}
            if term.clip is not None:
                extras[f"{term.name}_clipped"] = [float(abs(value) > term.clip) for value in raw]
            for row, value in enumerate(_scaled(term, raw)):
                total[row] += term.weight * value
        return Scores(total=total, terms=values, extras=extras)

    def state_dict(self) -> dict[str, object]:
        """Running statistics by term, as JSON can hold them; the same on every rank."""
        return {term.name: term.moments.state_dict() for term in self.terms if term.normalise}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue with the statistics of `state_dict`. Raises UserError when other terms are
        normalised than then.
        """
        expected = {term.name for term in self.terms if term.normalise}
        if set(state) != expected:
            raise UserError(
                "The checkpoint holds statistics of the reward terms "
                f"{', '.join(sorted(state)) or 'none'}, but reward.terms normalises "
                f"{', '.join(sorted(expected)) or 'none'}. Resume with the terms that the run "
                "started with."
            )
        for term in self.terms:
            moments = state.get(term.name)
            if isinstance(moments, dict):
                term.moments.load_state_dict(moments)


def _scaled(term: Term, raw: Sequence[float]) -> list[float]:
    """Raw values clipped and normalised: what the term adds before its weight."""
    values = list(raw)
    if term.clip is not None:
        values = [min(max(value, -term.clip), term.clip) for value in raw]
    if not term.normalise or distributed.all_sum([len(values)]) == [0.0]:
        return values
    term.moments.update(values, distributed.all_sum)
    mean, std = term.moments.mean, max(term.moments.std, _LEAST_STD)
    return [(value - mean) / std for value in values]


def checked(name: str, values: Sequence[Any], rollouts: Sequence[Rollout]) -> list[float]:
    """The values of a term as floats. Raises UserError naming term and prompt unless there is one
    finite number for each response.
    """
    if len(values) != len(rollouts):
        first = ""
        if rollouts:
            first = f"; the first response is to {name_prompt(rollouts[0])}"
        raise UserError(
            f"reward.terms.{name}: expected {len(rollouts)} scores, one per response, found "
            f"{len(values)}{first}."
        )
    for value, rollout in zip(values, rollouts, strict=True):
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise NonFiniteScore(
                f"reward.terms.{name}: returned {value!r} for {name_prompt(rollout)}; expected a "
                "finite number."
            )
    return [float(value) for value in values]
