"""Which of two policies is better, from labels: how many prompts to label, and when to stop.

An outcome is one prompt's: 1 where policy B wins, 0 where A wins, 1/2 for a tie, and the mean of
these where a prompt has several labels. Prompts are the independent unit. The test is one of
betting (Waudby-Smith and Ramdas 2023, JRSS-B, arXiv:2010.09686, sections 4.4 and 4.6, hedged, with
fixed fractions as in their appendix B.4): somebody who believes that the mean of the outcomes is m
bets the fraction c of the capital on each outcome above it, or below it,

    K_up(m) = prod_i (1 - c + c x_i / m)        K_down(m) = prod_i (1 - c + c (1 - x_i) / (1 - m))

which nobody can expect to win if m is right: the mean of both, over several c (`bets`), is an
e-process, and by Ville's inequality it ever reaches 1 / alpha with probability at most alpha. So
one may look after every label and stop at will. The values m that are not refuted are an interval,
since each factor is log-convex in m: a confidence sequence, right at all times together with
probability 1 - alpha.

At m = 1/2 a tie multiplies the capital by 1, so with one label a prompt the e-value depends on the
counts of wins alone, and the distribution of the time at which it stops is computed exactly, by a
random walk between the boundaries, instead of simulated (`plan`).
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.types import UserError

Bets = tuple[np.ndarray, np.ndarray]  # fractions c in (0, 1), and their weights, which add up to 1
MOST_PAIRS = 200_000  # of a plan: what nobody will label, and what is still computed in seconds
_FRACTIONS = np.geomspace(0.02, 0.95, 24)
_MOST_LOG = 700.0  # of a capital: near the largest number
_EDGE = 1e-9  # how near to 0 and 1 an interval's ends are looked for


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
    end = "" if pairs is None else f", or after {pairs} prompts without a difference shown"
    return (
        "Two-sided sequential test by betting (arXiv:2010.09686): after each prompt, stop for "
        "the policy that wins more as soon as the e-value "
        f"against a win rate of 1/2 is at least 1/alpha = {1 / alpha:g}{end}. It names a policy "
        "where there is no difference with probability "
        f"at most {alpha:g}, however often one looks."
    )


def bets(effect: float | None) -> Bets:
    """The fractions to bet and their weights: three quarters on what pays best at `effect`, the
    rest evenly over the logarithm, for other effects.
    """
    weights = np.full(len(_FRACTIONS), 1 / len(_FRACTIONS))
    if effect is None:
        return _FRACTIONS, weights
    return np.append(_FRACTIONS, 2 * effect), np.append(weights / 4, 0.75)


def capital(outcomes: np.ndarray, chosen: Bets) -> tuple[np.ndarray, np.ndarray]:
    """K_up(1/2) and K_down(1/2), means over the bets, after each outcome; e^700 stands for all
    above. `outcomes` and both results: [..., N].
    """
    lead = 2 * outcomes - 1
    up, down = np.zeros(outcomes.shape), np.zeros(outcomes.shape)
    for fraction, weight in zip(*chosen, strict=True):
        up += weight * np.exp(np.minimum(np.cumsum(np.log1p(fraction * lead), axis=-1), _MOST_LOG))
        down += weight * np.exp(
            np.minimum(np.cumsum(np.log1p(-fraction * lead), axis=-1), _MOST_LOG)
        )
    return up, down


def _log_e(counts: tuple[float, float], logs: tuple[np.ndarray, np.ndarray, np.ndarray]) -> float:
    """Logarithm of the e-value against 1/2 after so many wins of each side, in any order. `logs`:
    of the weights, of 1 + c and of 1 - c, each [G].
    """
    weights, plus, minus = logs
    both = np.concatenate(
        [
            weights + counts[0] * plus + counts[1] * minus,
            weights + counts[1] * plus + counts[0] * minus,
        ]
    )
    most = both.max()
    return float(most + math.log(np.exp(both - most).sum() / 2))


def boundaries(count: int, alpha: float, chosen: Bets) -> np.ndarray:
    """[count + 1]: the lead (wins less losses) at which the test stops after k decided pairs; above
    k where no lead is enough.

    From k - 1 to k it falls by 1 at most: the e-value is a martingale of a fair coin and grows with
    the lead, so a lead two below the boundary, where one more win does not reach 1 / alpha on
    average, leaves what is three below out of reach.
    """
    logs = (np.log(chosen[1]), np.log1p(chosen[0]), np.log1p(-chosen[0]))
    out = np.empty(count + 1, dtype=np.int64)
    lead = 2
    for k in range(count + 1):
        lead = max(lead - 1, k % 2)
        while lead <= k and _log_e(((k + lead) / 2, (k - lead) / 2), logs) < -math.log(alpha):
            lead += 2
        out[k] = lead
    return out


def stopping(limits: np.ndarray, win_rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that the test has stopped for b, and for a, after at most k decided pairs, each
    won by b with `win_rate`; [K] each.

    `limits` [K]: as `boundaries` gives them.
    """
    width = int(limits.max()) + 1
    # probability of each lead from -width to width, of tests that go on
    walk = np.zeros(2 * width + 1)
    walk[width] = 1.0
    stopped = np.zeros((2, len(limits)))
    for k in range(1, len(limits)):
        moved = np.zeros_like(walk)
        moved[1:] += win_rate * walk[:-1]
        moved[:-1] += (1 - win_rate) * walk[1:]
        high, low = width + int(limits[k]), width - int(limits[k])
        stopped[0, k], stopped[1, k] = moved[high:].sum(), moved[: low + 1].sum()
        moved[high:], moved[: low + 1] = 0.0, 0.0
        walk = moved
    total = stopped.cumsum(axis=1)
    return total[0], total[1]


def _after(pairs: int, by_decided: np.ndarray, ties: float) -> float:
    """A probability by the number of decided pairs, [K >= pairs + 1], over how many of `pairs` are
    decided: binomial.
    """
    from scipy.stats import binom

    return float(binom.pmf(np.arange(pairs + 1), pairs, 1 - ties) @ by_decided[: pairs + 1])


def _least(low: int, high: int, enough: Any) -> int:
    """The least number in [low, high] for which `enough`, which stays true once it is and is true
    of `high`.
    """
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
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
        found, _ = stopping(limits, 0.5 + effect)
        if _after(most, found, ties) >= power:
            break
        most *= 2
    pairs = _least(1, most, lambda n: _after(n, found, ties) >= power)
    return ABPlan(
        effect=effect,
        alpha=alpha,
        power=power,
        ties=ties,
        fixed=fixed,
        pairs=pairs,
        median=_least(1, pairs, lambda n: _after(n, found, ties) >= 0.5),
        reached=_after(pairs, found, ties),
        error=_after(pairs, np.sum(stopping(limits, 0.5), axis=0), ties),
    )


def plan_of(figures: Mapping[str, Any]) -> ABPlan:
    """What `ABPlan.figures` wrote. Raises UserError for anything else."""
    names = [f.name for f in dataclasses.fields(ABPlan)]
    lacking = [
        name
        for name in names
        if not isinstance(figures.get(name), (int, float)) or isinstance(figures.get(name), bool)
    ]
    if lacking:
        raise UserError(
            f"the plan of the A/B test has no number for {', '.join(lacking)}: expected what "
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
    return [
        math.fsum(by_prompt[prompt]) / len(by_prompt[prompt])
        for prompt in (by_prompt if wanted is None else complete)
    ]


def _log_refuted(m: float, values: np.ndarray, counts: np.ndarray, chosen: Bets) -> float:
    """Logarithm of the e-value against a mean of m after `counts` of each value, in any order."""
    up = np.log1p(chosen[0][:, None] * (values / m - 1)) @ counts
    down = np.log1p(chosen[0][:, None] * ((1 - values) / (1 - m) - 1)) @ counts
    return float(
        np.logaddexp.reduce(np.concatenate([up, down]) + np.tile(np.log(chosen[1]), 2))
        - math.log(2)
    )


def confidence_interval(given: np.ndarray, alpha: float, chosen: Bets) -> tuple[float, float]:
    """The means that `given` [N] do not refute at 1 / alpha: one time of the confidence sequence.
    The mean itself is one.
    """
    from scipy.optimize import brentq

    if not len(given):
        return 0.0, 1.0
    values, counts = np.unique(given, return_counts=True)
    middle = float(np.clip(np.mean(given), 2 * _EDGE, 1 - 2 * _EDGE))

    def excess(m: float) -> float:
        return _log_refuted(m, values, counts, chosen) + math.log(alpha)

    low = brentq(excess, _EDGE, middle, xtol=_EDGE / 10) if excess(_EDGE) > 0 else 0.0
    high = brentq(excess, middle, 1 - _EDGE, xtol=_EDGE / 10) if excess(1 - _EDGE) > 0 else 1.0
    return float(low), float(high)


def wilson_interval(given: np.ndarray, alpha: float) -> tuple[float, float]:
    """Score interval of the mean of `given` [N] in [0, 1] at level 1 - alpha for one look:
    Wilson's, with the variance that ties take away.

    Of outcomes in [0, 1] with mean m the variance is m (1 - m) - E[x (1 - x)], whose last term is
    1/4 of the share of ties and 0 without; it is taken from the sample, and the m with (mean - m)^2
    <= z^2 variance(m) / N are those between the roots of a quadratic.
    """
    from scipy.stats import norm

    if not len(given):
        return 0.0, 1.0
    mean, mixed, ratio = (
        float(np.mean(given)),
        float(np.mean(given * (1 - given))),
        float(norm.ppf(1 - alpha / 2) ** 2 / len(given)),
    )
    centre = mean + ratio / 2
    half = math.sqrt(max(0.0, centre**2 - (1 + ratio) * (mean**2 + ratio * mixed)))
    return max(0.0, (centre - half) / (1 + ratio)), min(1.0, (centre + half) / (1 + ratio))


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
    level = planned.alpha if planned is not None else float(alpha or 0.0)
    if not 0 < level < 1:
        raise ValueError(f"alpha is {level!r}, expected a number in (0, 1)")
    if identical < 0:
        raise ValueError(f"identical is {identical}, expected a count")
    labelled, end = _checked(given), planned.pairs if planned is not None else None
    chosen = bets(planned.effect if planned is not None else None)
    up, down = capital(labelled[:end], chosen)
    e_values = (up + down) / 2
    crossed = np.flatnonzero(e_values >= 1 / level)
    stopped = int(crossed[0]) + 1 if len(crossed) else None
    if stopped is not None:
        decision = "b is better" if up[stopped - 1] > down[stopped - 1] else "a is better"
    elif end is not None and len(labelled) >= end:
        decision = "no difference shown"
    else:
        decision = f"not decided: {len(labelled)}{'' if end is None else f' of {end}'} pairs"
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
