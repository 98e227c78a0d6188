"""Strengths of answers out of comparisons by people who are not equally careful (Bugakova,
Fedorova, Gusev, Drutsa 2019, "Aggregation of pairwise comparisons with reduction of biases",
arXiv:1906.03711, their factorBT without further factors).

    P(annotator k prefers the answer shown first) = r_k sigmoid(s_first - s_second) + (1 - r_k) b_k

s are the answers' strengths (log-odds), r_k is how often k looks at the answers at all, b_k how
often his choice falls on the one shown first when he does not. A tie counts as half a preference
for each.

crowd-kit's NoisyBradleyTerry has this likelihood, but its version 1.4.2 does not maximise it: its
gradient of b and r is written one place too far down, keeps each annotator's last comparison only
and so replaces an answer's gradient too, and its regularisation has the sign that drives strengths
apart. So the fit is here: scipy's L-BFGS-B on the log-posterior, with a start that draws nothing.
The priors are so many observations of each kind:

    s    one win and one loss against an answer of strength 0 (with a single vote by somebody
         reliable the probability is about 0.7)
    r    four comparisons looked at, one not
    b    one choice of each side
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
_STRENGTH = 1.0  # wins and losses against an answer of strength 0
_LOOKED, _NOT = 4.0, 1.0
_SIDE = 1.0  # choices of each side
_ITERATIONS = 2000


@dataclass(frozen=True, slots=True)
class Comparison:
    """One annotator's choice between two answers."""

    annotator: str
    first: str  # the answer shown first: on the left, or further up
    second: str
    first_better: float  # 1, 0, or 0.5 for a tie


@dataclass(frozen=True, slots=True)
class Fit:
    """The mode of the posterior."""

    # log-odds, of each answer; only differences between answers to one prompt mean something
    strength: dict[str, float]
    reliability: dict[str, float]  # r, of each annotator
    first_side: dict[str, float]  # b
    iterations: int
    converged: bool


def _sigmoid(x: Array) -> Array:
    from scipy.special import expit

    return np.asarray(expit(x))


def loss_and_gradient(
    x: Array, first: Array, second: Array, who: Array, better: Array, answers: int, people: int
) -> tuple[float, Array]:
    """Negative log-posterior and its gradient at x = [s (answers), logit r (people), logit b
    (people)].

    first, second, who: [N] indices of answers and people; better: [N] 1 where the first answer was
    preferred, 0 where the second was, 0.5 for a tie.
    """
    s, r_logit, b_logit = x[:answers], x[answers : answers + people], x[answers + people :]
    r, b = _sigmoid(r_logit)[who], _sigmoid(b_logit)[who]  # [N]
    p = _sigmoid(s[first] - s[second])
    # the probability of preferring the first shown
    chosen = np.clip(r * p + (1 - r) * b, 1e-12, 1 - 1e-12)
    value = np.sum(better * np.log(chosen) + (1 - better) * np.log1p(-chosen))
    outer = better / chosen - (1 - better) / (1 - chosen)  # d log-likelihood / d chosen
    by_s = outer * r * p * (1 - p)
    gradient = np.zeros_like(x)
    gradient[:answers] = np.bincount(first, by_s, answers) - np.bincount(second, by_s, answers)
    gradient[answers : answers + people] = np.bincount(who, outer * (p - b) * r * (1 - r), people)
    gradient[answers + people :] = np.bincount(who, outer * (1 - r) * b * (1 - b), people)
    ones = np.concatenate(
        [np.full(answers, _STRENGTH), np.full(people, _LOOKED), np.full(people, _SIDE)]
    )
    zeros = np.concatenate(
        [np.full(answers, _STRENGTH), np.full(people, _NOT), np.full(people, _SIDE)]
    )
    value += np.sum(-ones * np.logaddexp(0, -x) - zeros * np.logaddexp(0, x))
    gradient += ones * _sigmoid(-x) - zeros * _sigmoid(x)
    return -float(value), -gradient


def _numbered(names: Sequence[str]) -> dict[str, int]:
    """Each different name with a number, in their order."""
    return {name: number for number, name in enumerate(sorted(set(names)))}


def fit(comparisons: Sequence[Comparison]) -> Fit:
    """Strengths and reliabilities. Raises ValueError without comparisons."""
    from scipy.optimize import minimize

    if not comparisons:
        raise ValueError("no comparisons to aggregate")
    answers = _numbered([c.first for c in comparisons] + [c.second for c in comparisons])
    people = _numbered([c.annotator for c in comparisons])
    first = np.array([answers[c.first] for c in comparisons])
    second = np.array([answers[c.second] for c in comparisons])
    who = np.array([people[c.annotator] for c in comparisons])
    better = np.array([c.first_better for c in comparisons], dtype=np.float64)
    start = np.concatenate(
        [
            np.zeros(len(answers)),
            np.full(len(people), np.log(_LOOKED / _NOT)),
            np.zeros(len(people)),
        ]
    )
    optimum = minimize(
        loss_and_gradient,
        start,
        args=(first, second, who, better, len(answers), len(people)),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": _ITERATIONS, "maxfun": 4 * _ITERATIONS, "ftol": 1e-12, "gtol": 1e-6},
    )
    s, r_logit, b_logit = np.split(optimum.x, [len(answers), len(answers) + len(people)])
    r, b = _sigmoid(r_logit), _sigmoid(b_logit)
    return Fit(
        strength={name: float(s[i]) for name, i in answers.items()},
        reliability={name: float(r[i]) for name, i in people.items()},
        first_side={name: float(b[i]) for name, i in people.items()},
        iterations=int(optimum.nit),
        converged=bool(optimum.success),
    )
