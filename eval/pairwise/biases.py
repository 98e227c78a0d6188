"""How far a judge of pairs can be trusted: whether it says the same in both orders, which place and
which length it prefers, and how much of it could be read. Pure functions.

A judge that looks at the place alone still gives every policy a win rate of 1/2, with a narrow
interval: the order has to be turned round to see it. GPT-4 named the same winner in both orders for
65 % of MT-Bench's pairs, GPT-3.5 for 46 % and Claude 1 for 24 % (Zheng et al. 2023,
arXiv:2306.05685, table 2); a coin without ties does for 50 %.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from eval.pairwise.asking import IDENTICAL, TOO_LONG
from eval.pairwise.verdicts import Judged, Verdict
from eval.statistics import Interval, share_by_group


@dataclass(frozen=True, slots=True)
class Biases:
    """What a judge does whatever the answers say. Each share is of the cases in which it can be
    seen, None where there are none; intervals resample prompts (Wilson's where all cases agree).
    """

    pairs: int
    identical: int  # pairs of equal answers: a tie, without asking
    too_long: int  # pairs that the judge could not read
    asked: int  # pairs
    unread: int  # pairs with a reply that holds no clear verdict
    # of pairs with a winner in one order at least: the same winner in both
    consistency: Interval | None
    first: Interval | None  # of verdicts with a winner: the answer shown first
    # of pairs of unequal length: the longer answer's wins, a tie is half
    longer: Interval | None
    ties: float | None  # share of verdicts

    @property
    def unread_share(self) -> float:
        """Of the pairs that were to be judged: those without a verdict."""
        wanted = self.asked + self.too_long
        return (self.unread + self.too_long) / wanted if wanted else 0.0


def biases(judged: Sequence[Judged], *, resamples: int, seed: int) -> Biases:
    """The biases of a judge in all that it said."""
    read = [one for one in judged if one.wins is not None]
    asked = sum(one.unasked is None for one in judged)

    def share(cases: Sequence[tuple[str, float, float]]) -> Interval | None:
        return share_by_group(cases, resamples=resamples, seed=seed)

    verdicts = [verdict for one in read for verdict in _verdicts(one)]
    ties = verdicts.count(Verdict.tie)
    return Biases(
        pairs=len(judged),
        identical=sum(one.unasked == IDENTICAL for one in judged),
        too_long=sum(one.unasked == TOO_LONG for one in judged),
        asked=asked,
        unread=asked - len(read),
        consistency=share([_same_winner(one) for one in read]),
        first=share([_first_named(one) for one in read]),
        longer=share([_longer_wins(one) for one in read]),
        ties=ties / len(verdicts) if verdicts else None,
    )


def _verdicts(one: Judged) -> tuple[Verdict, Verdict]:
    assert one.shown is not None and one.swapped is not None
    assert one.shown.verdict is not None and one.swapped.verdict is not None
    return one.shown.verdict, one.swapped.verdict


def _same_winner(one: Judged) -> tuple[str, float, float]:
    """Prompt, cases of one winner in both orders, cases of a winner."""
    assert one.wins is not None
    named = one.wins != (0.5, 0.5)
    same = named and one.wins[0] == one.wins[1]
    return one.pair.prompt_id, float(same), float(named)


def _first_named(one: Judged) -> tuple[str, float, float]:
    """Prompt, verdicts for the answer shown first, verdicts with a winner."""
    verdicts = _verdicts(one)
    named = sum(verdict is not Verdict.tie for verdict in verdicts)
    return one.pair.prompt_id, float(verdicts.count(Verdict.first)), float(named)


def _longer_wins(one: Judged) -> tuple[str, float, float]:
    """Prompt, what the longer answer won in the mean of both orders, whether there is one."""
    assert one.wins is not None
    mean = sum(one.wins) / 2
    if one.pair.longer_by == 0:
        return one.pair.prompt_id, 0.0, 0.0
    return one.pair.prompt_id, mean if one.pair.longer_by > 0 else 1 - mean, 1.0
