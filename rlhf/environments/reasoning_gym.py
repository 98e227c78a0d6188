"""kind=reasoning_gym: a question of reasoning-gym, tried until it is right. Each try is told its
score; its reward is by how much it is better than all before, so that an episode's is the best.
"""

import functools
import json
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from conf.reward import EnvironmentConfig
from reward.sandbox.hook import make_hook
from rlhf.environments import names
from rlhf.environments.apart import Apart, prepare
from rlhf.process.libraries import check_installed
from rlhf.process.metadata import decode
from rlhf.types import Environment, Step, UserError

_METADATA = "metadata"  # the column that data.recipe=gym writes
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def make(environment: EnvironmentConfig, tokenizer: Any = None) -> Callable[[], Environment]:
    """What makes an episode of the dataset ``environment.game``. Raises UserError for one that is
    not known, or doesn't take ``environment.options``.
    """
    check_installed("reasoning_gym", "gym")
    game = environment.game
    assert game is not None  # EnvironmentConfig.check_complete
    prepare("reasoning_gym")
    build = functools.partial(Game, game, dict(environment.options))
    names.check_game(Apart(build, environment.step_limit_s), environment)
    return lambda: Apart(build, environment.step_limit_s)


class Game:
    """One episode, in a process of its own."""

    def __init__(self, game: str, options: Mapping[str, Any]) -> None:
        """Raises UserError."""
        from reasoning_gym.factory import DATASETS, create_dataset

        names.check_known(game, sorted(set(DATASETS) - {"composite"}), "reasoning-gym")
        self.game, self.options = game, dict(options)
        self._create: Any = create_dataset
        try:
            self._dataset = create_dataset(game, **self.options, seed=0, size=1)
        except (TypeError, ValueError, AssertionError) as error:
            raise UserError(str(error)) from error
        self._entry: dict[str, Any] = {}
        self._best = 0.0
        # some of its verifiers run an answer as Python: without sockets, programs and files
        sys.addaudithook(make_hook("/nonexistent"))

    def reset(self, row: Mapping[str, object], seed: int) -> str:
        """The row's own question, which is its prompt, where data.recipe=gym wrote the row, else
        the seed's. Raises ValueError for a row of another dataset.
        """
        self._best = 0.0
        stored = row.get(_METADATA)
        if stored is None:
            self._dataset = self._create(self.game, **self.options, seed=seed, size=1)
            self._entry = self._dataset[0]
            return str(self._entry["question"])
        entry = json.loads(stored) if isinstance(stored, str) else stored
        if not isinstance(entry, dict) or entry.get("task") != self.game:
            raise ValueError(
                f"its column {_METADATA!r} is of no question of environment.game={self.game}"
            )
        self._dataset = self._create(self.game, **decode(entry["config"]))
        self._entry = {
            "question": entry["question"],
            "answer": entry["answer"],
            "metadata": decode(entry["metadata"]),
        }
        return ""

    def step(self, text: str) -> Step:
        answers = _ANSWER.findall(text)
        answer = answers[-1] if answers else text
        try:
            score = float(self._dataset.score_answer(answer.strip(), self._entry))
        except Exception:  # noqa: BLE001 - it scores its own answer, so an error is the answer's
            score = 0.0
        better = max(0.0, score - self._best)
        self._best = max(self._best, score)
        if score >= 1.0:
            return Step("", better, done=True, info={"success": True})
        return Step(f"Score {score:.2g} of 1. Try again.", better, info={"success": False})

    def close(self) -> None:
        """Its process ends with it."""
