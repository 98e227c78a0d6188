"""What k answers out of n would give, without bias. Pure functions, exact."""

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from fractions import Fraction


def pass_at(
    n: int,
    right: int,
    k: int,
) -> float:
    """The chance that at least one of k out of n answers is right, where `right` of the n are:
    1 - C(n - right, k) / C(n, k) (Chen et al. 2021, arXiv:2107.03374). Raises ValueError unless
    1 <= k <= n.
    """
    if not 1 <= k <= n or not 0 <= right <= n:
        raise ValueError(f"expected 1 <= k <= n and 0 <= right <= n, found {k}, {n}, {right}")
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority_at(
    answers: Sequence[Hashable | None],
    right: Sequence[float],
    k: int,
) -> float:
    """The chance that the commonest of k out of n answers is right: the mean over all subsets of k.

    answers: [n] what each sample answered, None where it has no answer and so no vote. right: [n].
    Of answers that are equally common each is taken as often. A subset without a vote is wrong.
    Where samples with one answer differ in `right`, their mean counts.
    """
    if not 1 <= k <= len(answers) or len(answers) != len(right):
        raise ValueError(f"expected 1 <= k <= n and n values, found {k}, {len(right)}")
    groups: dict[Hashable, list[float]] = {}
    silent = 0
    for answer, value in zip(answers, right, strict=True):
        if answer is None:
            silent += 1
        else:
            groups.setdefault(answer, []).append(value)
    counts = {answer: len(values) for answer, values in groups.items()}
    total = 0.0
    for answer, values in groups.items():
        share = sum(values) / len(values)
        if share == 0:
            continue
        wins = _wins(answer, counts, silent, k)
        total += share * float(wins)
    return total / math.comb(len(answers), k)


def _wins(
    answer: Hashable,
    counts: Mapping[Hashable, int],
    silent: int,
    k: int,
) -> Fraction:
    """In how many of the subsets of k this answer is the commonest, a tie of t as 1 / t."""
    total = Fraction(0)
    own = counts[answer]
    for votes in range(1, min(own, k) + 1):
        chosen = math.comb(own, votes)
        ways = _others(answer, counts, silent, k - votes, votes)
        for ties, count in ways.items():
            total += Fraction(chosen * count, ties + 1)
    return total


def _others(
    answer: Hashable, counts: Mapping[Hashable, int], silent: int, left: int, most: int
) -> dict[int, int]:
    """By how many other answers have `most` votes: the ways to take `left` samples of the others,
    none of which has more.
    """
    # (samples taken, answers with `most`) -> ways; the silent have no vote to limit
    ways: Counter[tuple[int, int]] = Counter()
    for taken in range(min(silent, left) + 1):
        ways[taken, 0] = math.comb(silent, taken)
    for other, count in counts.items():
        if other == answer:
            continue
        further: Counter[tuple[int, int]] = Counter()
        for (taken, ties), number in ways.items():
            limit = min(count, most, left - taken)
            for votes in range(limit + 1):
                tied = ties
                if votes == most:
                    tied += 1
                chosen = math.comb(count, votes)
                further[taken + votes, tied] += number * chosen
        ways = further
    out: Counter[int] = Counter()
    for (taken, ties), number in ways.items():
        if taken == left:
            out[ties] += number
    return out
