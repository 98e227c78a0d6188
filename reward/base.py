"""What all rewards share: the protocol of verifiers, scorers without a state, how an error names a
prompt, and which option the scores come from.
"""

from typing import Any, Protocol

from conf.choices import TermKind
from conf.schema import RewardConfig
from rlhf.types import Rollout, UserError

_SHOWN = 120  # characters of a prompt in an error


class Verifier(Protocol):
    """Checks one response against its row's reference.

    Whatever a response holds, it can only be wrong (score 0). What the row or the machine lacks
    raises an error.
    """

    columns: tuple[str, ...]  # the row's columns that `reference` is called with
    workers: int  # responses checked at the same time, each in a thread

    def reference(self, *values: Any) -> Any:
        """Read the row's columns; called once per prompt. Raises ValueError with what was expected
        and what the column holds.
        """
        ...

    def score(self, response: str, reference: Any) -> float:
        """A score in [0, 1]; 0 for a response that can't be read."""
        ...


class Stateless:
    """A scorer whose scores don't depend on earlier calls."""

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
