"""How alike an answer and its references are: ROUGE, chrF and BLEU. Pure functions; BLEU's tokens
and counts are sacrebleu's.

BLEU and chrF are figures of all rows together: each row gives counts, whose sums are the figure.
"""

import functools
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.types import UserError

# Letters and digits, in lower case; each Chinese character by itself.
_WORD = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]|[^\W_\u3400-\u4dbf\u4e00-\u9fff]+")
_CHRF_ORDERS, _CHRF_BETA = 6, 2.0  # Popovic 2015: chrF2 of up to 6 characters
_BLEU_ORDERS = 4


def rouge_words(text: str) -> list[str]:
    """The words that ROUGE compares, without a stemmer."""
    return _WORD.findall(text.lower())


def rouge_n(
    answer: str,
    reference: str,
    n: int,
) -> float:
    """F1 of the n-grams that both have (Lin 2004), in [0, 1]."""
    ours = _grams(rouge_words(answer), n)
    theirs = _grams(rouge_words(reference), n)
    both = ours & theirs
    return _f1(both.total(), ours.total(), theirs.total())


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), in [0, 1]."""
    ours = rouge_words(answer)
    theirs = rouge_words(reference)
    return _f1(_common(ours, theirs), len(ours), len(theirs))


def _grams(items: Sequence[Any], n: int) -> Counter[tuple[Any, ...]]:
    out: Counter[tuple[Any, ...]] = Counter()
    for first in range(len(items) - n + 1):
        gram = tuple(items[first : first + n])
        out[gram] += 1
    return out


def _f1(
    common: int,
    ours: int,
    theirs: int,
) -> float:
    if common == 0:
        return 0.0
    return 2 * common / (ours + theirs)


def _common(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(theirs) + 1)
    for word in ours:
        before = 0
        for at, other in enumerate(theirs, start=1):
            above = row[at]
            if word == other:
                row[at] = before + 1
            else:
                row[at] = max(above, row[at - 1])
            before = above
    return row[-1]


# ---- chrF ----


def chrf_counts(answer: str, references: Sequence[str]) -> list[float]:
    """For each order from 1: the answer's character n-grams, the reference's, and those in both;
    of several references that which fits best. Blanks don't count.
    """
    best: list[float] = []
    highest = -1.0
    for reference in references:
        counts = _chrf_counts(answer, reference)
        score = float(chrf(np.array(counts)))
        if score > highest:
            best, highest = counts, score
    return best


def _chrf_counts(answer: str, reference: str) -> list[float]:
    ours = "".join(answer.split())
    theirs = "".join(reference.split())
    counts: list[float] = []
    for n in range(1, _CHRF_ORDERS + 1):
        mine = _grams(ours, n)
        other = _grams(theirs, n)
        both = mine & other
        own = mine.total()
        if not other:  # an order that the reference lacks has no hits
            own = 0
        counts += [own, other.total(), both.total()]
    return counts


def chrf(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """chrF in [0, 100] of sums of `chrf_counts`, [..., 18] -> [...]."""
    shaped = counts.reshape(*counts.shape[:-1], _CHRF_ORDERS, 3)
    ours, theirs, both = shaped[..., 0], shaped[..., 1], shaped[..., 2]
    has = (ours > 0) & (theirs > 0)
    orders = np.maximum(has.sum(axis=-1), 1)
    precisions = np.where(has, both / np.maximum(ours, 1), 0.0)
    recalls = np.where(has, both / np.maximum(theirs, 1), 0.0)
    precision = precisions.sum(axis=-1) / orders
    recall = recalls.sum(axis=-1) / orders
    weight = _CHRF_BETA**2
    below = weight * precision + recall
    above = (1 + weight) * precision * recall
    score = above / np.where(below > 0, below, 1.0)
    return np.asarray(100 * score)


# ---- BLEU ----


def check_bleu(key: str) -> None:
    """sacrebleu is there. Raises UserError."""
    try:
        import sacrebleu  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{key} holds bleu, which needs the package sacrebleu: pip install 'sacrebleu>=2.6,<3'"
        ) from error


@functools.cache
def _sentence_bleu() -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(effective_order=True)


def bleu_counts(answer: str, references: Sequence[str]) -> list[float]:
    """The n-grams of 1 to 4 tokens (13a) in common, those of the answer, and both lengths."""
    found = _sentence_bleu().sentence_score(answer, list(references))
    return [*found.counts, *found.totals, found.sys_len, found.ref_len]


def bleu(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """BLEU in [0, 100] of sums of `bleu_counts`, [..., 10] -> [...], smoothed as sacrebleu's."""
    from sacrebleu.metrics.bleu import BLEU

    *before, width = counts.shape
    rows = counts.reshape(-1, width).astype(int).tolist()
    out = []
    for sums in rows:
        common = sums[:_BLEU_ORDERS]
        own = sums[_BLEU_ORDERS : 2 * _BLEU_ORDERS]
        ours, theirs = sums[2 * _BLEU_ORDERS :]
        found = BLEU.compute_bleu(
            common,
            own,
            ours,
            theirs,
            smooth_method="exp",
        )
        out.append(found.score)
    return np.array(out).reshape(before)
