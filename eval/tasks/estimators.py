"""What k answers out of n would give, without bias. Pure functions, exact."""

import math
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
    for answer, value in zip(
        answers,
        right,
        strict=True,
    ):
        if answer is not None:
            groups.setdefault(answer, []).append(value)
    counts = {answer: len(values) for answer, values in groups.items()}
    silent = len(answers) - sum(counts.values())
    total = 0.0
    for answer, values in groups.items():
        share = sum(values) / len(values)
        if share:
            total += share * float(_wins(answer, counts, silent, k))
    return total / math.comb(len(answers), k)


def _wins(
    answer: Hashable,
    counts: Mapping[Hashable, int],
    silent: int,
    k: int,
) -> Fraction:
    """In how many of the subsets of k this answer is the commonest, a tie of t as 1 / t."""
    total = Fraction(0)
    for votes in range(1, min(counts[answer], k) + 1):
        ways = _others(answer, counts, silent, k - votes, votes)
        for ties, count in ways.items():
            total += Fraction(math.comb(counts[answer], votes) * count, ties + 1)
    return total


def _others(
    answer: Hashable, counts: Mapping[Hashable, int], silent: int, left: int, most: int
) -> dict[int, int]:
    """By how many other answers have `most` votes: the ways to take `left` samples of the others,
    none of which has more.
    """
    # (samples taken, answers with `most`) -> ways; the silent have no vote to limit
    ways = {(taken, 0): math.comb(silent, taken) for taken in range(min(silent, left) + 1)}
    for other, count in counts.items():
        if other == answer:
            continue
        further: dict[tuple[int, int], int] = {}
        for (taken, ties), number in ways.items():
            for votes in range(min(count, most, left - taken) + 1):
                state = (taken + votes, ties + (votes == most))
                further[state] = further.get(state, 0) + number * math.comb(count, votes)
        ways = further
    out: dict[int, int] = {}
    for (taken, ties), number in ways.items():
        if taken == left:
            out[ties] = out.get(ties, 0) + number
    return out
