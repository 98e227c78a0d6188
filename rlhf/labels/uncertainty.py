"""How unsure a reward model, or an ensemble of them, is of the order of answers. Pure functions.

From one reward model all that is known is the margin |score_a - score_b|: the smaller, the more
uncertain. From an ensemble also how far its members are apart, and these are two kinds of doubt: a
margin near zero may mean that the answers are equally good, which a label can't settle (the
annotator would toss a coin), or that the members contradict each other, which a label does settle.
So with an ensemble pairs are ranked by what their label is expected to tell about the reward, the
mutual information of label and model (BALD: Houlsby et al. 2011, arXiv:1112.5745, made for
preferences too; with diversity beside it for reward models: Melo et al. 2024, arXiv:2406.10023).
Choosing by the members' disagreement alone is older (Christiano et al. 2017, arXiv:1706.03741), and
no better than random where the members hardly differ, as when all start from the same weights
(Gleave and Irving 2022, arXiv:2203.07472).
"""

import math
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def information(margin: Floats, spread: Floats) -> Floats:
    """What the label of a pair is expected to tell about the reward, in nats: the mutual
    information of label and margin; at most log 2, and 0 without spread.

    The ensemble's margin is taken to be normal with mean `margin` and standard deviation `spread`,
    both [...] in units of the score, and the label a Bernoulli draw with logistic(margin), as in
    the reward model's loss. Closed form of Houlsby et al. 2011 (arXiv:1112.5745), equation 3, with
    logistic(x) taken as the normal distribution function of sqrt(pi / 8) x.
    """
    from scipy.special import entr, ndtr

    mean, deviation = margin * math.sqrt(math.pi / 8), spread * math.sqrt(math.pi / 8)
    better = ndtr(mean / np.sqrt(deviation**2 + 1))
    # C^2: entropy(ndtr(x)) is about log 2 x exp(-x^2 / (2 C^2)) with C^2 = pi log 2 / 2
    width = math.pi * math.log(2) / 2
    noise = (
        math.log(2)
        * np.sqrt(width / (deviation**2 + width))
        * np.exp(-(mean**2) / (2 * (deviation**2 + width)))
    )
    return np.maximum(entr(better) + entr(1 - better) - noise, 0.0)


def uncertainty(scores: Floats, spreads: Floats) -> Floats:
    """[T] how unsure the order of each task's answers is, from their `scores` and `spreads` [T, G];
    NaN where a score is. That of a group is the mean over its pairs.

    Where every scored answer has a spread it is `information`, with a margin's variance as the sum
    of its answers'; else it is minus the margin's size.
    """
    known = ~np.isnan(scores)
    ensemble = bool(known.any()) and not np.isnan(spreads[known]).any()
    pairs = list(combinations(range(scores.shape[1]), 2))
    total = np.zeros(len(scores))
    for a, b in pairs:
        margin = np.abs(scores[:, a] - scores[:, b])
        if ensemble:
            total += information(margin, np.hypot(spreads[:, a], spreads[:, b]))
        else:
            total -= margin
    return total / len(pairs)
