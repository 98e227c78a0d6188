"""Scores by rule: a verifier checks each response against its row's own reference, or its length
decides.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from conf.choices import LengthUnit
from conf.schema import RewardTerm
from reward.base import Stateless, Verifier, name_prompt
from rlhf.types import Rollout, Scores, UserError


def read_reference(
    name: str, verifier: Verifier, columns: Mapping[str, object], row_name: str
) -> Any:
    """The reference of a row for the term `name`; errors call the row `row_name`. Raises UserError
    for a missing column and for a reference that can't be used.
    """
    for column in verifier.columns:
        if columns.get(column) is None:
            others = [key for key, value in columns.items() if value is not None]
            raise UserError(
                f"reward.terms.{name} needs the column {column!r}, which {row_name} lacks (its "
                f"columns beside the prompt: {', '.join(others) or 'none'}). "
                f"Add it to the data, or name another one with reward.terms.{name}.column."
            )
    try:
        return verifier.reference(*(columns[column] for column in verifier.columns))
    except ValueError as error:
        raise UserError(
            f"reward.terms.{name}, column {' and '.join(map(repr, verifier.columns))} of "
            f"{row_name}: {error}."
        ) from error


class VerifierScorer(Stateless):
    """Runs a verifier over responses. Each prompt's reference is read once."""

    def __init__(self, name: str, verifier: Verifier) -> None:
        self.name, self.verifier = name, verifier

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """Raises UserError naming the prompt where its reference can't be used, and where checking
        failed through no fault of the response.
        """
        references: dict[int, Any] = {}  # by row: two rows with one text may have two answers
        for rollout in rollouts:
            prompt = rollout.prompt
            if id(prompt) not in references:
                references[id(prompt)] = read_reference(
                    self.name, self.verifier, prompt.fields, name_prompt(rollout)
                )

        def check(rollout: Rollout) -> float:
            return self._check(rollout, references[id(rollout.prompt)])

        if self.verifier.workers > 1 and len(rollouts) > 1:
            with ThreadPoolExecutor(self.verifier.workers) as pool:
                total = list(pool.map(check, rollouts))
        else:
            total = [check(rollout) for rollout in rollouts]
        return Scores(total=total, terms={self.name: list(total)})

    def _check(self, rollout: Rollout, reference: Any) -> float:
        try:
            return float(self.verifier.score(rollout.text, reference))
        except Exception as error:
            raise UserError(
                f"reward.terms.{self.name} raised {type(error).__name__}: {error}; for "
                f"{name_prompt(rollout)}."
            ) from error


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


class LengthScorer(Stateless):
    """`band_score` of each response: in tokens, the end-of-sequence token included, or in
    characters of its text.
    """

    def __init__(self, term: RewardTerm) -> None:
        self.low, self.high, self.ramp = term.low, term.high, term.ramp
        self.unit = term.unit

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        if self.unit is LengthUnit.tokens:
            lengths = [len(rollout.token_ids) for rollout in rollouts]
        else:
            lengths = [len(rollout.text) for rollout in rollouts]
        total = [band_score(length, self.low, self.high, self.ramp) for length in lengths]
        return Scores(total=total, terms={"length": list(total)})
