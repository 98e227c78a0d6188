"""A sequential test by betting: the maths of A/B comparisons (rlhf.labels.ab). Pure functions.

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
random walk between the boundaries, instead of simulated (`stopping`).
"""

import math

import numpy as np

Bets = tuple[np.ndarray, np.ndarray]  # fractions c in (0, 1), and their weights, which add up to 1
_FRACTIONS = np.geomspace(0.02, 0.95, 24)
_MOST_LOG = 700.0  # of a capital: near the largest number
_EDGE = 1e-9  # how near to 0 and 1 an interval's ends are looked for


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
    """[count + 1]: the lead (wins minus losses) at which the test stops after k decided pairs; more
    than k where no lead is enough.

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

    low, high = 0.0, 1.0
    if excess(_EDGE) > 0:
        low = float(brentq(excess, _EDGE, middle, xtol=_EDGE / 10))
    if excess(1 - _EDGE) > 0:
        high = float(brentq(excess, middle, 1 - _EDGE, xtol=_EDGE / 10))
    return low, high


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
    mean = float(np.mean(given))
    mixed = float(np.mean(given * (1 - given)))
    ratio = float(norm.ppf(1 - alpha / 2) ** 2 / len(given))
    centre = mean + ratio / 2
    half = math.sqrt(max(0.0, centre**2 - (1 + ratio) * (mean**2 + ratio * mixed)))
    return max(0.0, (centre - half) / (1 + ratio)), min(1.0, (centre + half) / (1 + ratio))
