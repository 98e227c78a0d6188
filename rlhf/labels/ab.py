"""Which of two policies is better, from labels: how many prompts to label, and when to stop. The
test and its source are in rlhf.labels.betting.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.labels.betting import (
    bets,
    boundaries,
    capital,
    confidence_interval,
    stopping,
    wilson_interval,
)
from rlhf.types import UserError

MOST_PAIRS = 200_000  # of a plan: what nobody will label, and what is still computed in seconds


@dataclass(frozen=True, slots=True)
class ABPlan:
    """What was decided before the first label."""

    # the win rate among decided pairs that is to be found is 1/2 + effect, or 1/2 - effect
    effect: float
    alpha: float  # error rate, both directions together
    power: float  # probability of finding `effect` that was asked for
    ties: float  # expected share of ties
    fixed: int  # prompts that a test with one look at the end would need: a lower bound
    pairs: int  # prompts to label at most
    median: int  # prompts after which half of the tests have stopped, if the effect is as planned
    reached: float  # probability of finding `effect` within `pairs`, exactly
    error: float  # probability of finding a difference within `pairs` where there is none, exactly

    @property
    def rule(self) -> str:
        return rule(self.alpha, self.pairs)

    def figures(self) -> dict[str, Any]:
        """As JSON has it; `plan_of` reads it."""
        return {**dataclasses.asdict(self), "rule": self.rule}


@dataclass(frozen=True, slots=True)
class ABResult:
    """What the labels say so far."""

    # "a is better", "b is better", "no difference shown", "not decided: n of N pairs"
    decision: str
    rule: str
    prompts: int  # with labels
    planned: int | None  # prompts at which the test ends without a decision
    stopped: int | None  # prompts at which it decided
    a_wins: int  # prompts whose outcome is below 1/2
    ties: int  # whose outcome is 1/2, `identical` ones included
    b_wins: int
    identical: int  # prompts to which both policies gave the same answer: ties without a label
    # of b over a, ties and mixed outcomes as they are; None without a prompt
    win_rate: float | None
    alpha: float
    e_value: float  # against a win rate of 1/2: where it stopped, or now
    interval: tuple[float, float]  # of the win rate, at level 1 - alpha, however often one looks
    fixed_interval: tuple[float, float]  # likewise, right only if this is the one and only look

    def figures(self) -> dict[str, Any]:
        """As JSON has it."""
        note = (
            "Wilson's score interval: valid without peeking only, that is if the number of "
            "prompts was fixed beforehand"
        )
        return {
            **dataclasses.asdict(self),
            "interval": list(self.interval),
            "fixed_interval": list(self.fixed_interval),
            "fixed_interval_note": note,
        }


def rule(alpha: float, pairs: int | None) -> str:
    """The stopping rule in words."""
    end = ""
    if pairs is not None:
        end = f", or after {pairs} prompts without a difference shown"
    return (
        "Two-sided sequential test by betting (arXiv:2010.09686): after each prompt, stop for "
        "the policy that wins more as soon as the e-value "
        f"against a win rate of 1/2 is at least 1/alpha = {1 / alpha:g}{end}. It names a policy "
        "where there is no difference with probability "
        f"at most {alpha:g}, however often one looks."
    )


def _after(pairs: int, by_decided: np.ndarray, ties: float) -> float:
    """The mean of `by_decided`, [K >= pairs + 1] probabilities by the number of decided pairs, over
    how many of `pairs` are decided, which is binomial.
    """
    from scipy.stats import binom

    return float(binom.pmf(np.arange(pairs + 1), pairs, 1 - ties) @ by_decided[: pairs + 1])


def _least(low: int, high: int, enough: Any) -> int:
    """The least number in [low, high] for which `enough` is true. It must be true of `high`, and of
    every number above one of which it is true.
    """
    while low < high:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle + 1
    return low


def fixed_pairs(effect: float, alpha: float, power: float, ties: float) -> int:
    """Prompts that a two-sided z-test with one look needs (the score test of a proportion, ties as
    1/2).

    n = ((z_{1 - alpha/2} sd_0 + z_power sd_1) / d)^2,  d = (1 - ties) effect,  sd_0^2 = (1 - ties)
    / 4,  sd_1^2 = sd_0^2 - d^2
    """
    from scipy.stats import norm

    distance = (1 - ties) * effect
    spread = math.sqrt((1 - ties) / 4)
    wanted = norm.ppf(1 - alpha / 2) * spread + norm.ppf(power) * math.sqrt(spread**2 - distance**2)
    return math.ceil((wanted / distance) ** 2)


def plan(effect: float, alpha: float, power: float, ties: float) -> ABPlan:
    """How many prompts to label so that `sequential_test` finds the effect with the stated power,
    however often it looks.

    effect: smallest distance of the win rate among decided pairs from 1/2 that is to be found; a
    tie counts 1/2, so with a share of ties t the mean of the outcomes is 1/2 + (1 - t) effect.
    Exact for one label a prompt; with several the outcomes vary less, so it is enough. A given
    effect may lie on either side: the test is symmetric. Raises ValueError for figures out of range
    and UserError where the effect is too small.
    """
    for name, value, fits in (
        ("effect", effect, 0 < effect < 0.5),
        ("alpha", alpha, 0 < alpha < 0.5),
    ):
        if not fits:
            raise ValueError(f"{name} is {value!r}, expected a number in (0, 0.5)")
    if not 0.5 <= power < 1:
        raise ValueError(f"power is {power!r}, expected a number in [0.5, 1)")
    if not 0 <= ties < 1:
        raise ValueError(f"ties is {ties!r}, expected a share in [0, 1)")
    fixed = fixed_pairs(effect, alpha, power, ties)
    chosen, most = bets(effect), 2 * fixed
    while True:
        if most > MOST_PAIRS:
            raise UserError(
                f"label.ab.effect={effect:g} needs more than {MOST_PAIRS:,} labelled prompts (a "
                f"test with one look: {fixed:,}). "
                "Expected an effect that labels can show: raise label.ab.effect, or lower "
                "label.ab.power."
            )
        limits = boundaries(most, alpha, chosen)
        decided, _ = stopping(limits, 0.5 + effect)
        if _after(most, decided, ties) >= power:
            break
        most *= 2
    pairs = _least(1, most, lambda n: _after(n, decided, ties) >= power)
    return ABPlan(
        effect=effect,
        alpha=alpha,
        power=power,
        ties=ties,
        fixed=fixed,
        pairs=pairs,
        median=_least(1, pairs, lambda n: _after(n, decided, ties) >= 0.5),
        reached=_after(pairs, decided, ties),
        error=_after(pairs, np.sum(stopping(limits, 0.5), axis=0), ties),
    )


def plan_of(figures: Mapping[str, Any]) -> ABPlan:
    """What `ABPlan.figures` wrote. Raises UserError for anything else."""
    names = [f.name for f in dataclasses.fields(ABPlan)]
    missing = []
    for name in names:
        value = figures.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            missing.append(name)
    if missing:
        raise UserError(
            f"the plan of the A/B test has no number for {', '.join(missing)}: expected what "
            "stage=label label.ab.enabled=true wrote."
        )
    return ABPlan(**{name: figures[name] for name in names})


def outcomes(
    pairs: Iterable[tuple[str, str | None]], a: str, b: str, *, wanted: int | None = None
) -> list[float]:
    """One outcome for each prompt, from labels in the order in which they arrived: (prompt's id,
    the policy that won or None for a tie).

    Labels of one prompt are averaged, whichever of its answers they compare. `wanted`: labels that
    each prompt is to get. With it a prompt counts once it has that many, with the first so many of
    them, in the order in which prompts become complete: a label that comes later changes nothing
    that was counted before, which is what allows looking at any time. Without it every prompt
    counts as it stands, in the order of its first label. Skipped tasks and those of gold items are
    none: leave them out. Raises ValueError for another policy's name.
    """
    if a == b:
        raise ValueError(f"both policies are {a!r}")
    worth: dict[str | None, float] = {a: 0.0, b: 1.0, None: 0.5}
    by_prompt: dict[str, list[float]] = {}
    complete: list[str] = []
    for prompt, winner in pairs:
        if winner not in worth:
            raise ValueError(
                f"prompt {prompt}: the winner is {winner!r}, expected {a!r}, {b!r} or None"
            )
        values = by_prompt.setdefault(prompt, [])
        if wanted is None or len(values) < wanted:
            values.append(worth[winner])
        if wanted is not None and len(values) == wanted and prompt not in complete:
            complete.append(prompt)
    counted = list(by_prompt) if wanted is None else complete
    return [math.fsum(by_prompt[prompt]) / len(by_prompt[prompt]) for prompt in counted]


def _checked(given: Sequence[float]) -> np.ndarray:
    values = np.asarray(given, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(
            f"outcomes have {values.ndim} dimensions, expected one: a number for each prompt"
        )
    wrong = np.flatnonzero(~((values >= 0) & (values <= 1)))
    if len(wrong):
        raise ValueError(
            f"outcome {wrong[0]} is {values[wrong[0]]}, expected a number in [0, 1]: 1 where b "
            "wins, 0 where a wins, 0.5 for a tie"
        )
    return values


def sequential_test(
    given: Sequence[float],
    planned: ABPlan | None = None,
    *,
    alpha: float | None = None,
    identical: int = 0,
) -> ABResult:
    """Decide from the outcomes so far, in the order of arrival (`outcomes` gives them), by the rule
    that `rule` states.

    planned: the plan, which gives alpha, the bets and the number of prompts at which the test ends;
    alpha: without a plan, a test without an end. identical: prompts to which both policies gave the
    same answer. They are ties that cost no label: they count in the win rate and the intervals, and
    neither among the prompts planned nor in the e-value, which no tie changes. A decision, once
    made, stays: later outcomes only sharpen the win rate. Raises ValueError for an outcome outside
    [0, 1], and unless exactly one of `planned` and `alpha` is given.
    """
    if (planned is None) == (alpha is None):
        raise ValueError("expected a plan or alpha, and not both")
    end, effect, level = None, None, float(alpha or 0.0)
    if planned is not None:
        end, effect, level = planned.pairs, planned.effect, planned.alpha
    if not 0 < level < 1:
        raise ValueError(f"alpha is {level!r}, expected a number in (0, 1)")
    if identical < 0:
        raise ValueError(f"identical is {identical}, expected a count")
    labelled = _checked(given)
    chosen = bets(effect)
    up, down = capital(labelled[:end], chosen)
    e_values = (up + down) / 2
    crossed = np.flatnonzero(e_values >= 1 / level)
    stopped = int(crossed[0]) + 1 if len(crossed) else None
    if stopped is not None:
        decision = "b is better" if up[stopped - 1] > down[stopped - 1] else "a is better"
    elif end is None:
        decision = f"not decided: {len(labelled)} pairs"
    elif len(labelled) >= end:
        decision = "no difference shown"
    else:
        decision = f"not decided: {len(labelled)} of {end} pairs"
    every = np.concatenate([labelled, np.full(identical, 0.5)])
    last = (stopped or len(e_values)) - 1
    return ABResult(
        decision=decision,
        rule=rule(level, end),
        prompts=len(labelled),
        planned=end,
        stopped=stopped,
        a_wins=int(np.sum(labelled < 0.5)),
        ties=int(np.sum(every == 0.5)),
        b_wins=int(np.sum(labelled > 0.5)),
        identical=identical,
        win_rate=float(np.mean(every)) if len(every) else None,
        alpha=level,
        e_value=float(e_values[last]) if len(e_values) else 1.0,
        interval=confidence_interval(every, level, chosen),
        fixed_interval=wilson_interval(every, level),
    )
