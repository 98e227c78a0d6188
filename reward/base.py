"""What all rewards share: verifiers and what runs them, scorers without a state, how an error names
a prompt, and which option the scores come from.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from conf.choices import TermKind
from conf.schema import RewardConfig
from rlhf.types import Prompt, Rollout, Scores, UserError

_SHOWN = 120  # characters of a prompt in an error


class Verifier(Protocol):
    """Checks one response against its row's reference.

    Whatever a response holds, it can only be wrong (score 0). What the row or the machine lacks
    raises an error.
    """

    columns: tuple[str, ...]  # the row's columns that `reference` is called with
    workers: int  # responses checked at the same time, each in a thread

    def reference(self, *values: Any) -> Any:
        """Read the row's columns; responses of one prompt share it. Raises ValueError with what was
        expected and what the column holds.
        """
        ...

    def score(self, response: str, reference: Any) -> float:
        """A score in [0, 1]; 0 for a response that can't be read."""
        ...


class Stateless:
    """A scorer whose scores don't depend on earlier calls."""

    def begin(self, rollout: Rollout) -> None:
        """As `Scorer.begin`: by default nothing is done before all are there."""

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Accepts an empty state only. Raises UserError otherwise: the checkpoint was written with
        another reward.
        """
        if state:
            raise UserError(
                "The checkpoint holds statistics of the reward terms "
                f"{', '.join(sorted(state))}, but the reward has no such terms. "
                "Resume with the terms that the run started with."
            )


class VerifierScorer(Stateless):
    """Runs a verifier over responses, `workers` of them at a time."""

    def __init__(self, name: str, verifier: Verifier) -> None:
        self.name, self.verifier = name, verifier
        # of those that were begun, in the order in which they came
        self._threads: ThreadPoolExecutor | None = None
        self._read: tuple[Prompt, Any] | None = None  # the latest prompt's reference

    def begin(self, rollout: Rollout) -> None:
        """Check this response in a thread, while others are still being written."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.verifier.workers, f"verify-{self.name}")
        rollout.begun[self] = self._threads.submit(self._check, rollout)

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """Raises UserError naming the prompt where its reference can't be used, and where checking
        failed through no fault of the response.
        """
        if self._threads is None and self.verifier.workers == 1:
            total = [self._check(rollout) for rollout in rollouts]
            return Scores(total=total, terms={self.name: list(total)})
        for rollout in rollouts:
            if self not in rollout.begun:
                self.begin(rollout)
        futures: list[Future[float]] = [rollout.begun.pop(self) for rollout in rollouts]
        total = [future.result() for future in futures]
        return Scores(total=total, terms={self.name: list(total)})

    def _check(self, rollout: Rollout) -> float:
        reference = self._reference(rollout)
        try:
            return float(self.verifier.score(rollout.text, reference))
        except Exception as error:
            raise UserError(
                f"reward.terms.{self.name} raised {type(error).__name__}: {error}; for "
                f"{name_prompt(rollout)}."
            ) from error

    def _reference(self, rollout: Rollout) -> Any:
        """Of the response's row: two rows with one text may have two answers."""
        prompt, read = rollout.prompt, self._read
        if read is not None and read[0] is prompt:
            return read[1]
        row = name_prompt(rollout)
        reference = read_reference(self.name, self.verifier, prompt.fields, row)
        self._read = (prompt, reference)
        return reference


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


def name_prompt(rollout: Rollout) -> str:
    """How an error names the prompt of a response: its id and the start of its text."""
    text = rollout.prompt.text
    cut = " ..." if len(text) > _SHOWN else ""
    return f"prompt {rollout.prompt.id!r} ({text[:_SHOWN]!r}{cut})"


def refuse_turns(rollout: Rollout, source: str) -> None:
    """What reads texts can't read an episode, of which the text is a part. Raises UserError."""
    if rollout.turns:
        raise UserError(
            f"{source} reads texts, not the policy's tokens (it has another tokenizer or chat "
            f"template), and an episode is no text: {name_prompt(rollout)}. Train the reward model "
            "from the policy, or score by the environment (reward=environment)."
        )


def is_set(reward_cfg: RewardConfig) -> bool:
    """Whether any option names a reward."""
    return reward_cfg.path is not None or reward_cfg.function is not None or bool(reward_cfg.terms)


def check_source(reward_cfg: RewardConfig) -> None:
    """Raises UserError unless exactly one of reward.path, reward.function, reward.terms is set."""
    given = []
    if reward_cfg.path is not None:
        given.append(f"reward.path={reward_cfg.path}")
    if reward_cfg.function is not None:
        given.append(f"reward.function={reward_cfg.function}")
    if reward_cfg.terms:
        given.append(f"reward.terms ({', '.join(reward_cfg.terms)})")
    if not given:
        raise UserError(
            "reward.path, reward.function and reward.terms: expected one of them, found none. "
            "Set reward.path=<a reward run>/model, "
            "reward.function=pkg.module:function, or terms such as "
            "+reward.terms.accuracy.kind=numeric."
        )
    if len(given) > 1:
        raise UserError(
            f"{' and '.join(given)}: expected one of them, found {len(given)}. Several sources "
            "become terms: "
            "reward.terms.<name>.kind=model with paths=[<directory>], kind=function with "
            "function=pkg.module:function."
        )


def environment_weight(reward_cfg: RewardConfig) -> float:
    """What an environment's reward counts in a score; 0 where no term asks for it."""
    terms = reward_cfg.terms.values()
    return sum(term.weight for term in terms if term.kind is TermKind.environment)


def model_paths(reward_cfg: RewardConfig) -> list[tuple[str, str]]:
    """(option, directory) of every reward model that the configuration names."""
    paths = [] if reward_cfg.path is None else [("reward.path", reward_cfg.path)]
    for name, term in reward_cfg.terms.items():
        paths += [(f"reward.terms.{name}.paths", path) for path in term.paths]
    return paths
