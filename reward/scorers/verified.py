"""Responses held against their row's own reference: what a verifier is, and the scorer that runs
one.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from reward.base import Stateless, Verifier, name_prompt
from rlhf.types import Rollout, Scores, UserError


def read_reference(name: str, verifier: Verifier, columns: Mapping[str, object], place: str) -> Any:
    """The reference of one row; `place` says where the row stands. Raises UserError for a missing
    column and for a broken reference.
    """
    for column in verifier.columns:
        if columns.get(column) is None:
            found = ", ".join(key for key, value in columns.items() if value is not None) or "none"
            raise UserError(
                f"reward.terms.{name} needs the column {column!r}, which {place} lacks (its "
                f"columns beside the prompt: {found}). "
                f"Add it to the data, or name another one with reward.terms.{name}.column."
            )
    try:
        return verifier.reference(*(columns[column] for column in verifier.columns))
    except ValueError as error:
        raise UserError(
            f"reward.terms.{name}, column {' and '.join(map(repr, verifier.columns))} of "
            f"{place}: {error}."
        ) from error


class VerifierScorer(Stateless):
    """Runs a verifier over responses. A reference is read once for all responses to one prompt."""

    def __init__(self, name: str, verifier: Verifier) -> None:
        self.name, self.verifier = name, verifier

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """Raises UserError naming the prompt where the reference is missing or broken, or where
        checking failed by no fault of the response.
        """
        references: dict[str, Any] = {}
        for rollout in rollouts:
            if rollout.prompt.id not in references:
                references[rollout.prompt.id] = read_reference(
                    self.name, self.verifier, rollout.prompt.fields, name_prompt(rollout)
                )

        def one(rollout: Rollout) -> float:
            try:
                return float(self.verifier.score(rollout.text, references[rollout.prompt.id]))
            except Exception as error:
                raise UserError(
                    f"reward.terms.{self.name} raised {type(error).__name__}: {error}; for "
                    f"{name_prompt(rollout)}."
                ) from error

        if self.verifier.workers > 1 and len(rollouts) > 1:
            with ThreadPoolExecutor(self.verifier.workers) as pool:
                total = list(pool.map(one, rollouts))
        else:
            total = [one(rollout) for rollout in rollouts]
        return Scores(total=total, terms={self.name: list(total)})
